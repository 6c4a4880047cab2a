//! The layout that DUCC writes (publisher behaviour §16), beside the layers themselves:
//!
//! ```text
//! .layers/XX/HEX/layerfs/                       the layer (`layout`)
//! .layers/XX/HEX/.metadata/{layers,origin}.json what it is, and which images have it
//! .flat/XX/CONFIG/                              all layers of an image in one tree
//! REGISTRY/REPOSITORY:TAG                       symbolic link to it
//! .metadata/REGISTRY/REPOSITORY:TAG/manifest.json
//! podmanStore/                                  the same for podman (`podman`)
//! ```
//!
//! A flat tree is made from the layers' catalogs: nothing is copied. Chains, which DUCC
//! needs to make flat trees, are not written.

use std::collections::HashMap;

use registry::{Platform, Reference};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::apptainer;
use super::ingest::Ingest;
use super::members::{Member, Members};
use super::plan::{Plan, PlannedImage, PlannedLayer};
use super::podman::{self, PodmanStore};
use crate::failure::ConvertError;
use crate::published::Published;
use crate::spool::Verified;

/// Begins the paths of the manifests; the name of the image follows.
pub(crate) const METADATA: &str = "/.metadata/";
/// Makes its directory a nested catalog.
const CATALOG: &str = ".cvmfscatalog";
/// Largest accepted list of images that have a layer.
const MAX_ORIGIN_BYTES: u64 = 16 << 20;
/// Largest accepted description of a layer.
const MAX_DESCRIPTION_BYTES: u64 = 1 << 20;

/// What one transaction writes of this layout.
pub(crate) struct Unpacked {
    /// The revision that the transaction began with.
    published: Published,
    /// Back references that this transaction has written already, by their path.
    /// `None` for one that is not to be touched.
    origins: HashMap<String, Option<Origin>>,
    /// What layers are, by their paths: as the revision describes them, or as this transaction has found out.
    descriptions: HashMap<String, Description>,
    podman: Option<PodmanStore>,
}

/// What a layer unpacks to.
#[derive(Debug, Clone)]
struct Description {
    diff_id: String,
    /// In bytes, if it is known.
    size: Option<u64>,
}

/// The images that a layer belongs to, by the digests of their configurations.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Origin {
    #[serde(default)]
    origin: Vec<String>,
}

impl Unpacked {
    /// For a transaction that began with the revision `published`.
    pub(crate) fn new(mut published: Published) -> Result<Self, ConvertError> {
        let podman = PodmanStore::read(&mut published)?;
        Ok(Self { published, origins: HashMap::new(), descriptions: HashMap::new(), podman })
    }

    /// Writes what belongs to an image whose layers are in the transaction or were there
    /// before. `verified` are those that were unpacked.
    pub(crate) fn write(
        &mut self,
        plan: &Plan,
        ingest: &mut Ingest<'_>,
        verified: &Verified,
    ) -> Result<(), ConvertError> {
        let mut members = Members::default();
        for image in &plan.images {
            self.check_layers(plan, image, verified)?;
            for layer in &image.layers {
                self.describe_layer(image, layer, ingest, &mut members)?;
            }
            write_flat(image, ingest, &mut members)?;
        }
        if let (Some(name), Some(image)) = (name(plan), representative(plan)) {
            members.add(
                &format!(".metadata/{name}/manifest.json"),
                Member::File(image.image.image.manifest_bytes.clone()),
            );
            members.add(&name, Member::Link(link_target(&name, image)));
            if let Some(podman) = &mut self.podman {
                add_catalog(podman::STORE, ingest, &mut members)?;
                podman::files(image, &mut members);
                ingest.members("", &members)?;
                let size = |layer: &PlannedLayer| self.descriptions.get(&layer.path())?.size;
                podman.add(image, &name, &image.layers.iter().map(size).collect::<Vec<_>>());
                return Ok(());
            }
        }
        ingest.members("", &members)
    }

