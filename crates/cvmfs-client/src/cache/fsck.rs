//! Looking at every file of a cache (the work of `cvmfs-client fsck`).
//!
//! It may run while the cache is in use: nothing is changed under a name, and removing a damaged file means that it is
//! fetched again. A file with a seal is compared with it. One without, as other clients store them, is compared with
//! its name: an uncompressed object directly, a compressed one by compressing it again as the publishing tools
//! do, which is slow and cannot tell a damaged file from one that was compressed by another library.

use std::io;
use std::path::{Path, PathBuf};

use cvmfs_format::compression::Deflate;
use cvmfs_format::hash::{ContentHash, Hasher};
use serde::Serialize;

use super::directory::{Open, Owner, is_read_only};
use super::files::{self, Item};
use super::presence;
use super::seal::{Seal, Verdict, for_each_piece};
use super::{CacheError, CacheName, own_directory};

/// Findings that are kept for the report; all are counted.
const MAX_FINDINGS: usize = 1000;
/// Largest file that is compressed again: it is held in memory.
const MAX_COMPRESSED: u64 = 64 << 20;

/// How far the work has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct FsckProgress {
    /// Files looked at.
    pub files: u64,
    /// Bytes read.
    pub bytes: u64,
}

/// What is wrong with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Problem {
    /// Its bytes are not those that were stored.
    Damaged,
    /// The disk does not give its bytes.
    Unreadable,
    /// It is no file of the cache.
    Foreign,
}

/// A file that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name as one word.
    pub name: String,
    /// Where it belongs, if that was noted.
    pub hint: Option<String>,
    /// What is wrong with it.
    pub problem: Problem,
    /// Whether it was removed.
    pub removed: bool,
}

/// The result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FsckReport {
    /// The directory.
    pub directory: PathBuf,
    /// Files looked at.
    pub files: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Files that are as they were stored.
    pub whole: u64,
    /// Files of which nobody can tell: they carry no seal, and their names do not follow from their bytes.
    pub unverifiable: u64,
    /// Files of which only some chunks are present; what is present was checked when it came.
    pub partial: u64,
    /// Files with a problem.
    pub problems: u64,
    /// Files that were removed.
    pub removed: u64,
    /// Left-overs of killed processes that were removed.
    pub leftovers: u64,
    /// The first [`MAX_FINDINGS`] problems.
    pub findings: Vec<Finding>,
}

/// Looks at every file of the cache in `directory`; with `repair` removes what is damaged or does not belong there.
///
/// # Errors
/// There is no cache, or it cannot be read; with `repair` also if it cannot be written.
pub fn fsck(
    directory: &Path,
    repair: bool,
    progress: &mut dyn FnMut(FsckProgress),
) -> Result<FsckReport, CacheError> {
    let path = own_directory(directory);
    let unusable =
        |source| CacheError::Unusable { path: path.clone(), parameter: "CVMFS_CACHE_BASE", source };
    let open = Open::look(&path).map_err(unusable)?;
    if repair {
        open.can_write().map_err(|error| {
            let reason =
                if is_read_only(&error) { "the directory cannot be written" } else { "cannot repair" };
            unusable(io::Error::new(error.kind(), format!("{reason}: {error}")))
        })?;
    }
    let mut report = FsckReport { directory: path.clone(), ..FsckReport::default() };
    let mut problems = Vec::new();
    let mut removed = 0;
    let mut dispose = |report: &mut FsckReport, item: &Item<'_>, problem: Problem, hint: Option<String>| {
        report.problems += 1;
        let is_removed = repair && item.remove();
        if is_removed {
            report.removed += 1;
            removed += item.bytes;
        }
        if problems.len() < MAX_FINDINGS {
            problems.push(Finding { name: item.name(), hint, problem, removed: is_removed });
        }
    };
    let report_cell = std::cell::RefCell::new(&mut report);
    let dispose_cell = std::cell::RefCell::new(&mut dispose);
    files::walk(
        &open,
        &mut |item| {
            let report = &mut **report_cell.borrow_mut();
            report.files += 1;
            report.bytes += item.size;
            match verdict(item) {
                Opinion::Whole => report.whole += 1,
                Opinion::Unknown => report.unverifiable += 1,
                Opinion::Partial => report.partial += 1,
                Opinion::Gone => {}
                Opinion::Bad(problem, hint) => dispose_cell.borrow_mut()(report, item, problem, hint),
            }
            progress(FsckProgress { files: report.files, bytes: report.bytes });
        },
        &mut |item| {
            let report = &mut **report_cell.borrow_mut();
            dispose_cell.borrow_mut()(report, item, Problem::Foreign, None);
        },
    );
    report.findings = problems;
    if repair && open.owner() == Owner::Client {
        report.leftovers = presence::sweep(open.root(), false).removed as u64;
        if let Some(record) = open.record() {
            record.with(|record| record.claimed = record.claimed.saturating_sub(removed));
        }
    }
    Ok(report)
}

enum Opinion {
    Whole,
    Unknown,
    Partial,
    /// Evicted while it was about to be looked at.
    Gone,
    Bad(Problem, Option<String>),
}

fn verdict(item: &Item<'_>) -> Opinion {
    let Some(name) = item.cache_name() else { return Opinion::Partial };
    let file = match item.open() {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Opinion::Gone,
        Err(_) => return Opinion::Bad(Problem::Unreadable, None),
    };
    match Seal::check(&file) {
        Verdict::Whole => Opinion::Whole,
        Verdict::Damaged => Opinion::Bad(Problem::Damaged, Seal::of(&file).and_then(|seal| seal.hint)),
        Verdict::Unreadable(_) => {
            Opinion::Bad(Problem::Unreadable, Seal::of(&file).and_then(|seal| seal.hint))
        }
        Verdict::Unsealed => compare_with_name(&name, &file, item.size),
    }
}

fn compare_with_name(name: &CacheName, file: &std::fs::File, size: u64) -> Opinion {
    let Some(expected) = name.hash() else { return Opinion::Unknown };
    let mut hasher = Hasher::new(expected.algorithm);
    let mut bytes = Vec::new();
    let may_compress = size <= MAX_COMPRESSED;
    let read = for_each_piece(file, &mut |piece| {
        hasher.update(piece);
        if may_compress {
            bytes.extend_from_slice(piece);
        }
    });
    if read.is_err() {
        return Opinion::Bad(Problem::Unreadable, None);
    }
    if hasher.finish() == expected {
        return Opinion::Whole;
    }
    if name.is_plain() {
        return Opinion::Bad(Problem::Damaged, None);
    }
    let is_compressed_by =
        |deflate: Deflate| ContentHash::of(expected.algorithm, &deflate.compress(&bytes)) == expected;
    if may_compress && (is_compressed_by(Deflate::Stock) || is_compressed_by(Deflate::Fast)) {
        return Opinion::Whole;
    }
    // The C++ client removes empty files as well when it counts its cache (client behaviour §10): they are what a
    // power cut leaves.
    if size == 0 { Opinion::Bad(Problem::Damaged, None) } else { Opinion::Unknown }
}
