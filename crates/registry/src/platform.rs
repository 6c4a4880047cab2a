//! Platforms, and the choice of an image among those of an index.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use crate::manifest::IndexEntry;

/// What an image runs on: `os/architecture[/variant]` in the words of Go.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    /// Operating system, for example `linux`.
    pub os: String,
    /// Processor architecture, for example `amd64`.
    pub architecture: String,
    /// Variant of the architecture, for example `v7`.
    pub variant: Option<String>,
}

/// Not a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("platform {0:?} is not of the form os/architecture[/variant], for example linux/amd64")]
pub struct InvalidPlatform(String);

impl Platform {
    /// Linux on the processor of this machine.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", None),
            "arm" => ("arm", Some("v7")),
            "x86" => ("386", None),
            "powerpc64" => ("ppc64le", None),
            other => (other, None),
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: variant.map(str::to_owned) }
    }

    /// The variant that is meant if none is stated.
    fn default_variant(&self) -> Option<&'static str> {
        match self.architecture.as_str() {
            "amd64" => Some("v1"),
            "arm64" => Some("v8"),
            "arm" => Some("v7"),
            _ => None,
        }
    }

    /// How well an image for `offered` serves `self`: smaller is better, `None` not at all.
    fn distance(&self, offered: &Platform) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        let level = |platform: &Platform| {
            let variant =
                platform.variant.as_deref().filter(|v| !v.is_empty()).or(platform.default_variant());
            variant.map(|v| v.trim_start_matches('v').parse::<u32>().map_err(|_| v.to_owned()))
        };
        match (level(self), level(offered)) {
            // A processor runs what was built for an older variant of it.
            (Some(Ok(wanted)), Some(Ok(offered))) => wanted.checked_sub(offered),
            (wanted, offered) => (wanted == offered).then_some(0),
        }
    }
}

impl FromStr for Platform {
    type Err = InvalidPlatform;

    fn from_str(text: &str) -> Result<Self, InvalidPlatform> {
        let parts: Vec<&str> = text.split('/').collect();
        let word = |part: &&str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        match parts.as_slice() {
            [os, architecture, rest @ ..] if rest.len() <= 1 && parts.iter().all(word) => Ok(Self {
                os: (*os).to_owned(),
                architecture: (*architecture).to_owned(),
                variant: rest.first().map(|variant| (*variant).to_owned()),
            }),
            _ => Err(InvalidPlatform(text.chars().take(100).collect())),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// The entry of an index that serves `wanted` best. Attestations and entries for
/// `unknown` are no images.
pub fn choose<'a>(entries: &'a [IndexEntry], wanted: &Platform) -> Option<&'a IndexEntry> {
    images(entries)
        .filter_map(|(entry, platform)| Some((wanted.distance(platform?)?, entry)))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, entry)| entry)
        .or_else(|| sole_unstated(entries))
}

/// The platforms of an index, for messages.
pub(crate) fn offered(entries: &[IndexEntry]) -> String {
    let names: Vec<String> =
        images(entries).filter_map(|(_, platform)| platform.map(Platform::to_string)).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The entries that are images, with the platforms they state.
pub(crate) fn images(entries: &[IndexEntry]) -> impl Iterator<Item = (&IndexEntry, Option<&Platform>)> {
    entries
        .iter()
        .filter(|entry| !entry.is_attestation)
        .map(|entry| (entry, entry.platform.as_ref()))
        .filter(|(_, platform)| platform.is_none_or(|p| p.architecture != "unknown" && p.os != "unknown"))
}

/// An index around one image often leaves the platform to the image's configuration.
fn sole_unstated(entries: &[IndexEntry]) -> Option<&IndexEntry> {
    let mut images = images(entries);
    match (images.next(), images.next()) {
        (Some((entry, None)), None) => Some(entry),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::manifest::Descriptor;

    fn entry(platform: &str) -> IndexEntry {
        let digest = Digest::sha256_of(platform.as_bytes());
        let descriptor = Descriptor { media_type: String::new(), size: 1, digest, urls: vec![] };
        IndexEntry { descriptor, platform: platform.parse().ok(), is_attestation: false }
    }

    fn chosen(offered: &[&str], wanted: &str) -> Option<String> {
        let entries: Vec<_> = offered.iter().map(|platform| entry(platform)).collect();
        let wanted = wanted.parse().unwrap();
        choose(&entries, &wanted).map(|e| e.platform.as_ref().map_or("-".into(), Platform::to_string))
    }

    #[test]
    fn the_nearest_variant_that_the_processor_runs_is_chosen() {
        let all = [
            "linux/arm/v5",
            "linux/arm/v6",
            "linux/arm/v8",
            "linux/amd64/v3",
            "linux/amd64",
            "windows/amd64",
        ];
        assert_eq!(chosen(&all, "linux/amd64").as_deref(), Some("linux/amd64"));
        assert_eq!(chosen(&all, "linux/amd64/v2").as_deref(), Some("linux/amd64"));
        assert_eq!(chosen(&all, "linux/amd64/v4").as_deref(), Some("linux/amd64/v3"));
        assert_eq!(chosen(&all, "linux/arm").as_deref(), Some("linux/arm/v6"));
        assert_eq!(chosen(&all, "linux/arm/v5").as_deref(), Some("linux/arm/v5"));
        assert_eq!(chosen(&all, "linux/s390x"), None);
        assert_eq!(chosen(&["linux/arm64/v8"], "linux/arm64").as_deref(), Some("linux/arm64/v8"));
        assert_eq!(chosen(&["linux/arm64"], "linux/arm64/v8").as_deref(), Some("linux/arm64"));
    }

    #[test]
    fn attestations_are_never_chosen() {
        let mut attestation = entry("linux/amd64");
        attestation.is_attestation = true;
        let unknown = entry("unknown/unknown");
        assert_eq!(choose(&[attestation, unknown], &"linux/amd64".parse().unwrap()), None);
    }

    #[test]
    fn a_sole_image_without_platform_is_taken() {
        assert_eq!(chosen(&["not a platform"], "linux/amd64").as_deref(), Some("-"));
        assert_eq!(chosen(&["not a platform", "nor this"], "linux/amd64"), None);
    }

    #[test]
    fn platforms_are_written_with_slashes() {
        for wrong in ["", "linux", "linux/", "linux/arm/v7/x", "linux/a b"] {
            assert!(wrong.parse::<Platform>().is_err(), "{wrong:?}");
        }
    }
}
