//! `check`: is everything that the published revision promises there, and right?
//!
//! Beginning at the public master key: whitelist, certificate, manifest; history and reflog; every
//! catalog reachable from the manifest (and, on demand, from the tags) with every row; every object
//! those rows name, its hash and its plain size, each once, on all cores. Problems are
//! listed by their path in the repository; the check goes on after each.
//!
//! Objects that no listed revision refers to are reported too. They are no problem: an interrupted publish leaves
//! them, and one in progress has them.
//!
//! Nothing is changed and no lock is taken. Rules: publisher behaviour §11, errata 3, 8, 19.

mod catalogs;
mod objects;
mod partial;
mod references;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use cvmfs_format::history::Tag;
use cvmfs_format::signature::MasterKeys;
use cvmfs_format::{Compression, ContentHash, ObjectName};
use serde::Serialize;

use crate::error::{PublishError, shown};
use crate::head::Head;
use crate::path::RepositoryPath;
use crate::pipeline::Counters;
use crate::publisher::{Clock, system_clock};
use crate::storage::{Scratch, Storage};

/// More problems than this are counted, not listed: beyond it the repository is simply lost.
pub const MAX_LISTED: usize = 10_000;

/// Problems that the refusal of a revision lists.
const MAX_NAMED: usize = 10;

/// What to check.
#[derive(Debug)]
pub struct CheckOptions {
    /// Repository name.
    pub fqrn: String,
    /// Where the repository is.
    pub storage: Arc<dyn Storage>,
    /// Public master keys.
    pub masters: MasterKeys,
    /// Check every tagged revision as thoroughly as the current one.
    pub tags: bool,
    /// Check only this entry and what is below it.
    pub path: Option<RepositoryPath>,
    /// Check only what changed since the revision with this root catalog.
    pub since: Option<ContentHash>,
    /// Read and verify the stored bytes of every object; otherwise only look whether it is there.
    pub contents: bool,
    /// Look for objects that no revision in the reflog refers to.
    pub unreferenced: bool,
    /// Where progress is counted: catalog rows as entries, stored bytes verified as input.
    pub counters: Arc<Counters>,
    /// Source of time.
    pub clock: Clock,
}

impl CheckOptions {
    /// A whole check of the current revision.
    pub fn new(fqrn: &str, storage: Arc<dyn Storage>, masters: MasterKeys) -> CheckOptions {
        CheckOptions {
            fqrn: fqrn.to_owned(),
            storage,
            masters,
            tags: false,
            path: None,
            since: None,
            contents: true,
            unreferenced: true,
            counters: Arc::default(),
            clock: system_clock,
        }
    }
}

/// What kind of problem it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProblemKind {
    /// An object is not there.
    Missing,
    /// An object's bytes do not fit its name, or its content not the catalog.
    Corrupt,
    /// A catalog contradicts itself or the format.
    Catalog,
    /// The history is wrong.
    History,
    /// The reflog is wrong.
    Reflog,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What kind of problem.
    pub kind: ProblemKind,
    /// Path in the repository that is affected; of several the first.
    pub path: String,
    /// Object concerned, as a path below the storage root.
    pub object: Option<String>,
    /// What is wrong.
    pub message: String,
}

/// A stored object that nothing refers to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unreferenced {
    /// Path below the storage root.
    pub object: String,
    /// Stored bytes.
    pub bytes: u64,
}

/// Result of a check: the document of `check --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckReport {
    /// Repository name.
    pub fqrn: String,
    /// Number of the current revision.
    pub revision: u64,
    /// Hash of its root catalog.
    pub root_hash: String,
    /// True if there is no problem.
    pub ok: bool,
    /// Catalogs examined.
    pub catalogs: u64,
    /// Rows examined.
    pub entries: u64,
    /// File objects and chunks examined, each once.
    pub objects: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// Problems found, the first [`MAX_LISTED`].
    pub problems: Vec<Problem>,
    /// Problems in all.
    pub problem_count: u64,
    /// What is worth knowing and no problem.
    pub notes: Vec<String>,
    /// Objects that nothing refers to, the first [`MAX_LISTED`].
    pub unreferenced: Vec<Unreferenced>,
    /// Such objects in all.
    pub unreferenced_count: u64,
    /// Their stored bytes.
    pub unreferenced_bytes: u64,
    /// How long the check took.
    pub seconds: f64,
}

