//! The layers on disk (graph driver plugin §10).
//!
//! The layout is that of Docker's overlay2 and of the Go plugin, so that a host can
//! change over in both directions as long as no thin layer is involved:
//!
//! ```text
//! <Home>/l/<26 characters>   link to ../<id>/diff or ../cvmfs/<fqrn>/<path>
//! <Home>/<id>/link           the layer's own link name
//! <Home>/<id>/lower          "l/AAA:l/BBB", topmost first; absent without lowers
//! <Home>/<id>/diff/          the layer's own content
//! <Home>/<id>/work/          overlay's work directory, only with a parent
//! <Home>/<id>/committed      present once the layer is somebody's parent
//! <Home>/<id>/parent         id of the parent, empty without one; absent in layers of
//!                            overlay2 and the Go plugin (which has `thin_parent`)
//! <Home>/<id>/thin           the layer is thin; the link names it owns, one a line
//! <Home>/cvmfs/<fqrn>/       mount points of the repositories
//! ```
//!
//! Of a thin layer, `lower` is what lies below its *children*: the descriptor's layers,
//! then the lowers of its parent (thin images §3). Its own `diff` is not among them.
//!
//! Crash safety: a layer is built under a name that begins with `.creating-` and
//! renamed; it is removed by renaming it to `.removing-` first. What a killed process
//! leaves under such names is deleted by [`LayerStore::open`].

mod create;
mod link;
mod read;
mod remove;
mod thin;

pub use create::NewLayer;
pub(crate) use remove::VIEW;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use overlay::mount::MAX_LOWERS;
use overlay::quota::{ProjectQuotas, QuotaError};
use thin_image::{Location, ThinImageError};

use crate::layer_id::LayerId;

/// Numeric owner of the directories that a container sees: root, remapped if the engine
/// uses a user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One directory below a layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Lower {
    /// The content of an ordinary layer.
    Layer(LayerId),
    /// A directory in a repository.
    Repository(Location),
}

/// The directory of all layers.
#[derive(Debug)]
pub struct LayerStore {
    home: PathBuf,
    owner: Owner,
    /// Limits of containers' layers, once the file system is known to have them.
    quotas: Mutex<Option<Arc<ProjectQuotas>>>,
}

/// Why the store cannot do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
    /// A tree cannot be removed.
    #[error(transparent)]
    Tree(#[from] overlay::tree::TreeError),
    /// No such layer.
    #[error("layer {0} does not exist")]
    NoSuchLayer(LayerId),
    /// The engine asked for the same layer twice.
    #[error("layer {0} exists already")]
    Exists(LayerId),
    /// A file of the store does not hold what it should.
    #[error("layer {id}: {} is damaged; remove the image or container and pull or create it again", path.display())]
    Damaged {
        /// The layer.
        id: LayerId,
        /// The file.
        path: PathBuf,
    },
    /// A link that points somewhere else than links of the store do.
    #[error("link {} points to {}, neither a layer nor a place in a repository", path.display(), target.display())]
    BadLink {
        /// The link.
        path: PathBuf,
        /// Where it points to.
        target: PathBuf,
    },
    /// More directories than the kernel stacks.
    #[error(
        "layer {id} would have {count} lower directories, the kernel stacks at most {MAX_LOWERS} (the container's \
         init layer is one of them)"
    )]
    TooManyLowers {
        /// The layer.
        id: LayerId,
        /// Lower directories that it needs.
        count: usize,
    },
    /// A container cannot have the limit that it shall have.
    #[error("the size of a container cannot be limited: {cause}")]
    Limit {
        /// Why not.
        #[from]
        cause: QuotaError,
    },
    /// A thin layer's descriptor cannot be honoured.
    #[error("layer {id}: {cause}")]
    Descriptor {
        /// The layer.
        id: LayerId,
        /// The rule that is broken.
        #[source]
        cause: ThinImageError,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, cause: io::Error) -> Self {
        Self::Io { action, path: path.into(), cause }
    }
}

impl LayerStore {
    /// Opens the store at `home`, creating it if necessary, and deletes what a killed
    /// process left half done.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(home: &Path, owner: Owner) -> Result<Self, StoreError> {
        let missing: Vec<_> = home.ancestors().skip(1).take_while(|p| !p.exists()).collect();
        for directory in missing.into_iter().rev() {
            make_directory(directory, 0o755, Owner::default())?;
        }
        make_directory(home, 0o710, Owner { uid: 0, gid: owner.gid })?;
        let store = Self { home: home.to_owned(), owner, quotas: Mutex::default() };
        store.make_private_directory(&home.join(link::LINK_DIRECTORY))?;
        store.delete_leftovers()?;
        Ok(store)
    }

    /// The quotas of the file system. What it lacks is looked for again: it may have been mounted anew.
    fn quotas(&self) -> Result<Arc<ProjectQuotas>, QuotaError> {
        let mut quotas = self.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        match &*quotas {
            Some(quotas) => Ok(quotas.clone()),
            None => Ok(quotas.insert(Arc::new(ProjectQuotas::of(&self.home)?)).clone()),
        }
    }

    /// The directory of the store.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Owner of what a container sees.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Everything about one layer.
    pub fn layer_directory(&self, id: &LayerId) -> PathBuf {
        self.home.join(id.as_str())
    }

    /// The layer's own content.
    pub fn diff_directory(&self, id: &LayerId) -> PathBuf {
        self.layer_directory(id).join("diff")
    }

    /// Overlay's work directory.
    pub fn work_directory(&self, id: &LayerId) -> PathBuf {
        self.layer_directory(id).join("work")
    }

    /// Where the layer's tree is mounted.
    pub fn merged_directory(&self, id: &LayerId) -> PathBuf {
        self.layer_directory(id).join("merged")
    }

    /// The layer whose tree is mounted at `path`, if there is one.
    pub fn layer_mounted_at(&self, path: &Path) -> Option<LayerId> {
        let id = path.strip_prefix(&self.home).ok()?.to_str()?.strip_suffix("/merged")?;
        id.parse().ok()
    }

    /// Root's alone, but passable for the mapped group (as overlay2 since 20.10.9).
    fn make_private_directory(&self, path: &Path) -> Result<(), StoreError> {
        make_directory(path, 0o710, Owner { uid: 0, gid: self.owner.gid })
    }
}

/// Creates a directory with exactly this mode and owner; one that exists stays as it is.
pub(crate) fn make_directory(path: &Path, mode: u32, owner: Owner) -> Result<(), StoreError> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        result => result.map_err(|cause| StoreError::io("create", path, cause))?,
    }
    if owner != Owner::default() {
        chown(path, Some(owner.uid), Some(owner.gid))
            .map_err(|cause| StoreError::io("chown", path, cause))?;
    }
    // The process's umask must not decide what a container sees.
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::set_permissions(path, permissions).map_err(|cause| StoreError::io("chmod", path, cause))
}
