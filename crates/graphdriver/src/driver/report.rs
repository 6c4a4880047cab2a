//! What an operator asks: which containers and images are lazy, and how much of them was fetched.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use thin_image::Location;

use super::Driver;
use crate::layer_id::LayerId;
use crate::repositories::RepositoryStatus;
use crate::store::{Lower, StoreError};

/// State of the driver. Keys that are added later have defaults.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Of the plugin.
    pub version: String,
    /// The driver's directory.
    pub home: String,
    /// `internal` or `external`.
    pub mount_method: String,
    /// The repositories that are mounted.
    pub repositories: Vec<RepositoryReport>,
    /// Containers and thin images.
    pub layers: Vec<LayerReport>,
    /// Layers of normal images, which are on the disk as a whole.
    pub ordinary_layers: usize,
}

/// A mounted repository.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RepositoryReport {
    /// Its name.
    pub fqrn: String,
    /// For people: revision, state, cache, what is wrong.
    pub summary: String,
    /// Layers that are mounted and need it.
    pub users: usize,
    /// Whether its client answers.
    pub answers: bool,
    /// Revision in use.
    pub revision: Option<u64>,
    /// Whether the last look for a newer revision reached a server.
    pub online: Option<bool>,
    /// Whether the kernel reads cache files itself.
    pub passthrough: Option<bool>,
    /// Bytes in the cache, which all repositories share.
    pub cache_used: Option<u64>,
    /// Bytes that the cache may have.
    pub cache_limit: Option<u64>,
    /// Bytes received since its client started.
    pub bytes_fetched: Option<u64>,
    /// Requests sent since then.
    pub requests: Option<u64>,
}

/// Whether the files of a layer are fetched when they are opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lazy {
    /// All below it lies in repositories.
    All,
    /// Some of it does.
    Part,
    /// Nothing does.
    #[default]
    No,
}

/// A container, or the thin layer of an image.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LayerReport {
    /// The layer, as `docker inspect` shows it in `GraphDriver.Data`.
    pub id: String,
    /// `container` or `image`.
    pub kind: String,
    /// Whether it is mounted.
    pub mounted: bool,
    /// Whether its files are fetched when they are opened.
    pub lazy: Lazy,
    /// Why, or why not.
    pub reason: String,
    /// Repositories that it needs.
    pub repositories: Vec<String>,
    /// Plain bytes of its files that were fetched since the clients of its repositories started, for whomever.
    pub bytes_fetched: u64,
    /// Bytes of all its files in repositories, if they are mounted and all its layers were looked into.
    pub bytes: Option<u64>,
}

impl Driver {
    /// State of the driver; never waits for a repository longer than its client takes to answer.
    ///
    /// # Errors
    /// The driver's directory cannot be read. A layer that cannot is left out, with a warning in the log.
    pub fn report(&self) -> Result<Report, StoreError> {
        let statuses = self.repositories.status();
        let mut report = Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            home: self.store.home().display().to_string(),
            mount_method: self.options.mount_method.name().to_owned(),
            repositories: statuses.iter().map(|status| self.repository_report(status)).collect(),
            ..Report::default()
        };
        let traffic: BTreeMap<&str, &RepositoryStatus> =
            statuses.iter().map(|status| (status.fqrn.as_str(), status)).collect();
        let ids = self.store.layers()?;
        for id in &ids {
            match self.layer_report(id, &traffic) {
                Ok(Some(layer)) => report.layers.push(layer),
                Ok(None) => report.ordinary_layers += usize::from(!is_init(id)),
                Err(error) => tracing::warn!(%id, %error, "cannot tell the state of a layer"),
            }
        }
        Ok(report)
    }

    fn repository_report(&self, status: &RepositoryStatus) -> RepositoryReport {
        let client = status.client.as_deref();
        RepositoryReport {
            fqrn: status.fqrn.to_string(),
            summary: status.summary.clone(),
            users: self.repositories.holders(status.fqrn.as_str()),
            answers: client.is_some(),
            revision: client.map(|client| client.revision),
            online: client.map(|client| client.online),
            passthrough: client.map(|client| client.passthrough),
            cache_used: client.map(|client| client.cache_used),
            cache_limit: client.map(|client| client.cache_limit),
            bytes_fetched: client.map(|client| client.bytes_fetched),
            requests: client.map(|client| client.requests),
        }
    }

    /// `None` for what is neither a container nor thin.
    fn layer_report(
        &self,
        id: &LayerId,
        statuses: &BTreeMap<&str, &RepositoryStatus>,
    ) -> Result<Option<LayerReport>, StoreError> {
        let is_container = self.has_init_layer(id);
        if is_init(id) || (!is_container && !self.store.is_thin(id)?) {
            return Ok(None);
        }
        let lowers = self.store.lowers(id)?;
        let mut ordinary = 0;
        let mut locations = Vec::new();
        for lower in &lowers {
            match lower {
                Lower::Layer(below) => ordinary += usize::from(!is_init(below)),
                Lower::Repository(location) => locations.push(location),
            }
        }
        let (lazy, reason) = match (locations.len(), ordinary) {
            (0, _) => (Lazy::No, "its image has no thin layer: all its files were downloaded".to_owned()),
            (lazy, 0) => (Lazy::All, format!("all {lazy} layers lie in repositories")),
            (lazy, ordinary) => {
                (Lazy::Part, format!("{lazy} layers lie in repositories, {ordinary} on this disk"))
            }
        };
        let mut repositories: Vec<String> = locations.iter().map(|location| location.fqrn.clone()).collect();
        repositories.sort();
        repositories.dedup();
        let (bytes_fetched, bytes) = content(&locations, statuses);
        Ok(Some(LayerReport {
            id: id.to_string(),
            kind: if is_container { "container" } else { "image" }.to_owned(),
            mounted: crate::mounts::is_mounted(&self.store.merged_directory(id)),
            lazy,
            reason,
            repositories,
            bytes_fetched,
            bytes,
        }))
    }

    fn has_init_layer(&self, id: &LayerId) -> bool {
        format!("{id}-init").parse().is_ok_and(|init| self.store.exists(&init))
    }
}

fn is_init(id: &LayerId) -> bool {
    id.as_str().ends_with("-init")
}

/// What was fetched of all that lies at these places, and how large it is.
fn content(locations: &[&Location], statuses: &BTreeMap<&str, &RepositoryStatus>) -> (u64, Option<u64>) {
    let (mut fetched, mut bytes) = (0_u64, (!locations.is_empty()).then_some(0_u64));
    for location in locations {
        let client = statuses.get(location.fqrn.as_str()).and_then(|status| status.client.as_deref());
        let place = Path::new("/").join(&location.path);
        let below = client.into_iter().flat_map(|client| &client.layers);
        let mut known = None;
        for (path, layer) in below.filter(|(path, _)| Path::new(path).starts_with(&place)) {
            fetched = fetched.saturating_add(layer.bytes_fetched);
            if Path::new(path) == place {
                known = layer.bytes;
            }
        }
        bytes = bytes.zip(known).map(|(sum, more)| sum.saturating_add(more));
    }
    (fetched, bytes)
}
