//! The additional image store for podman that DUCC's layout has (podman §2):
//!
//! ```text
//! podmanStore/overlay/LAYER/{diff,link,lower}   link to .layers/XX/HEX/layerfs, short name, short names of parents
//! podmanStore/overlay/l/SHORT                   link to ../LAYER/diff
//! podmanStore/overlay-layers/layers.json        what the layers are
//! podmanStore/overlay-images/images.json        what the images are, by name
//! podmanStore/overlay-images/IMAGE/{manifest,=…}
//! ```
//!
//! DUCC names a layer by its diff id alone, so that a layer on two parents has the one that came last. Here the name
//! follows from the blobs of the layer and of all below it: what a name leads to never changes, and no configuration can
//! claim the name of another image's layer. Layers that DUCC wrote stay as they are.

use std::collections::{BTreeSet, HashMap, HashSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::ingest::Ingest;
use super::members::{Member, Members};
use super::plan::{PlannedImage, PlannedLayer};
use crate::failure::ConvertError;
use crate::published::Published;

/// The directory of the store.
pub(super) const STORE: &str = "podmanStore";
const LAYERS: &str = "podmanStore/overlay-layers/layers.json";
const IMAGES: &str = "podmanStore/overlay-images/images.json";
/// podman only opens them, and refuses a store without them.
const LOCKS: [&str; 2] = ["podmanStore/overlay-layers/layers.lock", "podmanStore/overlay-images/images.lock"];
/// Largest index that is read; podman reads both at each command.
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// What podman writes for an image that does not say when it was made.
const NO_TIME: &str = "1970-01-01T00:00:00Z";

/// The store as a transaction changes it.
#[derive(Debug, Default)]
pub(crate) struct PodmanStore {
    layers: Vec<Map<String, Value>>,
    images: Vec<Map<String, Value>>,
    is_changed: bool,
}

impl PodmanStore {
    /// The store of a revision; empty if it has none. `None` if it cannot be understood: it is left alone then, for
    /// others rely on it.
    pub(crate) fn read(published: &mut Published) -> Result<Option<Self>, ConvertError> {
        let mut read = |path: &str| published.document(&format!("/{path}"), MAX_INDEX_BYTES);
        let (layers, images) = (read(LAYERS)?, read(IMAGES)?);
        Ok(layers.zip(images).map(|(layers, images)| Self { layers, images, is_changed: false }))
    }

    /// Enters an image whose files ([`files`]) are there under `name`, which no other image has then. `sizes` are the
    /// uncompressed bytes of its layers, as far as they are known.
    pub(super) fn add(&mut self, image: &PlannedImage, name: &str, sizes: &[Option<u64>]) {
        self.is_changed = true;
        let chain = chain(&image.layers);
        let mut parent = None;
        for ((layer, id), size) in image.layers.iter().zip(&chain).zip(sizes) {
            if !self.layers.iter().any(|known| text(known, "id") == id) {
                self.layers.push(described(layer, id, parent, &created(image), *size));
            }
            parent = Some(id);
        }
        self.enter(image, name, parent);
    }

    fn enter(&mut self, image: &PlannedImage, name: &str, top: Option<&String>) {
        for other in &mut self.images {
            if let Some(Value::Array(names)) = other.get_mut("names") {
                names.retain(|known| known != name);
            }
        }
        let id = id_of(image);
        let config = image.image.image.manifest.config.digest.to_string();
        let manifest = image.image.image.digest.to_string();
        let sizes = (image.image.image.manifest_bytes.len(), image.image.config_bytes.len());
        let entry = json!({
            "id": id,
            "digest": manifest,
            "names": [name],
            "layer": top,
            "metadata": "{}",
            "big-data-names": ["manifest", config],
            "big-data-sizes": {"manifest": sizes.0, &config: sizes.1},
            "big-data-digests": {"manifest": manifest, &config: config},
            "created": created(image),
        });
        let mut entry = object(entry).unwrap_or_default();
        let known = self.images.iter().position(|known| text(known, "id") == id);
        if let Some(known) = known.map(|index| self.images.remove(index))
            && let (Some(Value::Array(names)), Some(Value::Array(others))) =
                (entry.get_mut("names"), known.get("names"))
        {
            names.splice(0..0, others.iter().cloned());
        }
        self.images.push(entry);
    }

    /// Takes names out, and images by the hexadecimal digests of their configurations or of blobs that they need, with
    /// the layers that no other image has.
    pub(crate) fn remove(
        &mut self,
        names: &BTreeSet<&str>,
        ids: &HashSet<String>,
        blobs: &HashSet<String>,
        ingest: &mut Ingest<'_>,
    ) -> Result<(), ConvertError> {
        let ids: HashSet<String> = ids.iter().cloned().chain(self.images_on(blobs)).collect();
        for image in &mut self.images {
            if let Some(Value::Array(known)) = image.get_mut("names") {
                let before = known.len();
                known.retain(|name| name.as_str().is_none_or(|name| !names.contains(name)));
                self.is_changed |= known.len() < before;
            }
        }
        let (gone, stay): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.images).into_iter().partition(|image| ids.contains(text(image, "id")));
        self.images = stay;
        if gone.is_empty() {
            return Ok(());
        }
        self.is_changed = true;
        for image in gone.iter().filter(|image| is_id(text(image, "id"))) {
            ingest.remove(&format!("/{}", image_directory(text(image, "id"))))?;
        }
        let parents: HashMap<&str, &str> =
            self.layers.iter().map(|layer| (text(layer, "id"), text(layer, "parent"))).collect();
        let below = |images: &[Map<String, Value>]| {
            let mut found = HashSet::new();
            for image in images {
                let mut layer = text(image, "layer");
                while !layer.is_empty() && found.insert(layer.to_owned()) {
                    layer = parents.get(layer).copied().unwrap_or_default();
                }
            }
            found
        };
        let used = below(&self.images);
        // Only what these images had: others may keep layers here for reasons of their own.
        let unused: HashSet<String> = below(&gone).into_iter().filter(|id| !used.contains(id)).collect();
        for id in unused.iter().filter(|id| is_id(id)) {
            ingest.remove(&format!("/{STORE}/overlay/{id}"))?;
            ingest.remove(&format!("/{STORE}/overlay/l/{}", short_name(id)))?;
        }
        self.layers.retain(|layer| !unused.contains(text(layer, "id")));
        Ok(())
    }

    /// The images of which a layer is one of these blobs: an image can come with other blobs under another name.
    fn images_on(&self, blobs: &HashSet<String>) -> Vec<String> {
        let layers: HashMap<&str, &Map<String, Value>> =
            self.layers.iter().map(|layer| (text(layer, "id"), layer)).collect();
        let stands = |image: &&Map<String, Value>| {
            let mut seen = HashSet::new();
            let mut id = text(image, "layer");
            while seen.insert(id)
                && let Some(layer) = layers.get(id)
            {
                let blob = text(layer, "compressed-diff-digest");
                if blob.split_once(':').is_some_and(|(_, hex)| blobs.contains(hex)) {
                    return true;
                }
                id = text(layer, "parent");
            }
            false
        };
        self.images.iter().filter(stands).map(|image| text(image, "id").to_owned()).collect()
    }

    /// Writes the indexes, if anything changed.
    pub(crate) fn write(&self, ingest: &mut Ingest<'_>) -> Result<(), ConvertError> {
        if !self.is_changed {
            return Ok(());
        }
        let mut members = Members::default();
        for (path, index) in [(LAYERS, &self.layers), (IMAGES, &self.images)] {
            let text = serde_json::to_vec(index).expect("JSON objects always have a JSON form");
            members.add(path, Member::File(text));
        }
        ingest.members("", &members)
    }
}

