//! The name that the engine gives to a layer.

use std::fmt;
use std::str::FromStr;

/// Longest accepted id in bytes. Real ones have 25 (BuildKit), 64 (layers, containers)
/// and 69 (a container's `-init` layer) characters.
const MAX_BYTES: usize = 128;

/// Names that the layer store itself uses in its directory.
const RESERVED: [&str; 2] = ["l", "cvmfs"];

/// The id of a layer, safe as the name of a directory: letters, digits, `-`, `_` and
/// `.`, not beginning with a dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(String);

/// A text that is no layer id; holds the text, shortened.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a layer id: letters, digits, '-', '_' and '.', not beginning with a dot")]
pub struct InvalidLayerId(String);

impl LayerId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LayerId {
    type Err = InvalidLayerId;

    fn from_str(text: &str) -> Result<Self, InvalidLayerId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let valid = !text.is_empty()
            && text.len() <= MAX_BYTES
            && text.bytes().all(allowed)
            && !text.starts_with('.')
            && !RESERVED.contains(&text);
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidLayerId(text.chars().take(MAX_BYTES).collect()))
        }
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ids_of_all_engines_are_accepted() {
        let layer = "be08917b20fdc9735bc12399d2a1052568223cf17a3862bf23fb2e28691c91d2";
        for id in [layer, &format!("{layer}-init"), "0uw8x1p0f7l8ifxt9tua4pizr"] {
            assert_eq!(id.parse::<LayerId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn nothing_that_could_leave_or_hide_in_the_store_is_an_id() {
        let long = "a".repeat(MAX_BYTES + 1);
        for id in
            ["", ".", "..", "a/b", "../a", "/", "l", "cvmfs", ".creating-a", "a\0", "a\n", "a:b", "ä", &long]
        {
            assert!(id.parse::<LayerId>().is_err(), "{id:?}");
        }
    }
}
