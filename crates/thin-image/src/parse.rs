//! From bytes to [`ThinImage`].
//!
//! The document is walked as a JSON value rather than derived, so that each error can
//! name the entry and the rule in the words of the format.

use serde_json::{Map, Value};

use crate::{
    InvalidDigest, Location, MAX_DESCRIPTOR_BYTES, MAX_LAYERS, ThinImage, ThinImageError, ThinLayer, Version,
};

/// Values quoted in messages are cut here: they are foreign and may be a megabyte long.
const MAX_QUOTED_CHARS: usize = 200;

pub(crate) fn parse(text: &[u8]) -> Result<ThinImage, ThinImageError> {
    descriptor(&document(text)?)
}

/// The JSON document, bounded.
pub(crate) fn document(text: &[u8]) -> Result<Value, ThinImageError> {
    if text.len() > MAX_DESCRIPTOR_BYTES {
        return Err(ThinImageError::TooLarge);
    }
    serde_json::from_slice(text).map_err(ThinImageError::Malformed)
}

/// The descriptor in a JSON document.
pub(crate) fn descriptor(document: &Value) -> Result<ThinImage, ThinImageError> {
    let object = document.as_object().ok_or(ThinImageError::NotADescriptor("it is not an object"))?;
    let version = version(object, "version")?.ok_or(ThinImageError::NotADescriptor("version is missing"))?;
    if version.major > Version::SUPPORTED.major {
        return Err(ThinImageError::TooNew { key: "version", found: version });
    }
    let min_version = self::version(object, "min_version")?;
    if let Some(found) = min_version.filter(|needed| *needed > Version::SUPPORTED) {
        return Err(ThinImageError::TooNew { key: "min_version", found });
    }
    Ok(ThinImage {
        version,
        min_version,
        origin: text(object, "origin")?.map(str::to_owned),
        layers: layers(object)?,
        comment: text(object, "comment")?.map(str::to_owned),
    })
}

fn version(object: &Map<String, Value>, key: &'static str) -> Result<Option<Version>, ThinImageError> {
    text(object, key)?
        .map(|value| value.parse().map_err(|()| ThinImageError::BadVersion { key, value: quoted(value) }))
        .transpose()
}

fn text<'a>(object: &'a Map<String, Value>, key: &'static str) -> Result<Option<&'a str>, ThinImageError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(ThinImageError::NotAString { key }),
    }
}

fn layers(object: &Map<String, Value>) -> Result<Vec<ThinLayer>, ThinImageError> {
    let entries = object
        .get("layers")
        .and_then(Value::as_array)
        .ok_or(ThinImageError::NotADescriptor("layers is missing or not a list"))?;
    if entries.len() > MAX_LAYERS {
        return Err(ThinImageError::TooManyLayers(entries.len()));
    }
    entries.iter().enumerate().map(|(index, entry)| layer(index, entry)).collect()
}

fn layer(index: usize, entry: &Value) -> Result<ThinLayer, ThinImageError> {
    let part =
        |key| entry.get(key).and_then(Value::as_str).ok_or(ThinImageError::MissingInLayer { index, key });
    let (digest, url) = (part("digest")?, part("url")?);
    let location = url.parse::<Location>().map_err(|cause| ThinImageError::BadUrl {
        index,
        value: quoted(url),
        cause,
    })?;
    ThinLayer::new(digest, location)
        .map_err(|InvalidDigest(value)| ThinImageError::BadDigest { index, value: quoted(&value) })
}