    /// The configuration of an image says what its layers unpack to. That is verified when a layer is unpacked; of one
    /// that was there, it has to be what was found out then.
    fn check_layers(
        &mut self,
        plan: &Plan,
        image: &PlannedImage,
        verified: &Verified,
    ) -> Result<(), ConvertError> {
        for layer in &image.layers {
            let path = layer.path();
            let said = layer.diff_id.to_string();
            if !self.descriptions.contains_key(&path) {
                // Unpacked just now, or by who described it.
                let new = verified
                    .get(&path)
                    .map(|(diff_id, size)| Description { diff_id: diff_id.to_string(), size: Some(*size) });
                if let Some(described) = self.published_description(layer)?.or(new) {
                    self.descriptions.insert(path.clone(), described);
                }
            }
            if let Some(found) = self.descriptions.get(&path)
                && found.diff_id != said
                && is_comparable(&found.diff_id, &said)
            {
                return Err(ConvertError::Unsuitable {
                    image: plan.resolved.source.name().to_string(),
                    reason: format!(
                        "says that its layer {} unpacks to {said}, but that unpacks to {}; if the repository is wrong, \
                         delete {path} from it and convert again",
                        layer.blob.digest, found.diff_id
                    ),
                });
            }
        }
        Ok(())
    }

    /// What the revision says of a layer.
    fn published_description(&mut self, layer: &PlannedLayer) -> Result<Option<Description>, ConvertError> {
        let path = format!("/{}/layers.json", metadata(layer));
        let bytes = self.published.file(&path, MAX_DESCRIPTION_BYTES)?;
        let document: Option<Value> = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok(document.and_then(|document| {
            let layer = document.get(0)?;
            let diff_id = layer.get("diff-digest")?.as_str()?.to_owned();
            Some(Description { diff_id, size: layer.get("diff-size").and_then(Value::as_u64) })
        }))
    }

    /// Writes what all images share, after the last of them.
    pub(crate) fn finish(&self, ingest: &mut Ingest<'_>) -> Result<(), ConvertError> {
        match &self.podman {
            Some(podman) => podman.write(ingest),
            None => Ok(()),
        }
    }

    fn describe_layer(
        &mut self,
        image: &PlannedImage,
        layer: &PlannedLayer,
        ingest: &mut Ingest<'_>,
        members: &mut Members,
    ) -> Result<(), ConvertError> {
        let hex = layer.blob.digest.hex();
        let shard = hex.get(..2).unwrap_or_default();
        add_catalog(".layers", ingest, members)?;
        add_catalog(&format!(".layers/{shard}"), ingest, members)?;
        let metadata = metadata(layer);
        let described = format!("{metadata}/layers.json");
        // What nobody has verified is not said.
        if let Some(known) = self.descriptions.get(&layer.path())
            && !ingest.exists(&format!("/{described}"))?
        {
            // As DUCC has it where it does not know.
            let size = known.size.and_then(|size| i64::try_from(size).ok());
            let document = json!([{
                "id": layer.diff_id.hex(),
                "created": image.image.config.document.get("created"),
                "compressed-diff-digest": layer.blob.digest.to_string(),
                "compressed-size": layer.blob.size,
                "diff-digest": layer.diff_id.to_string(),
                "diff-size": size.unwrap_or(-1),
            }]);
            members.add(&described, Member::File(document.to_string().into_bytes()));
        }
        let path = format!("{metadata}/origin.json");
        if !self.origins.contains_key(&path) {
            let origin = self.published.document(&format!("/{path}"), MAX_ORIGIN_BYTES)?;
            self.origins.insert(path.clone(), origin);
        }
        let Some(Some(origin)) = self.origins.get_mut(&path) else { return Ok(()) };
        let id = image.image.image.manifest.config.digest.to_string();
        if !origin.origin.contains(&id) {
            origin.origin.push(id);
            let text = serde_json::to_vec(origin).expect("a list of strings always has a JSON form");
            members.add(&path, Member::File(text));
        }
        Ok(())
    }
}

