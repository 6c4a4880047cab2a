//! Notifications of registries that something was pushed.
//!
//! Three forms are told apart by their shape: Docker's registry (`events`), Harbor
//! (`event_data`), Docker Hub (`push_data`). Whatever they say is only a reason to look;
//! what an image is comes from its registry.

use serde::Deserialize;

/// Most notices taken from one document.
const MAX_NOTICES: usize = 1000;

/// Something that was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Notice {
    /// The repository's name on its registry.
    pub repository: String,
    /// The tag, if one is stated.
    pub tag: Option<String>,
}

/// Reads a notification.
///
/// # Errors
/// What is not one of the three forms.
pub fn notices(body: &[u8]) -> Result<Vec<Notice>, String> {
    #[derive(Deserialize)]
    struct Document {
        events: Option<Vec<DockerEvent>>,
        event_data: Option<HarborData>,
        #[serde(rename = "type")]
        kind: Option<String>,
        push_data: Option<HubPush>,
        repository: Option<HubRepository>,
    }
    #[derive(Deserialize)]
    struct DockerEvent {
        #[serde(default)]
        action: String,
        target: Option<DockerTarget>,
    }
    #[derive(Deserialize)]
    struct DockerTarget {
        #[serde(default)]
        repository: String,
        tag: Option<String>,
    }
    #[derive(Deserialize)]
    struct HarborData {
        #[serde(default)]
        resources: Vec<HarborResource>,
        repository: Option<HarborRepository>,
    }
    #[derive(Deserialize)]
    struct HarborResource {
        tag: Option<String>,
    }
    #[derive(Deserialize)]
    struct HarborRepository {
        repo_full_name: String,
    }
    #[derive(Deserialize)]
    struct HubPush {
        tag: Option<String>,
    }
    #[derive(Deserialize)]
    struct HubRepository {
        repo_name: String,
    }

    let document: Document = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let is_tag = |tag: &String| !tag.is_empty() && !tag.starts_with("sha256:");
    let mut found = Vec::new();
    if let Some(events) = document.events {
        let pushed = events.into_iter().filter(|event| event.action == "push");
        found.extend(
            pushed
                .filter_map(|event| event.target)
                .map(|target| Notice { repository: target.repository, tag: target.tag.filter(is_tag) }),
        );
    } else if let Some(data) = document.event_data {
        let is_push = matches!(document.kind.as_deref(), Some("PUSH_ARTIFACT" | "pushImage" | "REPLICATION"));
        if let (true, Some(repository)) = (is_push, data.repository) {
            let name = repository.repo_full_name;
            found.extend(
                data.resources
                    .into_iter()
                    .map(|resource| Notice { repository: name.clone(), tag: resource.tag.filter(is_tag) }),
            );
        }
    } else if let (Some(push), Some(repository)) = (document.push_data, document.repository) {
        found.push(Notice { repository: repository.repo_name, tag: push.tag.filter(is_tag) });
    } else {
        return Err("neither a notification of a Docker registry, of Harbor, nor of Docker Hub".to_owned());
    }
    found.retain(|notice| !notice.repository.is_empty());
    found.truncate(MAX_NOTICES);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(repository: &str, tag: Option<&str>) -> Notice {
        Notice { repository: repository.to_owned(), tag: tag.map(str::to_owned) }
    }

    #[test]
    fn the_three_forms_are_read() {
        let docker = br#"{"events":[
            {"action":"push","target":{"repository":"team/app","tag":"1","url":"http://r/v2/x"},"request":{"host":"r"}},
            {"action":"pull","target":{"repository":"team/app","tag":"2"}},
            {"action":"push","target":{"repository":"team/app","digest":"sha256:00"}}]}"#;
        assert_eq!(notices(docker).unwrap(), [notice("team/app", Some("1")), notice("team/app", None)]);
        let harbor = br#"{"type":"PUSH_ARTIFACT","occur_at":1680501893,"operator":"admin","event_data":{
            "resources":[{"digest":"sha256:9f","tag":"1.1","resource_url":"harbor/library/nginx:1.1"}],
            "repository":{"name":"nginx","namespace":"library","repo_full_name":"library/nginx","repo_type":"private"}}}"#;
        assert_eq!(notices(harbor).unwrap(), [notice("library/nginx", Some("1.1"))]);
        let hub = br#"{"push_data":{"tag":"latest","pusher":"x"},"repository":{"repo_name":"svendowideit/testhook"}}"#;
        assert_eq!(notices(hub).unwrap(), [notice("svendowideit/testhook", Some("latest"))]);
    }

    #[test]
    fn what_concerns_no_push_says_nothing_and_nonsense_is_refused() {
        let scan = br#"{"type":"SCANNING_COMPLETED","event_data":{"resources":[{"tag":"1"}],
            "repository":{"repo_full_name":"a"}}}"#;
        assert_eq!(notices(scan).unwrap(), []);
        for nonsense in [&b""[..], b"[]", b"{}", b"{\"events\":3}", b"{\"push_data\":{}}"] {
            assert!(notices(nonsense).is_err());
        }
    }
}
