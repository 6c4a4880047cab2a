//! Thin layers (thin images §§1–3).

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use overlay::mount::MAX_LOWERS;
use thin_image::{Contents, DESCRIPTOR_NAME, LayerClass, MAX_DESCRIPTOR_BYTES, ThinImage};

use super::create::{join_entries, replace_durably, write_durably};
use super::link::LinkName;
use super::{LayerStore, Lower, StoreError};
use crate::layer_id::LayerId;

impl LayerStore {
    /// Looks at the extracted content of a layer and makes the layer thin if it holds
    /// nothing but a descriptor.
    ///
    /// # Errors
    /// [`StoreError::Descriptor`] for a descriptor that cannot be honoured,
    /// [`StoreError::TooManyLowers`], [`StoreError::Io`].
    pub fn recognise_thin(&self, id: &LayerId) -> Result<Option<ThinImage>, StoreError> {
        let image = match self.classify(id)? {
            LayerClass::Ordinary => return Ok(None),
            LayerClass::Refused(cause) => return Err(StoreError::Descriptor { id: id.clone(), cause }),
            LayerClass::Thin(image) => image,
        };
        self.make_thin(id, &image)?;
        Ok(Some(image))
    }

    /// Whether the layer is thin.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn is_thin(&self, id: &LayerId) -> Result<bool, StoreError> {
        if self.layer_directory(id).join("thin").exists() {
            return Ok(true);
        }
        if self.layer_directory(id).join("parent").exists() {
            return Ok(false);
        }
        self.is_thin_of_the_go_plugin(id)
    }

    /// The descriptor of a thin layer; none if the layer is not thin.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Descriptor`].
    pub fn descriptor(&self, id: &LayerId) -> Result<Option<ThinImage>, StoreError> {
        if !self.is_thin(id)? {
            return Ok(None);
        }
        match self.classify(id)? {
            LayerClass::Thin(image) => Ok(Some(image)),
            LayerClass::Ordinary => Ok(None),
            LayerClass::Refused(cause) => Err(StoreError::Descriptor { id: id.clone(), cause }),
        }
    }

    /// The Go plugin kept no mark. Its thin layers hold the descriptor, and their
    /// `lower` is the descriptor's list.
    fn is_thin_of_the_go_plugin(&self, id: &LayerId) -> Result<bool, StoreError> {
        let LayerClass::Thin(image) = self.classify(id)? else {
            return Ok(false);
        };
        let listed = image.layers.iter().rev().map(|layer| Lower::Repository(layer.location.clone()));
        let lowers: Result<Vec<_>, _> =
            self.lower_entries(id)?.iter().map(|link| link.resolve(self.home())).collect();
        Ok(lowers?.into_iter().eq(listed))
    }

    fn classify(&self, id: &LayerId) -> Result<LayerClass, StoreError> {
        let diff = self.diff_directory(id);
        let Some(text) = read_descriptor(&diff.join(DESCRIPTOR_NAME))? else {
            return Ok(LayerClass::Ordinary);
        };
        let contents =
            if holds_other_entries(&diff)? { Contents::OtherEntries } else { Contents::DescriptorOnly };
        Ok(thin_image::classify(contents, &text))
    }

    /// Replaces what lies below the layer's children by the descriptor's list on top of
    /// what was there. Layers that the descriptor repeats from a thin parent (a thin
    /// commit repeats all) are taken from the descriptor.
    fn make_thin(&self, id: &LayerId, image: &ThinImage) -> Result<(), StoreError> {
        let mut listed = HashSet::new();
        let mut own = Vec::new();
        for layer in image.layers.iter().rev() {
            let lower = Lower::Repository(layer.location.clone());
            if listed.insert(lower.clone()) {
                own.push((LinkName::random(), lower));
            }
        }
        let mut entries: Vec<_> = own.iter().map(|(link, _)| link.clone()).collect();
        for link in self.lower_entries(id)? {
            if !listed.contains(&link.resolve(self.home())?) {
                entries.push(link);
            }
        }
        // A container's own lowers are its init layer and these.
        if entries.len() + 1 > MAX_LOWERS {
            return Err(StoreError::TooManyLowers { id: id.clone(), count: entries.len() + 1 });
        }

        let directory = self.layer_directory(id);
        let names: String = own.iter().map(|(link, _)| format!("{}\n", link.as_str())).collect();
        write_durably(&directory.join("thin"), &names)?;
        own.iter().try_for_each(|(link, lower)| link.create(self.home(), lower))?;
        if entries.is_empty() {
            return Ok(());
        }
        replace_durably(&directory.join("lower"), &join_entries(&entries))
    }
}

/// The start of the file if it is a regular one, enough to see that it is too large.
fn read_descriptor(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Ok(None),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(StoreError::io("read", path, cause)),
    }
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    let file = file.map_err(|cause| StoreError::io("read", path, cause))?;
    let mut text = Vec::new();
    let limit = u64::try_from(MAX_DESCRIPTOR_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut text).map_err(|cause| StoreError::io("read", path, cause))?;
    Ok(Some(text))
}

/// Whether the layer holds anything besides directories and the descriptor.
fn holds_other_entries(diff: &Path) -> Result<bool, StoreError> {
    let mut pending = vec![diff.to_owned()];
    while let Some(directory) = pending.pop() {
        let failed = |cause| StoreError::io("read", &directory, cause);
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir() {
                pending.push(entry.path());
            } else if directory != diff || entry.file_name() != DESCRIPTOR_NAME {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
