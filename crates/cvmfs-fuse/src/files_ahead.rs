//! Small files that are fetched ahead of a program that reads a directory's files in their order.
//!
//! A program that opens one file of a directory after the other, as copies, archivers, globs and loaders of
//! packages do, waits for a server at each of them. Once a few files in a row had to be fetched and were opened in
//! the order of their names, the next ones are fetched in the background: four at first, then twice as many each
//! time, up to a limit. A step aside ends it, and so does a directory that turns out to be in the cache. What is
//! fetched in vain is bounded by that window.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cvmfs_format::catalog::EntryKind;

use crate::content::Content;
use crate::nodes::{Moment, Node};
use crate::view::{Listing, View, parent_id};

/// Largest file that is fetched ahead, in bytes.
const LARGEST: u64 = 128 << 10;
/// Most bytes fetched ahead of a reader at a time.
const MOST_BYTES: u64 = 2 << 20;
/// Files in order after which the next are fetched.
const IN_ORDER: u32 = 2;
/// Names between two files that a reader in order may leave out, such as those of directories.
const SKIPPED: usize = 4;
/// Files fetched at first.
const FIRST_WINDOW: usize = 4;
/// Directories that are watched at a time.
const MOST_RUNS: usize = 8;
/// A directory with more entries is not watched: its listing would be kept in memory.
const LARGEST_LISTING: usize = 1 << 14;

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct FilesAhead {
    /// Most files; 0 switches it off.
    most: usize,
    /// Whether any directory is watched, so that opens of cached files cost nothing otherwise.
    is_watching: AtomicBool,
    watched: Mutex<Watched>,
}

#[derive(Debug, Default)]
struct Watched {
    /// The one that was read last comes last.
    runs: Vec<Run>,
    /// A directory was read in order to its end: the next one probably is, too.
    is_expecting: bool,
}

/// A directory whose files are read.
#[derive(Debug)]
struct Run {
    directory: u64,
    /// When it began.
    moment: Moment,
    listing: Arc<Listing>,
    /// Place of the last file that was opened.
    last: usize,
    /// How many were opened in order.
    in_order: u32,
    /// Place behind the last file that was fetched ahead.
    horizon: usize,
    window: usize,
}

/// What follows from an open.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Nothing yet, or nothing yet again.
    Wait,
    /// Fetch the files at these places.
    Fetch(std::ops::Range<usize>),
}

impl FilesAhead {
    /// At most `most` files ahead of a reader.
    pub(crate) fn new(most: usize) -> FilesAhead {
        FilesAhead { most, is_watching: AtomicBool::new(false), watched: Mutex::default() }
    }

    /// The file was opened, or read from its beginning; `missed` if it had to be fetched.
    pub(crate) fn opened(&self, view: &View, content: &Content, node: &Node, missed: bool) {
        if self.most == 0 || !(missed || self.is_watching.load(Ordering::Relaxed)) {
            return;
        }
        let directory = parent_id(node);
        let path = &node.located.path;
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let moment = view.moment();
        watched.runs.retain(|run| run.moment == moment);
        let known = watched.runs.iter().position(|run| run.directory == directory);
        let listing = match known {
            Some(place) => watched.runs.get(place).map(|run| run.listing.clone()),
            None if missed => view.kept(directory).filter(|listing| listing.entries.len() <= LARGEST_LISTING),
            None => None,
        };
        let Some(listing) = listing else { return };
        let Ok(place) = listing.entries.binary_search_by(|listed| (*listed.name).cmp(name)) else { return };
        let mut run = match known {
            Some(known) => watched.runs.remove(known),
            None => {
                let in_order = if std::mem::take(&mut watched.is_expecting) { IN_ORDER } else { 0 };
                let window = FIRST_WINDOW.min(self.most);
                Run { directory, moment, listing, last: place, in_order, horizon: place + 1, window }
            }
        };
        let goes_on = match run.step(place, self.most) {
            Step::Wait => true,
            Step::Fetch(places) => {
                let (horizon, any) = fetch(view, content, &run.listing, places);
                run.horizon = horizon;
                any
            }
        };
        let is_at_end = place + 1 >= run.listing.entries.len();
        if is_at_end && run.in_order >= IN_ORDER {
            watched.is_expecting = true;
            view.expect_reader();
        }
        if goes_on && !is_at_end {
            if watched.runs.len() >= MOST_RUNS {
                watched.runs.remove(0);
            }
            watched.runs.push(run);
        }
        self.is_watching.store(!watched.runs.is_empty(), Ordering::Relaxed);
    }
}