/// What an image has in the store beside its entries in the indexes.
pub(super) fn files(image: &PlannedImage, members: &mut Members) {
    let chain = chain(&image.layers);
    for (index, (layer, id)) in image.layers.iter().zip(&chain).enumerate() {
        let directory = format!("{STORE}/overlay/{id}");
        members.add(&format!("{directory}/diff"), Member::Link(format!("../../..{}", layer.path())));
        members.add(&format!("{directory}/link"), Member::File(short_name(id).into_bytes()));
        // The kernel stacks no directory twice, and what is there twice shows nothing more.
        let mut paths = HashSet::from([layer.path()]);
        let below = image.layers.iter().zip(&chain).take(index).rev();
        let below = below.filter(|(layer, _)| paths.insert(layer.path()));
        let below = below.map(|(_, id)| format!("l/{}", short_name(id)));
        let below = below.collect::<Vec<_>>().join(":");
        if !below.is_empty() {
            members.add(&format!("{directory}/lower"), Member::File(below.into_bytes()));
        }
        let short = format!("{STORE}/overlay/l/{}", short_name(id));
        members.add(&short, Member::Link(format!("../{id}/diff")));
    }
    let directory = directory(image);
    let manifest = image.image.image.manifest_bytes.clone();
    members.add(&format!("{directory}/manifest"), Member::File(manifest));
    let config = STANDARD.encode(image.image.image.manifest.config.digest.to_string());
    members.add(&format!("{directory}/={config}"), Member::File(image.image.config_bytes.clone()));
    for lock in LOCKS {
        members.add(lock, Member::File(Vec::new()));
    }
}

