//! How often each layer's tree is in use, as far as the engine has said.
//!
//! An engine that starts knows nothing of what its predecessor got, and calls Init: what is mounted then is in use
//! once. But a plugin that is started again under an engine is asked as if nothing had happened, and must know what
//! its predecessor gave away, mounted or not: an engine that disables a plugin takes all its mounts away, and one
//! that restarts a container asks for the tree before it gives the old one back. So the numbers are in files beside
//! the kept Init request. They are lost with the host, as the mounts are.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::layer_id::LayerId;

/// Name of the directory with one file for each layer that is in use.
const DIRECTORY: &str = "references";
/// Digits of a number; more is no number of ours.
const MAX_DIGITS: usize = 10;

/// The numbers of all layers that were asked for.
#[derive(Debug)]
pub(super) struct References {
    directory: PathBuf,
    counts: Mutex<HashMap<LayerId, u32>>,
}

impl References {
    /// Of an engine that begins anew.
    pub(super) fn fresh(state: &Path) -> References {
        let directory = state.join(DIRECTORY);
        if let Err(error) = fs::remove_dir_all(&directory)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(directory = %directory.display(), %error, "cannot forget the references of the last engine");
        }
        References { directory, counts: Mutex::default() }
    }

    /// Of an engine that goes on with another process of the plugin.
    pub(super) fn restored(state: &Path) -> References {
        let directory = state.join(DIRECTORY);
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        let read = entries.filter_map(|entry| {
            let id: LayerId = entry.file_name().to_str()?.parse().ok()?;
            let text = fs::read_to_string(entry.path()).ok().filter(|text| text.len() <= MAX_DIGITS)?;
            Some((id, text.parse().ok()?))
        });
        let counts = read.collect();
        References { directory, counts: Mutex::new(counts) }
    }

    /// The number of a layer, if anything is known of it.
    pub(super) fn get(&self, id: &LayerId) -> Option<u32> {
        self.lock().get(id).copied()
    }

    /// Notes the number of a layer. The caller holds the layer's lock.
    pub(super) fn set(&self, id: &LayerId, count: u32) {
        self.lock().insert(id.clone(), count);
        let file = self.directory.join(id.as_str());
        let written = fs::create_dir_all(&self.directory).and_then(|()| fs::write(&file, count.to_string()));
        if let Err(error) = written {
            tracing::warn!(file = %file.display(), %error, "a process that follows will not know this reference");
        }
    }

    /// Nobody uses the layer any more. The caller holds the layer's lock.
    pub(super) fn forget(&self, id: &LayerId) {
        self.lock().remove(id);
        // Mostly there is none.
        let _ = fs::remove_file(self.directory.join(id.as_str()));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<LayerId, u32>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_of_the_plugin_knows_them_and_another_engine_does_not() {
        let state = tempfile::tempdir().unwrap();
        let id = |text: &str| text.parse::<LayerId>().unwrap();
        let references = References::fresh(state.path());
        references.set(&id("a"), 1);
        references.set(&id("a"), 2);
        references.set(&id("b"), 1);
        references.forget(&id("b"));
        let next = References::restored(state.path());
        assert_eq!((next.get(&id("a")), next.get(&id("b"))), (Some(2), None));
        fs::write(state.path().join(DIRECTORY).join("c"), "many").unwrap();
        fs::write(state.path().join(DIRECTORY).join("d"), "1".repeat(100)).unwrap();
        let next = References::restored(state.path());
        assert_eq!((next.get(&id("a")), next.get(&id("c")), next.get(&id("d"))), (Some(2), None, None));
        assert_eq!(References::fresh(state.path()).get(&id("a")), None);
        assert_eq!(References::restored(state.path()).get(&id("a")), None);
    }
}