impl Run {
    /// The file at `place` was opened.
    fn step(&mut self, place: usize, most: usize) -> Step {
        let skipped = place.checked_sub(self.last + 1);
        if skipped.is_some_and(|skipped| skipped <= SKIPPED) {
            self.in_order = self.in_order.saturating_add(1);
        } else if place != self.last {
            (self.in_order, self.horizon, self.window) = (0, place + 1, FIRST_WINDOW.min(most));
        }
        self.last = place;
        self.horizon = self.horizon.max(place + 1);
        let ahead = self.horizon - (place + 1);
        // In batches: each costs a wake-up of another thread.
        if self.in_order < IN_ORDER || ahead > self.window / 2 {
            return Step::Wait;
        }
        let places = self.horizon..(place + 1 + self.window).min(self.listing.entries.len());
        self.window = (self.window * 2).min(most);
        if places.is_empty() { Step::Wait } else { Step::Fetch(places) }
    }
}

/// Begins to fetch the files at `places`, up to [`MOST_BYTES`]. Returns where it ended, and whether there was any
/// that was not in the cache.
fn fetch(view: &View, content: &Content, listing: &Listing, places: std::ops::Range<usize>) -> (usize, bool) {
    let (mut bytes, mut any, mut candidates) = (0, false, 0);
    for place in places.clone() {
        let Some(listed) = listing.entries.get(place) else { break };
        let Some(node) = view.remembered(listed.attributes.inode) else { continue };
        let entry = &node.located.entry;
        let is_small = entry.kind() == EntryKind::File && (1..=LARGEST).contains(&entry.size);
        if !is_small || entry.is_chunked() {
            continue;
        }
        bytes += entry.size;
        if bytes > MOST_BYTES {
            return (place, any);
        }
        candidates += 1;
        any |= content.fetch_ahead(&node);
    }
    // Directories and links in between say nothing about the cache.
    (places.end, any || candidates == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::attributes::Attributes;
    use crate::view::Listed;

    fn run(files: usize) -> Run {
        let listed = |number: usize| Listed {
            name: format!("{number:06}").into_bytes().into(),
            attributes: Attributes::default(),
        };
        let listing = Arc::new(Listing { entries: (0..files).map(listed).collect(), parent: 1 });
        Run {
            directory: 2,
            moment: Moment::START,
            listing,
            last: 0,
            in_order: 0,
            horizon: 1,
            window: FIRST_WINDOW,
        }
    }

    /// Opens the files at `places` and returns those that were fetched ahead of each.
    fn steps(run: &mut Run, places: impl IntoIterator<Item = usize>) -> Vec<std::ops::Range<usize>> {
        let fetched = places.into_iter().map(|place| match run.step(place, 32) {
            Step::Wait => 0..0,
            Step::Fetch(places) => {
                run.horizon = places.end;
                places
            }
        });
        fetched.filter(|places| !places.is_empty()).collect()
    }

    #[test]
    fn the_window_grows_with_a_reader_in_order_and_no_file_is_fetched_twice() {
        let mut run = run(200);
        let fetched = steps(&mut run, 0..200);
        assert_eq!(fetched.first(), Some(&(3..7)));
        assert!(fetched.iter().map(ExactSizeIterator::len).max() > Some(16));
        assert!(fetched.iter().all(|places| places.len() <= 32));
        let all: Vec<usize> = fetched.into_iter().flatten().collect();
        assert_eq!(all, (3..200).collect::<Vec<_>>());
    }

    #[test]
    fn a_reader_without_order_gets_nothing_ahead() {
        let mut run = run(1000);
        assert!(steps(&mut run, (0..1000).map(|number| number * 389 % 1000)).is_empty());
    }

    #[test]
    fn a_step_aside_begins_anew() {
        let mut run = run(1000);
        assert!(!steps(&mut run, 0..50).is_empty());
        assert!(steps(&mut run, [500, 501]).is_empty());
        assert_eq!(steps(&mut run, [502]).first(), Some(&(503..507)));
    }
}
