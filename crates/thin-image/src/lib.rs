//! The thin image descriptor `thin.json`: parse, validate, build.
//!
//! A thin image is an ordinary image whose only layer holds one regular file,
//! `thin.json`, which lists the layers of the real image as paths in CernVM-FS
//! repositories, base first. The format is that of docker2cvmfs 0.3 and DUCC.
//!
//! A descriptor comes out of an image that anybody can push, so nothing in it is
//! believed: the parser bounds the size of the document and the number of layers, and
//! turns every URL into a [`Location`] that cannot leave the repository. What passes
//! [`ThinImage::parse`] needs no second check. This crate does no I/O.
//!
//! ```
//! let text = br#"{"version": "1.0", "layers": [{
//!     "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
//!     "url": "cvmfs://layers.example.org/layers/9f86d081"}]}"#;
//! let image = thin_image::ThinImage::parse(text)?;
//! assert_eq!(image.layers[0].location.fqrn, "layers.example.org");
//! assert_eq!(image.layers[0].location.path, "layers/9f86d081");
//! # Ok::<(), thin_image::ThinImageError>(())
//! ```

mod classify;
mod location;
mod parse;
mod version;

pub use classify::{Contents, LayerClass, classify};
pub use location::{Location, LocationError};
pub use version::Version;

use serde::Serialize;

/// Name of the descriptor in the root of a thin layer.
pub const DESCRIPTOR_NAME: &str = "thin.json";

/// Largest accepted descriptor in bytes. A layer's entry takes about 200 bytes, so that
/// [`MAX_LAYERS`] layers with long paths and a long comment still fit.
pub const MAX_DESCRIPTOR_BYTES: usize = 1 << 20;

/// Largest accepted number of layers: overlayfs takes at most 500 lower directories.
pub const MAX_LAYERS: usize = 500;

/// A parsed and validated descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinImage {
    /// Version of the format that the writer used.
    pub version: Version,
    /// Oldest version of the format that a reader must understand.
    pub min_version: Option<Version>,
    /// Where the image was converted from, free text for people.
    pub origin: Option<String>,
    /// The image's layers, base first, topmost last. The same layer may occur twice.
    pub layers: Vec<ThinLayer>,
    /// Free text.
    pub comment: Option<String>,
}

/// One layer of a thin image. Made by [`ThinLayer::new`], which validates.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThinLayer {
    /// Digest of the compressed layer blob: lower case hexadecimal, without algorithm.
    pub digest: String,
    /// The directory that holds the layer's content.
    pub location: Location,
}

/// Not the digest of a layer blob; holds the text that was given.
#[derive(Debug, thiserror::Error)]
#[error("digest {0:?} is not 64 or 128 lower case hexadecimal digits")]
pub struct InvalidDigest(pub String);

/// Why a descriptor is refused. Entries are counted from 0, the base layer.
#[derive(Debug, thiserror::Error)]
pub enum ThinImageError {
    /// The document is larger than [`MAX_DESCRIPTOR_BYTES`].
    #[error("thin.json is larger than {MAX_DESCRIPTOR_BYTES} bytes")]
    TooLarge,
    /// Not JSON.
    #[error("thin.json is not valid JSON: {0}")]
    Malformed(#[source] serde_json::Error),
    /// JSON, but not an object with the keys of a descriptor.
    #[error("thin.json is not a descriptor: {0}")]
    NotADescriptor(&'static str),
    /// A version that cannot be read as numbers separated by dots.
    #[error("thin.json: {key} {value:?} is not a version such as \"1.0\"")]
    BadVersion {
        /// `version` or `min_version`.
        key: &'static str,
        /// The value found.
        value: String,
    },
    /// Written for a newer reader.
    #[error(
        "thin.json: {key} {found} is newer than {} which this software supports; update it",
        Version::SUPPORTED
    )]
    TooNew {
        /// `version` or `min_version`.
        key: &'static str,
        /// The version found.
        found: Version,
    },
    /// More layers than overlayfs can stack.
    #[error("thin.json lists {0} layers, at most {MAX_LAYERS} can be stacked")]
    TooManyLayers(usize),
    /// A value has the wrong JSON type.
    #[error("thin.json: {key} is not a string")]
    NotAString {
        /// The key at the top level.
        key: &'static str,
    },
    /// A layer entry is not an object with a string under this key.
    #[error("thin.json: layer {index}: {key} is missing or not a string")]
    MissingInLayer {
        /// Position in `layers`.
        index: usize,
        /// `digest` or `url`.
        key: &'static str,
    },
    /// A layer entry's digest.
    #[error("thin.json: layer {index}: digest {value:?} is not 64 or 128 lower case hexadecimal digits")]
    BadDigest {
        /// Position in `layers`.
        index: usize,
        /// The value found, shortened.
        value: String,
    },
    /// A layer entry's URL.
    #[error("thin.json: layer {index}: url {value:?}: {cause}")]
    BadUrl {
        /// Position in `layers`.
        index: usize,
        /// The value found, shortened.
        value: String,
        /// The rule that is broken.
        #[source]
        cause: LocationError,
    },
}

