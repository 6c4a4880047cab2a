//! Event notifications of S3 stores: which objects were created (thin images §7.2).

use serde::Deserialize;

use crate::layers::LayerKey;

/// A notification, as far as it is read. Names are those of the S3 event structure.
#[derive(Deserialize)]
struct Notification {
    #[serde(rename = "Records", default)]
    records: Vec<Record>,
}

#[derive(Deserialize)]
struct Record {
    #[serde(rename = "eventName", default)]
    event: String,
    s3: Entity,
}

#[derive(Deserialize)]
struct Entity {
    object: Object,
}

#[derive(Deserialize)]
struct Object {
    key: String,
}

/// The layers that a notification names. Other objects and events are not ours; that a layer is in our bucket is
/// seen when it is fetched.
///
/// # Errors
/// What is no notification.
pub fn created_layers(body: &[u8]) -> Result<Vec<LayerKey>, serde_json::Error> {
    let notification: Notification = serde_json::from_slice(body)?;
    let is_creation = |record: &Record| record.event.is_empty() || record.event.contains("ObjectCreated:");
    // Keys are URL-encoded, which changes none of ours but the slashes of a prefix.
    let name = |key: &str| key.rsplit(['/', '%']).next().map(|name| name.trim_start_matches("2F").to_owned());
    let created = notification.records.iter().filter(|record| is_creation(record));
    Ok(created.filter_map(|record| name(&record.s3.object.key)?.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(event: &str, key: &str) -> String {
        format!(
            r#"{{"EventName":"{event}","Key":"layers/{key}","Records":[{{"eventVersion":"2.0","eventName":"{event}",
            "s3":{{"bucket":{{"name":"layers"}},"object":{{"key":"{key}","size":5}}}}}}]}}"#
        )
    }

    #[test]
    fn layers_that_were_stored_are_named() {
        let key = "2f".repeat(32);
        let found = |body: String| created_layers(body.as_bytes()).unwrap();
        assert_eq!(found(body("s3:ObjectCreated:Put", &key)), [key.parse().unwrap()]);
        assert_eq!(
            found(body("s3:ObjectCreated:CompleteMultipartUpload", &format!("some%2F{key}"))).len(),
            1
        );
        assert_eq!(found(body("s3:ObjectCreated:Put", &format!("some/{key}"))).len(), 1);
        assert!(found(body("s3:ObjectRemoved:Delete", &key)).is_empty());
        assert!(found(body("s3:ObjectCreated:Put", "../../etc/passwd")).is_empty());
        // The short form of the original's documentation.
        let short = format!(
            r#"{{"EventType":"s3:ObjectCreated:Put","Records":[{{"s3":{{"bucket":{{"name":"layers"}},"object":{{"key":"{key}"}}}}}}]}}"#
        );
        assert_eq!(found(short).len(), 1);
        assert!(found("{}".to_owned()).is_empty());
        assert!(created_layers(b"[1]").is_err() && created_layers(b"").is_err());
    }
}