/// Whether all of it is in a revision, and as it should be.
pub(super) fn is_current(plan: &Plan, published: &mut Published) -> Result<bool, ConvertError> {
    for image in &plan.images {
        if !published.has_directory(&format!("/{}", flat_path(image)))? {
            return Ok(false);
        }
    }
    let (Some(name), Some(image)) = (name(plan), representative(plan)) else { return Ok(true) };
    if !published.has_directory(&format!("/{}", podman::directory(image)))?
        && PodmanStore::read(published)?.is_some()
    {
        return Ok(false);
    }
    let manifest = &image.image.image.manifest_bytes;
    let written = published.file(&format!("/.metadata/{name}/manifest.json"), manifest.len() as u64)?;
    Ok(written.as_ref() == Some(manifest)
        && published.symlink(&format!("/{name}"))? == Some(link_target(&name, image)))
}

/// What goes when the image goes, absolute paths. The layers are not among them.
pub(super) fn paths(plan: &Plan) -> Vec<String> {
    let mut paths: Vec<String> = plan.images.iter().map(|image| format!("/{}", flat_path(image))).collect();
    if let Some(name) = name(plan) {
        paths.push(format!("/{name}"));
        paths.push(format!("{METADATA}{name}"));
    }
    paths
}

/// A tree of all layers, by their catalogs.
fn write_flat(
    image: &PlannedImage,
    ingest: &mut Ingest<'_>,
    members: &mut Members,
) -> Result<(), ConvertError> {
    let flat = flat_path(image);
    if ingest.exists(&format!("/{flat}"))? {
        return Ok(());
    }
    add_catalog(".flat", ingest, members)?;
    let layers: Vec<String> = image.layers.iter().map(PlannedLayer::path).collect();
    ingest.stack(&flat, &layers)?;
    if ingest.exists(&format!("/{flat}/{}", apptainer::DIRECTORY))? {
        return Ok(());
    }
    let added = ingest.members(&flat, &apptainer::members(&image.image.config.document));
    if added.is_err() && ingest.is_sound() {
        // Half a tree would be taken for a whole one the next time.
        ingest.remove(&format!("/{flat}"))?;
    }
    added
}

fn add_catalog(directory: &str, ingest: &mut Ingest<'_>, members: &mut Members) -> Result<(), ConvertError> {
    let path = format!("{directory}/{CATALOG}");
    if !ingest.exists(&format!("/{path}"))? {
        members.add(&path, Member::File(Vec::new()));
    }
    Ok(())
}

/// Whether two digests are of one algorithm.
fn is_comparable(one: &str, other: &str) -> bool {
    one.split(':').next() == other.split(':').next()
}

/// The directory that says what a layer is, from the repository's root.
fn metadata(layer: &PlannedLayer) -> String {
    let hex = layer.blob.digest.hex();
    format!(".layers/{}/{hex}/.metadata", hex.get(..2).unwrap_or_default())
}

fn flat_path(image: &PlannedImage) -> String {
    let id = image.image.image.manifest.config.digest.hex();
    format!(".flat/{}/{id}", id.get(..2).unwrap_or_default())
}

/// The image that the name leads to: this machine's, else the first.
fn representative(plan: &Plan) -> Option<&PlannedImage> {
    let host = Platform::host();
    let fits = |image: &&PlannedImage| {
        let platform = image.image.platform();
        platform.os == host.os && platform.architecture == host.architecture
    };
    plan.images.iter().find(fits).or(plan.images.first())
}

/// The name in the repository; local images without a name have none.
fn name(plan: &Plan) -> Option<String> {
    let Reference { registry, repository, tag, digest, .. } = plan.resolved.source.reference()?;
    let selector = match (tag, digest) {
        (Some(tag), _) => format!(":{tag}"),
        (None, Some(digest)) => format!("@{digest}"),
        (None, None) => ":latest".to_owned(),
    };
    Some(format!("{registry}/{repository}{selector}"))
}

fn link_target(name: &str, image: &PlannedImage) -> String {
    format!("{}{}", "../".repeat(name.matches('/').count()), flat_path(image))
}