impl ThinImage {
    /// A descriptor of the current version for `layers`, base first.
    ///
    /// # Errors
    /// [`ThinImageError::TooManyLayers`].
    pub fn new(origin: Option<String>, layers: Vec<ThinLayer>) -> Result<Self, ThinImageError> {
        if layers.len() > MAX_LAYERS {
            return Err(ThinImageError::TooManyLayers(layers.len()));
        }
        Ok(Self { version: Version::SUPPORTED, min_version: None, origin, layers, comment: None })
    }

    /// Parses and validates a descriptor. Unknown keys are ignored.
    ///
    /// # Errors
    /// Each names the entry and the rule that it breaks.
    pub fn parse(text: &[u8]) -> Result<Self, ThinImageError> {
        parse::parse(text)
    }

    /// The descriptor with `layer` put on top, for a commit of a container that runs on
    /// this image.
    ///
    /// # Errors
    /// [`ThinImageError::TooManyLayers`].
    pub fn with_layer(&self, layer: ThinLayer) -> Result<Self, ThinImageError> {
        if self.layers.len() >= MAX_LAYERS {
            return Err(ThinImageError::TooManyLayers(self.layers.len() + 1));
        }
        let mut image = self.clone();
        image.layers.push(layer);
        Ok(image)
    }

    /// Whether the lowest layers of this image are all the layers of `base`: the image
    /// was committed on top of it and already contains its list.
    pub fn starts_with(&self, base: &ThinImage) -> bool {
        self.layers.starts_with(&base.layers)
    }

    /// The descriptor as text: two blanks of indentation, no newline at the end, the
    /// bytes that docker2cvmfs 0.3 writes (Go's JSON, which escapes `<`, `>` and `&`).
    pub fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(&Written {
            version: self.version.to_string(),
            min_version: self.min_version.map(|version| version.to_string()),
            origin: self.origin.as_deref(),
            layers: self.layers.iter().map(|l| WrittenLayer { digest: &l.digest, url: l.url() }).collect(),
            comment: self.comment.as_deref(),
        })
        .expect("strings and lists always have a JSON form");
        escape_like_go(&text)
    }
}

impl ThinLayer {
    /// A layer from the hexadecimal digest of its compressed blob and its place.
    ///
    /// # Errors
    /// [`InvalidDigest`].
    pub fn new(digest: impl Into<String>, location: Location) -> Result<Self, InvalidDigest> {
        let digest = digest.into();
        let hexadecimal = digest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if hexadecimal && matches!(digest.len(), 64 | 128) {
            Ok(Self { digest, location })
        } else {
            Err(InvalidDigest(digest))
        }
    }

    /// `cvmfs://FQRN/PATH`.
    pub fn url(&self) -> String {
        self.location.to_string()
    }
}

/// The order of the keys is that of docker2cvmfs 0.3.
#[derive(Serialize)]
struct Written<'a> {
    version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    origin: Option<&'a str>,
    layers: Vec<WrittenLayer<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comment: Option<&'a str>,
}

#[derive(Serialize)]
struct WrittenLayer<'a> {
    digest: &'a str,
    url: String,
}

/// These characters occur in JSON inside strings only, so that replacing them in the
/// finished text is safe.
fn escape_like_go(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        match character {
            '<' => escaped.push_str("\\u003c"),
            '>' => escaped.push_str("\\u003e"),
            '&' => escaped.push_str("\\u0026"),
            '\u{2028}' => escaped.push_str("\\u2028"),
            '\u{2029}' => escaped.push_str("\\u2029"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(digit: char, path: &str) -> ThinLayer {
        let digest: String = std::iter::repeat_n(digit, 64).collect();
        ThinLayer::new(digest, Location::new("repo.example.org", path).unwrap()).unwrap()
    }

    #[test]
    fn the_text_is_byte_for_byte_that_of_the_original_writer() {
        let image = ThinImage::new(
            Some("library/redis:4@https://registry-1.docker.io/v2?a&b<c>".into()),
            vec![layer('a', "layers/a"), layer('b', "layers/b")],
        )
        .unwrap();
        let a = "a".repeat(64);
        let b = "b".repeat(64);
        let expected = format!(
            r#"{{
  "version": "1.0",
  "origin": "library/redis:4@https://registry-1.docker.io/v2?a\u0026b\u003cc\u003e",
  "layers": [
    {{
      "digest": "{a}",
      "url": "cvmfs://repo.example.org/layers/a"
    }},
    {{
      "digest": "{b}",
      "url": "cvmfs://repo.example.org/layers/b"
    }}
  ]
}}"#
        );
        assert_eq!(image.to_json(), expected);
        assert_eq!(ThinImage::parse(expected.as_bytes()).unwrap(), image);
    }

    #[test]
    fn a_commit_appends_its_layer_on_top_and_contains_the_base() {
        let base = ThinImage::new(None, vec![layer('a', "layers/a")]).unwrap();
        let committed = base.with_layer(layer('b', "layers/b")).unwrap();
        assert_eq!(committed.layers.last().unwrap().location.path, "layers/b");
        assert!(committed.starts_with(&base));
        assert!(!base.starts_with(&committed));
    }

    #[test]
    fn no_more_layers_than_overlayfs_stacks() {
        let full = ThinImage::new(None, vec![layer('a', "layers/a"); MAX_LAYERS]).unwrap();
        assert!(matches!(full.with_layer(layer('b', "x")), Err(ThinImageError::TooManyLayers(501))));
        assert!(ThinImage::new(None, vec![layer('a', "layers/a"); MAX_LAYERS + 1]).is_err());
    }
}