/// Checks a repository. An error means that the check could not be made: above all, that the published state is not
/// to be trusted. What is wrong below a trusted manifest is in the report.
pub fn check(options: &CheckOptions) -> Result<CheckReport, PublishError> {
    let started = Instant::now();
    let now = (options.clock)();
    let head = Head::load(&*options.storage, &options.fqrn, &options.masters, now)?;
    let mut check = Check::new(options)?;
    let roots = check.references(&head, now)?;
    match options.path.as_ref().filter(|path| !path.is_root()) {
        Some(path) => check.subtree(&head, path)?,
        None => check.revision(&head)?,
    }
    if options.tags {
        for tag in &roots.tagged {
            check.tagged(tag)?;
        }
    }
    let bytes = check.verify_objects();
    // what a part does not refer to may be in use elsewhere
    let is_whole = options.path.is_none() && options.since.is_none();
    let unreferenced =
        if options.unreferenced && is_whole { check.unreferenced(&roots)? } else { Vec::new() };
    let findings = check.findings;
    Ok(CheckReport {
        fqrn: options.fqrn.clone(),
        revision: head.manifest.revision,
        root_hash: head.manifest.root_catalog.to_string(),
        ok: findings.count == 0,
        catalogs: check.catalogs,
        entries: options.counters.entries.load(std::sync::atomic::Ordering::Relaxed),
        objects: check.uses.len() as u64,
        bytes,
        problem_count: findings.count,
        problems: findings.problems,
        notes: findings.notes,
        unreferenced_count: unreferenced.len() as u64,
        unreferenced_bytes: unreferenced.iter().map(|object| object.bytes).sum(),
        unreferenced: unreferenced.into_iter().take(MAX_LISTED).collect(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Makes sure that a tagged revision can be had: every catalog, and that every object that the current revision has not,
/// is there.
pub(crate) fn require_complete(options: &CheckOptions, tag: &Tag) -> Result<(), PublishError> {
    let mut check = Check::new(options)?;
    check.since(tag)?;
    check.verify_objects();
    let Findings { problems, count, .. } = check.findings;
    if count == 0 {
        return Ok(());
    }
    let listed: Vec<String> = problems
        .iter()
        .take(MAX_NAMED)
        .map(|problem| {
            let object = problem.object.as_deref().map(|object| format!(" ({object})")).unwrap_or_default();
            format!("\n  {}: {}{object}", problem.path, problem.message)
        })
        .collect();
    let more = count.saturating_sub(MAX_NAMED as u64);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    Err(PublishError::damaged(
        format!("revision {} (tag {})", tag.revision, tag.name),
        format!("is not complete:{}{more}", listed.concat()),
    ))
}

/// A check in progress.
#[derive(Debug)]
struct Check<'o> {
    options: &'o CheckOptions,
    scratch: Scratch,
    findings: Findings,
    /// Every file object and chunk of the checked revisions.
    uses: HashMap<ObjectName, Use>,
    /// Everything else that the checked revisions refer to.
    referenced: HashSet<ObjectName>,
    /// Catalogs examined already, also in vain: tags share most of theirs.
    trees: HashMap<(ObjectName, Vec<u8>), Option<catalogs::Tree>>,
    catalogs: u64,
    /// Catalogs opened beside those that are examined.
    unpacked: u64,
}

/// Where an object is used.
#[derive(Debug, Clone)]
struct Use {
    path: Vec<u8>,
    plain_size: u64,
    compression: Compression,
}

#[derive(Debug, Default)]
struct Findings {
    problems: Vec<Problem>,
    count: u64,
    notes: Vec<String>,
}

impl Findings {
    fn add(&mut self, kind: ProblemKind, path: &[u8], object: Option<&ObjectName>, message: impl ToString) {
        self.count += 1;
        if self.problems.len() < MAX_LISTED {
            let path = if path.is_empty() { "/".to_owned() } else { shown(path) };
            let object = object.map(ObjectName::path);
            self.problems.push(Problem { kind, path, object, message: message.to_string() });
        }
    }

    fn note(&mut self, line: String) {
        if self.notes.len() < MAX_LISTED {
            self.notes.push(line);
        }
    }
}

impl<'o> Check<'o> {
    fn new(options: &'o CheckOptions) -> Result<Check<'o>, PublishError> {
        Ok(Check {
            options,
            scratch: Scratch::in_temporary_directory()?,
            findings: Findings::default(),
            uses: HashMap::new(),
            referenced: HashSet::new(),
            trees: HashMap::new(),
            catalogs: 0,
            unpacked: 0,
        })
    }

    fn work_file(&self, name: &str) -> PathBuf {
        self.scratch.file(name)
    }
}
