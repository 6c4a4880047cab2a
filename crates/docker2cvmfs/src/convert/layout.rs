//! Where layers lie in a repository.

use registry::Digest;
use thin_image::Location;

use crate::failure::ConvertError;

/// The form in which a repository holds images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// One directory per layer, as docker2cvmfs 0.3 makes them: `SUBDIRECTORY/HEX`.
    Layers {
        /// The directory of the layers, without slashes at the ends.
        subdirectory: String,
    },
    /// What DUCC writes: layers, flat trees, links with the images' names, metadata.
    Unpacked,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Layers { subdirectory } => write!(f, "layers in {subdirectory}"),
            Self::Unpacked => f.write_str("unpacked"),
        }
    }
}

impl Layout {
    /// The form of the original; slashes at the ends of `subdirectory` do not matter:
    /// its default was `layers/`.
    pub fn layers(subdirectory: &str) -> Self {
        Self::Layers { subdirectory: subdirectory.trim_matches('/').to_owned() }
    }

    /// The directory of a layer, from the repository's root, without a slash in front.
    pub fn layer_path(&self, layer: &Digest) -> String {
        match self {
            Self::Layers { subdirectory } if subdirectory.is_empty() => layer.hex().to_owned(),
            Self::Layers { subdirectory } => format!("{subdirectory}/{}", layer.hex()),
            Self::Unpacked => {
                let hex = layer.hex();
                format!(".layers/{}/{hex}/layerfs", hex.get(..2).unwrap_or_default())
            }
        }
    }

    /// The place of a layer as descriptors name it.
    pub(crate) fn location(&self, fqrn: &str, layer: &Digest) -> Result<Location, ConvertError> {
        let path = self.layer_path(layer);
        Location::new(fqrn, &path)
            .map_err(|rule| ConvertError::Usage(format!("cvmfs://{fqrn}/{path} cannot hold a layer: {rule}")))
    }
}
