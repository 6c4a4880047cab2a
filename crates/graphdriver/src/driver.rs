//! The driver after `GraphDriver.Init`: one method per call (graph driver plugin §5).
//!
//! Calls about one layer come one after the other; a call never holds the lock of two
//! layers, so a `Diff` and the `ApplyDiff` that it feeds overlap freely. `Diff` and its
//! relatives hold no lock while they work.

mod changes;
mod commit;
mod content;
mod mounting;
mod references;
pub mod report;
mod status;
mod view;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use overlay::ids::{IdMap, IdMaps, IdRange};

use crate::keyed_locks::KeyedLocks;
use crate::layer_id::{InvalidLayerId, LayerId};
use crate::mounts;
use crate::options::{DriverOptions, OptionError, check_image_options, container_size};
use crate::plugin::MountsFactory;
use crate::protocol::{CreateRequest, IdMapEntry, InitRequest};
use crate::publishing::{Publishing, PublishingError};
use crate::repositories::{Repositories, RepositoryError};
use crate::store::{LayerStore, NewLayer, Owner, StoreError};
use references::References;

/// An initialised driver.
#[derive(Debug)]
pub struct Driver {
    store: LayerStore,
    options: DriverOptions,
    id_maps: IdMaps,
    backing: String,
    /// How this kernel mounts overlays.
    overlays: overlay::mount::Support,
    repositories: Repositories,
    publishing: Publishing,
    locks: KeyedLocks<LayerId>,
    references: References,
}

/// What the engine knows of the layers that are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Nothing: it was started.
    BeginsAnew,
    /// Everything: only the plugin was started again.
    GoesOn,
}

