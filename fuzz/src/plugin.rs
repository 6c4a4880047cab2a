//! What an engine asks the plugin.

use graphdriver::layer_id::LayerId;
use graphdriver::options::DriverOptions;
use graphdriver::protocol::{ComparisonRequest, CreateRequest, GetRequest, InitRequest, LayerRequest};

use crate::Target;

/// The bodies of all calls, whichever call they belong to.
pub(crate) const REQUEST: Target = Target {
    name: "plugin_request",
    run: request,
    seeds: || {
        [
            r#"{"Home":"/mnt/cvmfs/graphdriver","Opts":["cvmfsMountMethod=internal","cvmfsCommitTimeout=5"],"UIDMaps":[{"container_id":0,"host_id":100000,"size":65536}],"GIDMaps":null}"#,
            r#"{"ID":"be08917b20fdc9735bc12399d2a1052568223cf17a3862bf23fb2e28691c91d2-init","Parent":"cea223cecafdba1945f8953c8e263483219f8b0243ba4d11fd381a1d0c87a385","StorageOpt":{"size":"1G"}}"#,
            r#"{"ID":"0uw8x1p0f7l8ifxt9tua4pizr","MountLabel":"system_u:object_r:container_file_t:s0:c1,c2"}"#,
            r#"{"id":"a","parent":""}"#,
        ]
        .map(|text| text.as_bytes().to_vec())
        .into()
    },
    words: &[
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "null",
        "\"ID\"",
        "\"Parent\"",
        "../",
        "/",
        "-1",
        "4294967296",
        "\\u0000",
        "l",
        "cvmfs",
    ],
};

fn request(bytes: &[u8]) {
    if let Ok(init) = serde_json::from_slice::<InitRequest>(bytes) {
        let _ = DriverOptions::parse(&init.options).map_err(|error| error.to_string());
        let text = serde_json::to_vec(&init).expect("what came as JSON goes as JSON");
        let again: InitRequest = serde_json::from_slice(&text).expect("what was written is readable");
        assert_eq!(again, init);
    }
    if let Ok(create) = serde_json::from_slice::<CreateRequest>(bytes) {
        stays_inside(&create.id);
        create.parent.iter().for_each(stays_inside);
    }
    if let Ok(layer) = serde_json::from_slice::<LayerRequest>(bytes) {
        stays_inside(&layer.id);
    }
    if let Ok(get) = serde_json::from_slice::<GetRequest>(bytes) {
        stays_inside(&get.id);
    }
    if let Ok(compare) = serde_json::from_slice::<ComparisonRequest>(bytes) {
        stays_inside(&compare.id);
        compare.parent.iter().for_each(stays_inside);
    }
}

/// A layer's id is the name of a directory, and of none that the store has for itself.
fn stays_inside(id: &LayerId) {
    let id = id.as_str();
    assert!(
        !id.is_empty() && !id.starts_with('.') && !id.contains(['/', '\0']) && !["l", "cvmfs"].contains(&id),
        "{id}"
    );
}
