//! What tells the converter what to do: wish lists, policies, notifications of registries.

use docker2cvmfs::policy::Policy;
use docker2cvmfs::wishes::{Recipe, notices};

use crate::Target;

/// Wish lists in DUCC's format, and the names and tags in them; notifications.
pub(crate) const WISH_LIST: Target = Target {
    name: "wish_list",
    run: wish_list,
    seeds: || {
        [
            "version: 1\nuser: robot\ncvmfs_repo: u.example.org\noutput_format: '$(scheme)://r.org/thin/$(image)'\n\
             input:\n  - 'https://registry.hub.docker.com/library/centos:7'\n  - \"https://r.org/a/b:21.*\" # all\n",
            "version: 1\ncvmfs_repo: &r u.example.org\ninput: [a, *r, 'b:*-x*', \"c@sha256:00\"]\n",
            r#"{"events":[{"action":"push","target":{"repository":"a/b","tag":"1"}}]}"#,
            r#"{"type":"PUSH_ARTIFACT","event_data":{"resources":[{"tag":"1"}],"repository":{"repo_full_name":"a"}}}"#,
        ]
        .map(|text| text.as_bytes().to_vec())
        .into()
    },
    words: &[
        "version: 1\n",
        "cvmfs_repo: ",
        "input:\n",
        "  - ",
        "'",
        "\"",
        "\n",
        ": ",
        "&a ",
        "*a",
        "<<: ",
        "? ",
        "| ",
        "!!binary ",
        "$(",
        "$(tag)",
        ")",
        "*",
        "@sha256:",
        "{",
        "}",
        "[",
        "]",
        "#",
        "---\n",
        "%YAML",
        "~",
        "\t",
    ],
};

/// Policies in the form of `policy.json`.
pub(crate) const POLICY: Target = Target {
    name: "policy",
    run: policy,
    seeds: || {
        let text = r#"{"default":[{"type":"reject"}],"transports":{"docker":{"r.org/a":[{"type":"digest","digests":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]}],"":[{"type":"sigstoreSigned","keyData":"LS0tLS1CRUdJTiBQVUJMSUMgS0VZLS0tLS0=","signedIdentity":{"type":"exactReference","dockerReference":"r.org/a:1"}}]}}}"#;
        vec![text.as_bytes().to_vec()]
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
        "\"type\"",
        "\"reject\"",
        "\"keyDatas\"",
        "\"matchRepository\"",
    ],
};

fn wish_list(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(recipe) = Recipe::parse(text)
    {
        for wish in &recipe.wishes {
            if let Ok(output) = recipe.output.expand(&wish.reference) {
                assert!(output.to_string().parse::<registry::Reference>().is_ok(), "{output}");
            }
            if let Some(pattern) = &wish.pattern {
                let _ = pattern.matches("21.2.10-slim");
            }
        }
    }
    for notice in notices(bytes).unwrap_or_default() {
        assert!(!notice.repository.is_empty());
    }
}

fn policy(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        // A path in a changed text may name any file of this machine.
        if !text.contains("keyPath") {
            let _ = Policy::parse(text);
        }
    }
}