fn quoted(value: &str) -> String {
    match value.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{}…", value.get(..end).unwrap_or_default()),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    fn message(text: &str) -> String {
        ThinImage::parse(text.as_bytes()).unwrap_err().to_string()
    }

    fn with_url(url: &str) -> String {
        format!(r#"{{"version":"1.0","layers":[{{"digest":"{DIGEST}","url":"{url}"}}]}}"#)
    }

    #[test]
    fn old_and_unknown_parts_are_read_over() {
        assert!(ThinImage::parse(br#"{"version":"0.1","layers":[]}"#).unwrap().layers.is_empty());
        let later = br#"{"version":"1.7","min_version":"1.0","layers":[],"later":{"x":[1]},"comment":"c"}"#;
        let image = ThinImage::parse(later).unwrap();
        assert_eq!((image.version.minor, image.comment.as_deref()), (7, Some("c")));
    }

    #[test]
    fn the_message_names_the_entry_and_the_rule() {
        assert_eq!(
            message(&with_url("cvmfs://a.b/x/../../etc")),
            r#"thin.json: layer 0: url "cvmfs://a.b/x/../../etc": the path has a '.' or '..' component"#
        );
        assert!(message(&with_url("http://a.b/x")).contains("does not begin with cvmfs://"));
        assert!(message(r#"{"version":"2.0","layers":[]}"#).contains("version 2.0 is newer than 1.0"));
        assert!(
            message(r#"{"version":"1.0","min_version":"1.1","layers":[]}"#)
                .contains("min_version 1.1 is newer")
        );
        assert!(message(r#"{"version":"one","layers":[]}"#).contains(r#"version "one" is not a version"#));
        assert!(message(r#"{"layers":[]}"#).contains("version is missing"));
        assert!(message(r#"{"version":"1.0"}"#).contains("layers is missing"));
        assert!(message("{").contains("not valid JSON"));
        assert!(
            message(r#"{"version":"1.0","layers":[{"digest":"x"}]}"#).contains("layer 0: url is missing")
        );
        assert!(
            message(&with_url("cvmfs://a.b/x").replace(DIGEST, "XYZ")).contains("layer 0: digest \"XYZ\"")
        );
    }

    #[test]
    fn size_and_layer_count_are_bounded() {
        let entry = format!(r#"{{"digest":"{DIGEST}","url":"cvmfs://a.b/x"}}"#);
        let many =
            |n: usize| format!(r#"{{"version":"1.0","layers":[{}]}}"#, vec![entry.as_str(); n].join(","));
        assert_eq!(ThinImage::parse(many(500).as_bytes()).unwrap().layers.len(), 500);
        assert!(message(&many(600)).contains("lists 600 layers"));
        let padded = |n: usize| many(1) + &" ".repeat(n - many(1).len());
        assert!(ThinImage::parse(padded(MAX_DESCRIPTOR_BYTES).as_bytes()).is_ok());
        assert!(message(&padded(2 * MAX_DESCRIPTOR_BYTES)).contains("larger than 1048576 bytes"));
    }

    #[test]
    fn foreign_values_are_cut_in_messages() {
        let long = message(&with_url(&"ü".repeat(100_000)));
        assert!(long.len() < 1000, "{}", long.len());
    }

    fn locations() -> impl Strategy<Value = Location> {
        ("[a-zA-Z0-9_]{1,9}(\\.[a-zA-Z0-9_-]{1,9}){1,3}", "[^/\\p{C}]{1,20}(/[^/\\p{C}]{1,20}){0,4}")
            .prop_filter_map("dots", |(fqrn, path)| Location::new(&fqrn, &path).ok())
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_descriptor_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = ThinImage::parse(&bytes);
        }

        #[test]
        fn any_text_in_a_url_stays_inside_the_repository(url in "\\PC{0,60}") {
            let document = serde_json::json!({"version": "1.0", "layers": [{"digest": DIGEST, "url": format!("cvmfs://{url}")}]});
            if let Ok(image) = ThinImage::parse(document.to_string().as_bytes()) {
                let path = std::path::Path::new(&image.layers[0].location.path);
                prop_assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
            }
        }

        #[test]
        fn what_is_written_is_read_back(
            layers in prop::collection::vec(("[0-9a-f]{64}", locations()), 0..20),
            origin in prop::option::of("\\PC{0,40}"),
            comment in prop::option::of(any::<String>()),
            minor in 0u32..9,
        ) {
            let layers = layers.into_iter().map(|(d, l)| ThinLayer::new(d, l).unwrap()).collect();
            let mut image = ThinImage::new(origin, layers).unwrap();
            image.comment = comment;
            image.version.minor = minor;
            prop_assert_eq!(ThinImage::parse(image.to_json().as_bytes()).unwrap(), image);
        }
    }
}
