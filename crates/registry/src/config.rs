//! The image configuration.

use serde::Deserialize;
use serde_json::Value;

use crate::digest::Digest;
use crate::platform::Platform;

/// Largest accepted configuration in bytes: the limit that engines use.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// A parsed image configuration, with the document it came from.
#[derive(Debug, Clone)]
pub struct ImageConfig {
    /// The whole document.
    pub document: Value,
    /// What the image runs on.
    pub platform: Platform,
    /// Digests of the uncompressed layer archives, base first.
    pub diff_ids: Vec<Digest>,
}

impl ImageConfig {
    /// Parses a configuration.
    ///
    /// # Errors
    /// The rule that the document breaks.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Document {
            #[serde(default)]
            os: String,
            #[serde(default)]
            architecture: String,
            variant: Option<String>,
            rootfs: Rootfs,
        }
        #[derive(Deserialize)]
        struct Rootfs {
            #[serde(default)]
            diff_ids: Vec<String>,
        }
        let invalid = |error: serde_json::Error| format!("image configuration is not valid: {error}");
        let document: Value = serde_json::from_slice(text).map_err(invalid)?;
        let parsed = Document::deserialize(&document).map_err(invalid)?;
        let diff_ids = parsed
            .rootfs
            .diff_ids
            .iter()
            .map(|text| {
                text.parse::<Digest>().map_err(|error| format!("image configuration: diff id {error}"))
            })
            .collect::<Result<_, _>>()?;
        let platform = Platform { os: parsed.os, architecture: parsed.architecture, variant: parsed.variant };
        Ok(Self { document, platform, diff_ids })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platform_and_diff_ids_are_read_and_the_rest_is_kept() {
        let id = Digest::sha256_of(b"x");
        let text = format!(
            r#"{{"os":"linux","architecture":"arm","variant":"v7","x":[1],"rootfs":{{"type":"layers","diff_ids":["{id}"]}}}}"#
        );
        let config = ImageConfig::parse(text.as_bytes()).unwrap();
        assert_eq!(config.platform.to_string(), "linux/arm/v7");
        assert_eq!(config.diff_ids, [id]);
        assert_eq!(config.document["x"][0], 1);
    }

    #[test]
    fn a_broken_configuration_is_refused() {
        for text in ["", "{}", "[]", r#"{"rootfs":{"diff_ids":["sha1:x"]}}"#, r#"{"rootfs":3}"#] {
            assert!(ImageConfig::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
