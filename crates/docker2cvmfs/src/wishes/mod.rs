//! Continuous conversion: a wish list kept true in a repository.
//!
//! | module | what |
//! |---|---|
//! | `recipe`, `expand` | the list, and the images that it means |
//! | `records` | what was converted, on disk |
//! | `round` | one comparison of wishes with what is there |
//! | `work`, `claims` | many images at once into one publisher |
//! | `retire` | what left the list |
//! | `notice`, `server`, `page` | notifications of registries; status, metrics |
//! | `bell` | what wakes the loop, and what ends it |
//!
//! Invariants:
//!
//! * A list that cannot be read, or a registry that does not answer, removes nothing.
//! * An image appears in the records when its layers are published and its thin image is
//!   pushed, and not before; a kill at any point costs a second look.
//! * Layers are removed only if a record says that this loop's list brought them, and no
//!   record that still counts has them too.

mod bell;
mod claims;
mod expand;
mod notice;
mod page;
mod parallel;
mod recipe;
mod records;
mod report;
mod retire;
mod round;
mod server;
mod work;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cvmfs_publish::Interrupt;
use cvmfs_publish::http_server::Token;
use registry::{Client, ClientSettings, Credential, Credentials, Mirror, Secret};

pub use bell::Bell;
pub use notice::{Notice, notices};
pub use recipe::{OutputFormat, Recipe, RecipeError, TagPattern, Wish};
pub use report::{ImageOutcome, ImageState, RoundReport};

use crate::convert::{Layout, PlatformChoice};
use crate::failure::ConvertError;
use crate::policy::Policy;
use crate::progress::Progress;
use bell::Ring;
use records::Records;
use report::History;
use round::Round;
use server::{Server, Status};

/// The password of the list's `user`, as DUCC takes it.
const PASSWORD_VARIABLE: &str = "DUCC_OUTPUT_REGISTRY_PASS";

/// What the loop is to do.
#[derive(Debug, Clone)]
pub struct LoopRequest {
    /// The wish list.
    pub recipe: PathBuf,
    /// Storage of the repository; `/srv/cvmfs/FQRN` if `None`.
    pub storage: Option<String>,
    /// Directory with the repository's keys.
    pub keys: PathBuf,
    /// Mirrors of the sources' registries.
    pub mirrors: Vec<Mirror>,
    /// The platforms wanted.
    pub platform: PlatformChoice,
    /// Where layers lie in the repository.
    pub layout: Layout,
    /// Whether thin images are made.
    pub thin_images: bool,
    /// Directory of the records; `/var/lib/docker2cvmfs/FQRN` if `None`.
    pub state: Option<PathBuf>,
    /// Directory for downloaded layers; see `--spool`.
    pub spool: Option<PathBuf>,
    /// File with what has to be true of an image before it is published; read before each
    /// round.
    pub policy: Option<PathBuf>,
    /// Compressed bytes of layers that may lie in the spool.
    pub spool_limit: u64,
    /// Images that are fetched at the same time.
    pub parallel: usize,
    /// How long what left the list stays in the repository.
    pub grace: Duration,
    /// Whether garbage is collected when layers were removed.
    pub collect: bool,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Time from the end of a round to the begin of the next; one round only if `None`.
    pub interval: Option<Duration>,
    /// Where status, metrics and notifications are served.
    pub listen: Option<SocketAddr>,
    /// What notifications have to state as `Authorization`.
    pub token: Option<Token>,
}

/// Runs rounds until the bell tells it to stop, or one. Returns the report of the last.
///
/// # Errors
/// At the begin: the list, the records, the address. Later, of a single round only: what
/// kept it from ending.
pub fn run(request: &LoopRequest, bell: &Bell, progress: &Progress) -> Result<RoundReport, ConvertError> {
    let recipe = Recipe::read(&request.recipe)?;
    let directory =
        request.state.clone().unwrap_or_else(|| PathBuf::from("/var/lib/docker2cvmfs").join(&recipe.fqrn));
    let records = Records::open(&directory, &recipe.fqrn)?;
    let history: History = records.rounds().unwrap_or_default();
    let status = Arc::new(Status::new(&recipe.fqrn, &request.recipe, history));
    let _server = request
        .listen
        .map(|address| Server::start(address, status.clone(), bell.clone(), request.token.clone()))
        .transpose()?;
    status.images(records.images()?);
    let mut notices: Option<Vec<Notice>> = None;
    let mut next = Instant::now();
    loop {
        status.begins();
        let round = one_round(request, &records, bell, progress, notices.as_deref());
        keep(request, &records, &status, &round);
        let Some(interval) = request.interval else { return round };
        if let Err(error) = &round {
            tracing::error!(error = error.full_message(), "the round did not end; the next one tries again");
        }
        if notices.is_none() {
            next = Instant::now() + interval;
        }
        status.waits_for(next.saturating_duration_since(Instant::now()));
        notices = loop {
            match bell.wait(next) {
                Ring::Stop => return round,
                Ring::Time => break None,
                Ring::Notices(new) if concerns(request, &new) => break Some(new),
                Ring::Notices(_) => {}
            }
        };
    }
}