/// Why a call fails. The text is what the user of the engine reads.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A call before Init, and no state of an earlier process.
    #[error(
        "the driver is not initialised: no engine has taken it as its storage driver yet, which engines do at their \
         start. Its name must stand as \"storage-driver\" and \"experimental\": true in the engine's daemon.json; \
         Docker 27 also wants DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS=1 in its environment; Docker 28 and newer have \
         no graph driver plugins"
    )]
    NotInitialised,
    /// `Home` of Init.
    #[error("Home {0:?} is not an absolute path without '.' and '..'")]
    BadHome(String),
    /// An option of Init or Create.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// An id map of Init.
    #[error("the id map of the user namespace has no entry for container id 0")]
    NoRootInIdMap,
    /// The file system or the kernel cannot hold layers.
    #[error("overlay mounts do not work in {}: {cause}; check that the kernel has overlayfs and that this file system can be its upper layer", home.display())]
    OverlayUnusable {
        /// Directory of the layers.
        home: PathBuf,
        /// What failed.
        #[source]
        cause: Box<DriverError>,
    },
    /// The Init request cannot be kept.
    #[error("cannot write {}: {cause}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
    /// The layer store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A repository.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// A mount or unmount.
    #[error(transparent)]
    Mount(#[from] overlay::mount::MountError),
    /// Applying an archive to another tree than the layer's parent.
    #[error("cannot apply a diff against {}: layer {id} was created on another layer", name_of(parent))]
    NotTheParent {
        /// The layer.
        id: LayerId,
        /// What the engine named as parent.
        parent: Option<LayerId>,
    },
    /// An archive cannot be read or written, or two trees cannot be compared.
    #[error("layer {id}: {cause}")]
    Content {
        /// The layer.
        id: LayerId,
        /// What is wrong.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A container's changes could not be published.
    #[error(
        "container {id} cannot be committed as a thin image: {cause}; nothing was lost, the commit can be repeated \
         (cvmfsCommitFallback=diff makes ordinary layers instead)"
    )]
    Commit {
        /// The container.
        id: LayerId,
        /// Why not.
        #[source]
        cause: Box<PublishingError>,
    },
    /// A stream to or from the engine broke.
    #[error("the connection to the engine broke: {0}")]
    Stream(#[source] io::Error),
    /// A bad id where the protocol has one.
    #[error(transparent)]
    Id(#[from] InvalidLayerId),
}

impl DriverError {
    /// Something is wrong with the content of a layer. Causes become part of the text:
    /// the engine shows nothing else.
    fn content(id: &LayerId, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Content { id: id.clone(), cause: Box::new(cause) }
    }
}

fn name_of(parent: &Option<LayerId>) -> String {
    parent.as_ref().map_or_else(|| "no layer".to_owned(), |id| format!("layer {id}"))
}

impl Driver {
    /// Sets up the driver for an engine: checks the request and the host, cleans up
    /// after a crash, adopts the mounts that are still in use. What is to be known of them if only this process ends
    /// is kept below `state`.
    ///
    /// # Errors
    /// The first thing that is wrong with the request or the host.
    pub fn open(
        init: &InitRequest,
        repository_mounts: &MountsFactory,
        publishing: &Publishing,
        (engine, state): (Engine, &Path),
    ) -> Result<Self, DriverError> {
        let options = DriverOptions::parse(&init.options)?;
        let home = absolute(&init.home)?;
        let owner = Owner { uid: root_on_host(&init.uid_maps)?, gid: root_on_host(&init.gid_maps)? };
        mounts::unmount_temporary(&home)?;
        let store = LayerStore::open(&home, owner)?;
        let id_maps = IdMaps { users: id_map(&init.uid_maps), groups: id_map(&init.gid_maps) };
        let mounts = repository_mounts(&home, &options, &id_maps)
            .map_err(|cause| DriverError::State { path: home.clone(), cause })?;
        let driver = Self {
            backing: status::file_system_name(&home),
            overlays: overlay::mount::probe()?,
            repositories: Repositories::new(mounts),
            publishing: publishing.clone(),
            store,
            options,
            id_maps,
            locks: KeyedLocks::new(),
            references: match engine {
                Engine::BeginsAnew => References::fresh(state),
                Engine::GoesOn => References::restored(state),
            },
        };
        driver.check_overlay()?;
        if driver.options.size.is_some() {
            driver.store.check_limits()?;
        }
        driver.repositories.recover();
        driver.adopt_mounted();
        Ok(driver)
    }

    /// `Create`: a layer of an image, or one that BuildKit writes into.
    ///
    /// # Errors
    /// [`DriverError::Option`], [`DriverError::Store`].
    pub fn create(&self, request: &CreateRequest) -> Result<(), DriverError> {
        let _lock = self.locks.lock(&request.id);
        check_image_options(&request.storage_options)?;
        Ok(self
            .store
            .create(&request.id, &NewLayer { parent: request.parent.as_ref(), to_come: 0, size: None })?)
    }

    /// `CreateReadWrite`: a container's layer, or its init layer. Fails if a repository
    /// below it cannot be used: the engine would leave a layer behind if only the
    /// following `Get` failed.
    ///
    /// # Errors
    /// As [`Driver::create`]; [`DriverError::Repository`].
    pub fn create_container(&self, request: &CreateRequest) -> Result<(), DriverError> {
        let _lock = self.locks.lock(&request.id);
        let size = container_size(&request.storage_options)?.or(self.options.size);
        // The container's own layer will be put on its init layer.
        let to_come = usize::from(request.id.as_str().ends_with("-init"));
        self.store.create(&request.id, &NewLayer { parent: request.parent.as_ref(), to_come, size })?;
        let checked = self.check_repositories(&request.id);
        if checked.is_err()
            && let Err(error) = self.store.remove(&request.id)
        {
            tracing::warn!(id = %request.id, %error, "cannot remove the layer of a failed start");
        }
        checked
    }

    /// `Remove`: unmounts and deletes a layer; one that does not exist is fine.
    ///
    /// # Errors
    /// [`DriverError::Mount`], [`DriverError::Store`]; calling again goes on.
    pub fn remove(&self, id: &LayerId) -> Result<(), DriverError> {
        let _lock = self.locks.lock(id);
        self.unmount_whatever_the_references(id)?;
        Ok(self.store.remove(id)?)
    }

    /// `Exists`.
    pub fn exists(&self, id: &LayerId) -> bool {
        self.store.exists(id)
    }

    /// `GetMetadata`: directories of a layer as the plugin sees them.
    ///
    /// # Errors
    /// [`DriverError::Store`].
    pub fn metadata(&self, id: &LayerId) -> Result<BTreeMap<&'static str, String>, DriverError> {
        self.store.require(id)?;
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let mut values = BTreeMap::from([
            ("UpperDir", text(self.store.diff_directory(id))),
            ("WorkDir", text(self.store.work_directory(id))),
            ("MergedDir", text(self.store.merged_directory(id))),
        ]);
        let lowers = self.store.lowers(id)?;
        if !lowers.is_empty() {
            let paths: Vec<_> = lowers.iter().map(|lower| text(self.nominal_path(lower))).collect();
            values.insert("LowerDir", paths.join(":"));
        }
        Ok(values)
    }

    /// Unmounts repositories that no layer has used for a while.
    pub fn unmount_idle_repositories(&self) {
        self.repositories.unmount_idle();
    }

    fn in_user_namespace(&self) -> bool {
        self.id_maps != IdMaps::default()
    }

    /// Tries the mount that every container needs, so that a host that cannot do it is
    /// found at the start of the engine.
    fn check_overlay(&self) -> Result<(), DriverError> {
        let unusable = |cause| DriverError::OverlayUnusable {
            home: self.store.home().to_owned(),
            cause: Box::new(cause),
        };
        self.try_overlay().map_err(unusable)
    }
}

fn absolute(home: &str) -> Result<PathBuf, DriverError> {
    let path = Path::new(home);
    let normal = |component: Component<'_>| matches!(component, Component::RootDir | Component::Normal(_));
    let rebuilt: PathBuf = path.components().collect();
    if path.is_absolute() && path.components().all(normal) && !home.contains('\0') {
        Ok(rebuilt)
    } else {
        Err(DriverError::BadHome(home.to_owned()))
    }
}

fn id_map(entries: &[IdMapEntry]) -> IdMap {
    let range = |e: &IdMapEntry| IdRange { container: e.container_id, host: e.host_id, size: e.size };
    IdMap::new(entries.iter().map(range).collect())
}

/// What container id 0 is on the host; 0 without a map.
fn root_on_host(maps: &[IdMapEntry]) -> Result<u32, DriverError> {
    if maps.is_empty() {
        return Ok(0);
    }
    let root = maps.iter().find(|entry| entry.container_id == 0 && entry.size > 0);
    root.map(|entry| entry.host_id).ok_or(DriverError::NoRootInIdMap)
}

/// A private directory; one that exists stays.
fn make_private(path: &Path) -> Result<(), StoreError> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(|cause| StoreError::io("create", path, cause)),
    }
}