/// The directory of an image, which is there if and only if the indexes have it; from the repository's root.
pub(super) fn directory(image: &PlannedImage) -> String {
    image_directory(id_of(image))
}

fn text<'a>(entry: &'a Map<String, Value>, key: &str) -> &'a str {
    entry.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// When the image was made, in the form that podman reads: it reads no index with another form in it.
fn created(image: &PlannedImage) -> String {
    let said = image.image.config.document.get("created").and_then(Value::as_str).unwrap_or_default();
    let time = OffsetDateTime::parse(said, &Rfc3339).ok().and_then(|time| time.format(&Rfc3339).ok());
    time.unwrap_or_else(|| NO_TIME.to_owned())
}

/// Whether something has the form of an id, and so of a name of one directory.
fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The hexadecimal digest of the configuration.
fn id_of(image: &PlannedImage) -> &str {
    image.image.image.manifest.config.digest.hex()
}

fn image_directory(id: &str) -> String {
    format!("{STORE}/overlay-images/{id}")
}

fn described(
    layer: &PlannedLayer,
    id: &str,
    parent: Option<&String>,
    created: &str,
    size: Option<u64>,
) -> Map<String, Value> {
    let mut described = object(json!({
        "id": id,
        "created": created,
        "compressed-diff-digest": layer.blob.digest.to_string(),
        "compressed-size": layer.blob.size,
        "diff-digest": layer.diff_id.to_string(),
        // podman adds them up for `podman images`, and does not list an image without them. At least so many.
        "diff-size": size.unwrap_or(layer.blob.size),
    }))
    .unwrap_or_default();
    if let Some(parent) = parent {
        described.insert("parent".to_owned(), parent.as_str().into());
    }
    described
}

fn object(value: Value) -> Option<Map<String, Value>> {
    match value {
        Value::Object(map) => Some(map),
        _ => None,
    }
}

/// The id of each layer: a digest of the blobs up to it.
fn chain(layers: &[PlannedLayer]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(layers.len());
    for layer in layers {
        let below = chain.last().map(String::as_str).unwrap_or_default();
        chain.push(hex::encode(Sha256::digest(format!("{below} {}", layer.blob.digest))));
    }
    chain
}

/// The name by which a mount's options call a layer: 26 characters, the first 130 bits of a digest of its id.
fn short_name(id: &str) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let digest = Sha256::digest(id);
    let bit = |index: usize| digest.get(index / 8).is_some_and(|byte| byte >> (7 - index % 8) & 1 == 1);
    let letter =
        |place: usize| (0..5).fold(0, |value, index| value << 1 | usize::from(bit(place * 5 + index)));
    (0..26).map(|place| char::from(LETTERS[letter(place)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_have_the_length_and_letters_that_podman_gives_them() {
        let name = short_name("ab");
        assert_eq!(name.len(), 26);
        assert!(
            name.bytes().all(|byte| byte.is_ascii_uppercase() || (b'2'..=b'7').contains(&byte)),
            "{name}"
        );
        assert_ne!(name, short_name("ac"));
        // The first five bits of the digest of "ab", fb8e…, are 11111.
        assert!(name.starts_with('7'), "{name}");
    }
}