/// Whether something was pushed that the list wishes for.
fn concerns(request: &LoopRequest, notices: &[Notice]) -> bool {
    // A list that cannot be read is the round's to report.
    let Ok(recipe) = Recipe::read(&request.recipe) else { return true };
    let is_wished = |notice: &Notice| {
        recipe.wishes.iter().any(|wish| wish.concerns(&notice.repository, notice.tag.as_deref()))
    };
    notices.iter().any(is_wished)
}

/// Writes down what a round did. A history that cannot be written is no reason to end.
fn keep(
    request: &LoopRequest,
    records: &Records,
    status: &Status,
    round: &Result<RoundReport, ConvertError>,
) {
    let report = match round {
        Ok(report) => report.clone(),
        Err(error) => RoundReport {
            started: rfc3339(cvmfs_publish::system_clock()),
            errors: vec![error.full_message()],
            ..RoundReport::default()
        },
    };
    if !request.dry_run {
        tracing::info!("{}", report.summary());
        let history = status.ended(report);
        let written = records.keep_rounds(&history).and_then(|()| records.images());
        match written {
            Ok(images) => status.images(images),
            Err(error) => tracing::error!(error = error.full_message(), "the round cannot be written down"),
        }
    }
}

fn one_round(
    request: &LoopRequest,
    records: &Records,
    bell: &Bell,
    progress: &Progress,
    notices: Option<&[Notice]>,
) -> Result<RoundReport, ConvertError> {
    let recipe = Recipe::read(&request.recipe)?;
    if recipe.fqrn != records.fqrn() {
        return Err(ConvertError::OtherRepository { now: recipe.fqrn, before: records.fqrn().to_owned() });
    }
    let policy = request.policy.as_deref().map(Policy::read).transpose()?;
    for warning in &recipe.warnings {
        tracing::warn!(list = %request.recipe.display(), "{warning}");
    }
    let (credentials, mirrors) = (source_credentials()?, request.mirrors.clone());
    let source = Client::new(ClientSettings { credentials, mirrors, ..ClientSettings::default() })?;
    let target = Client::new(ClientSettings {
        credentials: target_credentials(&recipe),
        ..ClientSettings::default()
    })?;
    let interrupt = Interrupt::default();
    bell.ends(&interrupt, &[source.canceller(), target.canceller()]);
    let (source, target) = (&source, &target);
    let round = Round {
        request,
        recipe: &recipe,
        policy: policy.as_ref(),
        records,
        source,
        target,
        interrupt: &interrupt,
        progress,
    };
    round.run(notices)
}

/// Logins of the user, and those that DUCC takes from the environment.
fn source_credentials() -> Result<Credentials, ConvertError> {
    let mut credentials = Credentials::from_environment();
    let names = std::env::var("DUCC_AUTH_REGISTRIES").unwrap_or_default();
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let variable =
            |part: &str| std::env::var(format!("DUCC_{name}_{part}")).ok().filter(|v| !v.is_empty());
        let (Some(ident), Some(user), Some(password)) =
            (variable("IDENT"), variable("USER"), variable("PASS"))
        else {
            return Err(ConvertError::Usage(format!(
                "DUCC_AUTH_REGISTRIES names {name}: set DUCC_{name}_IDENT, DUCC_{name}_USER and DUCC_{name}_PASS"
            )));
        };
        if variable("PROXY").is_some() {
            tracing::warn!("DUCC_{name}_PROXY means nothing here; see HTTPS_PROXY");
        }
        credentials =
            credentials.with_part(ident, Credential::Password { user, password: Secret::new(password) });
    }
    Ok(credentials)
}

fn target_credentials(recipe: &Recipe) -> Credentials {
    let credentials = Credentials::from_environment();
    match (&recipe.user, std::env::var(PASSWORD_VARIABLE)) {
        (Some(user), Ok(password)) if !password.is_empty() => {
            let credential = Credential::Password { user: user.clone(), password: Secret::new(password) };
            credentials.with_part("", credential)
        }
        _ => credentials,
    }
}

/// A Unix time as people read it.
fn rfc3339(time: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    time::OffsetDateTime::from_unix_timestamp(time)
        .ok()
        .and_then(|time| time.format(&format).ok())
        .unwrap_or_else(|| time.to_string())
}
