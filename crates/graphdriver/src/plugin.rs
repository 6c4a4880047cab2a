//! The plugin before and after `GraphDriver.Init`.
//!
//! An engine calls Init once per start of the *engine*. When the plugin's process dies
//! and is started again, calls simply go on (graph driver plugin §11.1), so the request
//! is kept on disk and the driver is set up from it at once.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use overlay::ids::IdMaps;

use crate::driver::{Driver, DriverError, Engine};
use crate::options::DriverOptions;
use crate::protocol::InitRequest;
use crate::publishing::Publishing;
use crate::repositories::RepositoryMounts;
use crate::server::CallCounters;

/// Makes what mounts repositories for a store at the given `Home`, as the options and the engine's user namespace
/// want it.
pub type MountsFactory =
    Box<dyn Fn(&Path, &DriverOptions, &IdMaps) -> io::Result<Arc<dyn RepositoryMounts>> + Send + Sync>;

/// Largest file with a kept request.
const MAX_STATE_BYTES: u64 = 1 << 20;

/// The plugin, with or without an initialised driver.
pub struct Plugin {
    state: PathBuf,
    mounts: MountsFactory,
    publishing: Publishing,
    driver: RwLock<Option<Arc<Driver>>>,
    calls: CallCounters,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin")
            .field("state", &self.state)
            .field("driver", &self.driver)
            .finish_non_exhaustive()
    }
}

impl Plugin {
    /// A plugin that keeps its state in `state_directory`. If an earlier process was
    /// initialised, so is this one.
    pub fn start(state_directory: &Path, mounts: MountsFactory, publishing: Publishing) -> Self {
        let state = state_directory.join("init.json");
        let plugin =
            Self { state, mounts, publishing, driver: RwLock::new(None), calls: CallCounters::default() };
        match read_state(&plugin.state) {
            Ok(None) => {}
            Ok(Some(init)) => match plugin.set_up(&init, Engine::GoesOn) {
                Ok(()) => tracing::info!(home = init.home, "initialised as before the restart"),
                Err(error) => {
                    tracing::error!(home = init.home, %error, "cannot initialise as before the restart");
                }
            },
            Err(error) => {
                tracing::warn!(file = %plugin.state.display(), %error, "ignoring a damaged state file");
            }
        }
        plugin
    }

    /// `GraphDriver.Init`: checks everything, then replaces the driver. Mounts stay; the
    /// references to them are those that the mount table shows, because a new engine
    /// knows nothing of what the last one got.
    ///
    /// # Errors
    /// The first thing that is wrong with the request or the host; then the driver stays
    /// as it was.
    pub fn init(&self, init: InitRequest) -> Result<(), DriverError> {
        self.set_up(&init, Engine::BeginsAnew)?;
        let text = serde_json::to_string(&init).expect("the request came as JSON");
        write_state(&self.state, &text)
            .map_err(|cause| DriverError::State { path: self.state.clone(), cause })?;
        tracing::info!(home = init.home, options = ?init.options, "initialised");
        Ok(())
    }

    /// Calls that were answered.
    pub fn calls(&self) -> &CallCounters {
        &self.calls
    }

    /// The initialised driver.
    ///
    /// # Errors
    /// [`DriverError::NotInitialised`].
    pub fn driver(&self) -> Result<Arc<Driver>, DriverError> {
        self.driver.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(DriverError::NotInitialised)
    }

    fn set_up(&self, init: &InitRequest, engine: Engine) -> Result<(), DriverError> {
        let state = self.state.parent().unwrap_or(Path::new("/"));
        let driver = Arc::new(Driver::open(init, &self.mounts, &self.publishing, (engine, state))?);
        *self.driver.write().unwrap_or_else(PoisonError::into_inner) = Some(driver);
        Ok(())
    }
}

fn read_state(path: &Path) -> io::Result<Option<InitRequest>> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    Ok(Some(serde_json::from_reader(io::BufReader::new(file.take(MAX_STATE_BYTES)))?))
}

fn write_state(path: &Path, text: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(temporary, path)
}
