//! What is behind the name of an image: its manifests and configurations.

use std::fmt;
use std::str::FromStr;

use registry::{Digest, Image, ImageConfig, ImageSet, InvalidPlatform, Platform, RegistryError, Source};

use crate::failure::ConvertError;
use crate::thin::is_marked_thin;

/// Which images of an index are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PlatformChoice {
    /// The one for this machine; an image for another one that stands alone is taken too.
    #[default]
    Host,
    /// The one for a platform, and nothing else.
    One(Platform),
    /// All of them.
    All,
}

impl FromStr for PlatformChoice {
    type Err = InvalidPlatform;

    fn from_str(text: &str) -> Result<Self, InvalidPlatform> {
        if text == "all" { Ok(Self::All) } else { text.parse().map(Self::One) }
    }
}

impl fmt::Display for PlatformChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => write!(f, "{}", Platform::host()),
            Self::One(platform) => write!(f, "{platform}"),
            Self::All => f.write_str("all"),
        }
    }
}

/// One image, with everything known about it but the content of its layers.
#[derive(Debug, Clone)]
pub(crate) struct SourceImage {
    pub(crate) image: Image,
    pub(crate) config: ImageConfig,
    /// The configuration as it came.
    pub(crate) config_bytes: Vec<u8>,
}

impl SourceImage {
    /// What it runs on: the index knows variants that configurations forget.
    pub(crate) fn platform(&self) -> &Platform {
        self.image.platform.as_ref().unwrap_or(&self.config.platform)
    }
}

/// All that was asked for under one name.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    pub(crate) source: Source,
    /// Digest of the document that stands for all of it: of an index, or of the one image.
    pub(crate) digest: Digest,
    /// Digest of the document that the name led to, which may be an index with more in it.
    pub(crate) top_digest: Digest,
    /// Whether a choice of images is converted to a choice of images.
    pub(crate) is_index: bool,
    pub(crate) images: Vec<SourceImage>,
}

impl Resolved {
    /// The one image of a choice of one platform, the first of several.
    pub(crate) fn only_image(&self) -> &SourceImage {
        self.images.first().expect("what has no image is refused when it is resolved")
    }
}

/// Fetches the documents of the images wanted.
pub(crate) fn resolve(source: &Source, choice: &PlatformChoice) -> Result<Resolved, ConvertError> {
    let (set, top_digest) = match choice {
        PlatformChoice::All => {
            let set = source.images()?;
            let top_digest = set.digest.clone();
            (set, top_digest)
        }
        PlatformChoice::Host => one(source.image(&Platform::host())?),
        PlatformChoice::One(platform) => one(source.image(platform)?),
    };
    let ImageSet { digest, is_index, images } = set;
    let mut resolved = Resolved { source: source.clone(), digest, top_digest, is_index, images: Vec::new() };
    for image in images {
        let (config_bytes, config) = source.config(&image.manifest)?;
        let found = &config.platform;
        if let PlatformChoice::One(wanted) = choice
            && !found.architecture.is_empty()
            && (found.os != wanted.os || found.architecture != wanted.architecture)
        {
            return Err(RegistryError::NoPlatform {
                object: source.name().to_string(),
                wanted: wanted.to_string(),
                offered: found.to_string(),
            }
            .into());
        }
        if is_marked_thin(&config) {
            return Err(unsuitable(
                source,
                "is a thin image, or stands on one; convert the image that it was made from",
            ));
        }
        if found.os.is_empty() || found.os == "linux" {
            resolved.images.push(SourceImage { image, config, config_bytes });
        } else if is_index {
            tracing::info!(image = %source.name(), platform = %found, "left out: it is not for Linux");
        }
    }
    if resolved.images.is_empty() {
        return Err(unsuitable(source, "is not an image for Linux"));
    }
    Ok(resolved)
}

fn one(image: Image) -> (ImageSet, Digest) {
    let top_digest = image.top_digest.clone();
    (ImageSet { digest: image.digest.clone(), is_index: false, images: vec![image] }, top_digest)
}

fn unsuitable(source: &Source, reason: &str) -> ConvertError {
    ConvertError::Unsuitable { image: source.name().to_string(), reason: reason.to_owned() }
}
