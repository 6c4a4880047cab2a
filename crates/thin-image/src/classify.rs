//! Is a layer thin, ordinary, or to be refused?
//!
//! A file called `thin.json` in an ordinary layer (`COPY thin.json /` is legal) must
//! leave the layer ordinary; a descriptor that somebody wrote and that we cannot honour
//! must stop the pull, because a container on it would start with an empty root.

use serde_json::Value;

use crate::parse::{descriptor, document};
use crate::{ThinImage, ThinImageError};

/// What a layer holds besides the regular file `thin.json` in its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// Nothing, or directories only.
    DescriptorOnly,
    /// At least one other entry that is not a directory (whiteouts count as entries).
    OtherEntries,
}

/// The verdict on a layer.
#[derive(Debug)]
pub enum LayerClass {
    /// Not a thin layer: treat the content as it stands.
    Ordinary,
    /// A thin layer.
    Thin(ThinImage),
    /// Meant as a thin layer, but it breaks a rule: fail with this message.
    Refused(ThinImageError),
}

/// Decides about a layer that has a **regular file** `thin.json` in its root; without
/// one (or with a symbolic link of that name) a layer is ordinary without asking.
///
/// `thin_json` is the file's content; of a larger file pass the first
/// [`MAX_DESCRIPTOR_BYTES`](crate::MAX_DESCRIPTOR_BYTES)` + 1` bytes.
///
/// A layer with other content is ordinary whatever the file says. A sole `thin.json` is
/// refused if it is too large or not JSON at all; ordinary if it is JSON but not a
/// descriptor (some other program's file); refused if it is a descriptor that breaks a
/// rule; else thin.
pub fn classify(contents: Contents, thin_json: &[u8]) -> LayerClass {
    if contents == Contents::OtherEntries {
        return LayerClass::Ordinary;
    }
    let document = match document(thin_json) {
        Ok(document) => document,
        Err(error) => return LayerClass::Refused(error),
    };
    if !is_meant_as_descriptor(&document) {
        return LayerClass::Ordinary;
    }
    descriptor(&document).map_or_else(LayerClass::Refused, LayerClass::Thin)
}

/// A list `layers` next to a text `version`, or with a `cvmfs:` URL in it. Other formats
/// have a list of that name too: map styles, for one, with a number as version.
fn is_meant_as_descriptor(document: &Value) -> bool {
    let Some(layers) = document.get("layers").and_then(Value::as_array) else {
        return false;
    };
    let refers_to_cvmfs =
        |layer: &Value| layer.get("url").and_then(Value::as_str).is_some_and(|url| url.starts_with("cvmfs:"));
    document.get("version").is_some_and(Value::is_string) || layers.iter().any(refers_to_cvmfs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAX_DESCRIPTOR_BYTES;

    fn sole(text: &str) -> LayerClass {
        classify(Contents::DescriptorOnly, text.as_bytes())
    }

    #[test]
    fn a_descriptor_alone_in_its_layer_makes_the_layer_thin() {
        assert!(matches!(sole(r#"{"version":"1.0","layers":[]}"#), LayerClass::Thin(_)));
    }

    #[test]
    fn a_file_of_that_name_among_others_leaves_the_layer_ordinary() {
        for text in [r#"{"version":"1.0","layers":[]}"#, r#"{"version":"9.0","layers":[]}"#, "{"] {
            assert!(matches!(classify(Contents::OtherEntries, text.as_bytes()), LayerClass::Ordinary));
        }
    }

    #[test]
    fn json_of_another_program_leaves_the_layer_ordinary() {
        for text in ["[]", "3", r#"{"version":"1.0"}"#, r#"{"layers":[{"id":"water"}],"version":8}"#] {
            assert!(matches!(sole(text), LayerClass::Ordinary), "{text}");
        }
    }

    #[test]
    fn a_descriptor_that_cannot_be_honoured_is_refused() {
        let unversioned = r#"{"layers":[{"url":"cvmfs://a.b/c"}]}"#;
        let foreign = r#"{"version":"1.0","layers":[{"digest":"00","url":"ftp://a.b/c"}]}"#;
        let large = " ".repeat(MAX_DESCRIPTOR_BYTES + 1);
        for text in [r#"{"version":"2.0","layers":[]}"#, "{ not json", unversioned, foreign, &large] {
            assert!(matches!(sole(text), LayerClass::Refused(_)), "{text:.40}");
        }
    }
}
