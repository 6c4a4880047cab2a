//! What the layer service and the plugin are told of each other.

use bucket::event::created_layers;
use bucket::{LayerKey, LayerServiceConfig};

use crate::Target;

/// `config.json`, event notifications, names of layers.
pub(crate) const DOCUMENTS: Target = Target {
    name: "layer_service",
    run: documents,
    seeds: || {
        let key = "0123456789abcdef".repeat(4);
        let notification = format!(
            r#"{{"EventName":"s3:ObjectCreated:Put","Key":"layers/{key}","Records":[{{"eventName":"s3:ObjectCreated:Put","s3":{{"bucket":{{"name":"layers"}},"object":{{"key":"{key}","size":5}}}}}}]}}"#
        );
        let config = r#"{"AccessKey":"K","AccessSecret":"S3cr3t","Host":"minio.example.org:9000","SSL":false,"CvmfsRepo":"a.example.org","PublishStatusURL":"http://server:3000/status"}"#;
        [notification, config.to_owned(), key].map(String::into_bytes).into()
    },
    words: &[
        "{", "}", "[", "]", "\"", ":", ",", "null", "true", "../", "%2F", "/", "http://", "@", "?", "#",
        "S3cr3t",
    ],
};

fn documents(bytes: &[u8]) {
    match LayerServiceConfig::parse(bytes) {
        Ok(config) => {
            assert!(matches!(config.status_url.scheme(), "http" | "https"));
            assert!(!config.place().contains(char::is_control));
        }
        Err(message) => assert!(message.len() < 5_000, "a message quotes everything"),
    }
    let is_name =
        |key: &LayerKey| key.as_str().len() == 64 && key.as_str().bytes().all(|b| b.is_ascii_hexdigit());
    if let Ok(keys) = created_layers(bytes) {
        assert!(keys.iter().all(is_name));
    }
    if let Ok(Ok(key)) = std::str::from_utf8(bytes).map(str::parse::<LayerKey>) {
        assert!(is_name(&key));
    }
}
