//! Messages of the plugin protocol (graph driver plugin §4 and §5).
//!
//! Requests are parsed into types here and nowhere else. Engines leave out fields with
//! empty values; unknown fields are ignored in both directions.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::layer_id::LayerId;

/// `GraphDriver.Init`. Kept on disk in this very form, for the next process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitRequest {
    /// Directory of the layer store as the plugin sees it.
    #[serde(rename = "Home")]
    pub home: String,
    /// `KEY=VALUE` from the engine's `storage-opts`.
    #[serde(rename = "Opts", default, deserialize_with = "null_as_default")]
    pub options: Vec<String>,
    /// User ids of the engine's user namespace; empty without one.
    #[serde(rename = "UIDMaps", default, deserialize_with = "null_as_default")]
    pub uid_maps: Vec<IdMapEntry>,
    /// Group ids of the engine's user namespace; empty without one.
    #[serde(rename = "GIDMaps", default, deserialize_with = "null_as_default")]
    pub gid_maps: Vec<IdMapEntry>,
}

/// A range of ids: `container_id + i` is `host_id + i` on the host for `i` below `size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapEntry {
    /// First id in the container.
    pub container_id: u32,
    /// First id on the host.
    pub host_id: u32,
    /// Number of ids.
    pub size: u32,
}

/// `Create` and `CreateReadWrite`.
#[derive(Debug, Deserialize)]
pub struct CreateRequest {
    /// The new layer.
    #[serde(rename = "ID", deserialize_with = "layer_id")]
    pub id: LayerId,
    /// The layer below it.
    #[serde(rename = "Parent", default, deserialize_with = "optional_layer_id")]
    pub parent: Option<LayerId>,
    /// Options of this one layer, `size` for instance.
    #[serde(rename = "StorageOpt", default, deserialize_with = "null_as_default")]
    pub storage_options: BTreeMap<String, String>,
}

/// Calls about one layer: `Remove`, `Put`, `Exists`, `GetMetadata`.
#[derive(Debug, Deserialize)]
pub struct LayerRequest {
    /// The layer.
    #[serde(rename = "ID", deserialize_with = "layer_id")]
    pub id: LayerId,
}

/// `Get`.
#[derive(Debug, Deserialize)]
pub struct GetRequest {
    /// The layer.
    #[serde(rename = "ID", deserialize_with = "layer_id")]
    pub id: LayerId,
    /// Security context of all its files.
    #[serde(rename = "MountLabel", default, deserialize_with = "null_as_default")]
    pub mount_label: String,
}

/// Calls that compare a layer with another one: `Diff`, `Changes`, `DiffSize`, and the
/// query of `ApplyDiff`.
#[derive(Debug, Deserialize)]
pub struct ComparisonRequest {
    /// The layer.
    #[serde(rename = "ID", alias = "id", deserialize_with = "layer_id")]
    pub id: LayerId,
    /// What it is compared with, nothing for an empty tree.
    #[serde(rename = "Parent", alias = "parent", default, deserialize_with = "optional_layer_id")]
    pub parent: Option<LayerId>,
}

/// A call without arguments: `{}`.
#[derive(Debug, Deserialize)]
pub struct NoArguments {}

/// Success without a value.
#[derive(Debug, Serialize)]
pub struct Done {}

/// Any failure.
#[derive(Debug, Serialize)]
pub struct Failed {
    /// What the user of the engine reads.
    #[serde(rename = "Err")]
    pub error: String,
}

/// Answer to `/Plugin.Activate`.
#[derive(Debug, Serialize)]
pub struct Activated {
    /// The plugin's protocols.
    #[serde(rename = "Implements")]
    pub implements: [&'static str; 1],
}

/// Answer to `Capabilities`.
#[derive(Debug, Serialize)]
pub struct Capable {
    /// The driver's capabilities.
    #[serde(rename = "Capabilities")]
    pub capabilities: Capabilities,
}

/// What an engine may rely upon.
#[derive(Debug, Serialize)]
pub struct Capabilities {
    /// Whether `Diff` gives the bytes that came with `ApplyDiff`. It does not, and an
    /// engine that believed it could not push images that were made elsewhere (§8).
    #[serde(rename = "ReproducesExactDiffs")]
    pub reproduces_exact_diffs: bool,
}

/// Answer to `Get`.
#[derive(Debug, Serialize)]
pub struct Directory {
    /// Where the layer's tree is, a path below `Home`.
    #[serde(rename = "Dir")]
    pub path: String,
}

/// Answer to `Exists`.
#[derive(Debug, Serialize)]
pub struct Existence {
    /// Whether the layer exists.
    #[serde(rename = "Exists")]
    pub exists: bool,
}

/// Answer to `Status`.
#[derive(Debug, Serialize)]
pub struct StatusRows {
    /// Rows of `docker info`, in order: name and value.
    #[serde(rename = "Status")]
    pub rows: Vec<(String, String)>,
}

/// Answer to `GetMetadata`.
#[derive(Debug, Serialize)]
pub struct Metadata {
    /// Shown by `docker inspect` as `GraphDriver.Data`.
    #[serde(rename = "Metadata")]
    pub values: BTreeMap<&'static str, String>,
}

/// Answer to `Changes`.
#[derive(Debug, Serialize)]
pub struct Changes {
    /// Sorted by path.
    #[serde(rename = "Changes")]
    pub changes: Vec<Change>,
}

/// One changed path.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct Change {
    /// From the layer's root, with a slash in front.
    #[serde(rename = "Path")]
    pub path: String,
    /// 0 modified, 1 added, 2 deleted.
    #[serde(rename = "Kind")]
    pub kind: u8,
}

/// Answer to `ApplyDiff` and `DiffSize`.
#[derive(Debug, Serialize)]
pub struct Size {
    /// Bytes in regular files, each inode once.
    #[serde(rename = "Size")]
    pub bytes: u64,
}

/// Go writes empty lists, maps and texts as `null`.
fn null_as_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    value: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(value)?.unwrap_or_default())
}

fn layer_id<'de, D: Deserializer<'de>>(value: D) -> Result<LayerId, D::Error> {
    String::deserialize(value)?.parse().map_err(de::Error::custom)
}

fn optional_layer_id<'de, D: Deserializer<'de>>(value: D) -> Result<Option<LayerId>, D::Error> {
    match Option::<String>::deserialize(value)?.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_s_null_and_absent_fields_are_empty_values() {
        let init: InitRequest =
            serde_json::from_str(r#"{"Home":"/h","Opts":null,"UIDMaps":null,"GIDMaps":null}"#).unwrap();
        assert!(init.options.is_empty() && init.uid_maps.is_empty());
        let create: CreateRequest = serde_json::from_str(r#"{"ID":"a","StorageOpt":null}"#).unwrap();
        assert!(create.parent.is_none() && create.storage_options.is_empty());
    }

    #[test]
    fn id_maps_use_snake_case_keys() {
        let text = r#"{"Home":"/h","UIDMaps":[{"container_id":0,"host_id":100000,"size":65536}]}"#;
        let init: InitRequest = serde_json::from_str(text).unwrap();
        assert_eq!(init.uid_maps, [IdMapEntry { container_id: 0, host_id: 100_000, size: 65536 }]);
    }

    #[test]
    fn a_call_about_a_layer_without_an_id_or_with_a_path_is_refused() {
        assert!(serde_json::from_str::<LayerRequest>("{}").is_err());
        assert!(serde_json::from_str::<LayerRequest>(r#"{"ID":"../x"}"#).is_err());
        assert!(serde_json::from_str::<CreateRequest>(r#"{"ID":"a","Parent":"/"}"#).is_err());
    }
}
