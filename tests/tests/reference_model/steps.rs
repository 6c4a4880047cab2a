//! Sequences of operations, run side by side on a client and on the model.
//!
//! What the model demands:
//! * a success is always right: attributes, names and bytes are those of the revision in use, of an open file those
//!   of the revision in which it was opened;
//! * while the network works, everything succeeds;
//! * while it does not, what was used before and not evicted succeeds, and anything else may fail, with `EIO` or
//!   `ETIMEDOUT`;
//! * the revision never goes back, and after an update without trouble it is the newest one.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::client::{Client, Errno};
use crate::site::{Site, Trouble};
use crate::tree::{Attributes, Content, Edit, Place, Tree, edit, place};

/// Files that are open at a time.
const SLOTS: u8 = 3;
/// How long a client may remember that an object could not be had.
const MEMORY: Duration = Duration::from_secs(15);

#[derive(Debug, Clone)]
pub enum Step {
    Publish(Vec<Edit>),
    Update,
    LookUp(Place),
    List(Place),
    Open(u8, Place),
    /// From this part of the file (in 256ths), at most so many bytes.
    Read(u8, u8, u32),
    Close(u8),
    /// Several readers of one file at once.
    Together(Place, u8),
    /// Readers while a new revision is published and taken into use.
    Race(Vec<Edit>, Place),
    Evict(u8),
    Network(Option<Trouble>),
    Crash,
    Restart,
    /// Stop, lose bytes of the cache, start.
    PowerFailure(u8),
}

pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let edits = || prop::collection::vec(edit(), 1..8);
    let trouble = prop_oneof![
        Just(Trouble::Status(500)),
        Just(Trouble::Status(503)),
        Just(Trouble::Reset),
        (0_u64..600).prop_map(Trouble::Cut),
        // These two are remembered for seconds, which the test has to wait for.
        Just(Trouble::Status(404)),
        (0_u64..300).prop_map(Trouble::Flip),
    ];
    let slot = || 0..SLOTS;
    let step = prop_oneof![
        3 => edits().prop_map(Step::Publish),
        3 => Just(Step::Update),
        6 => place().prop_map(Step::LookUp),
        4 => place().prop_map(Step::List),
        5 => (slot(), place()).prop_map(|(slot, place)| Step::Open(slot, place)),
        6 => (slot(), any::<u8>(), 0_u32..80_000).prop_map(|(slot, part, length)| Step::Read(slot, part, length)),
        3 => slot().prop_map(|slot| Step::Read(slot, 0, u32::MAX)),
        1 => slot().prop_map(Step::Close),
        2 => (place(), 2_u8..8).prop_map(|(place, readers)| Step::Together(place, readers)),
        1 => (edits(), place()).prop_map(|(edits, place)| Step::Race(edits, place)),
        1 => any::<u8>().prop_map(Step::Evict),
        1 => Just(Step::Evict(0)),
        1 => trouble.prop_map(|trouble| Step::Network(Some(trouble))),
        2 => Just(Step::Network(None)),
        1 => Just(Step::Crash),
        1 => Just(Step::Restart),
        1 => any::<u8>().prop_map(Step::PowerFailure),
    ];
    (edits(), prop::collection::vec(step, 5..40)).prop_map(|(first, mut steps)| {
        steps.insert(0, Step::Publish(first));
        steps
    })
}

/// Runs the steps; an error tells which one went wrong and how.
pub fn run<C: Client>(steps: &[Step]) -> Result<(), String> {
    let mut run = Run::<C>::begin()?;
    for (number, step) in steps.iter().enumerate() {
        run.step(step).map_err(|error| format!("step {number}, {step:?}: {error}"))?;
    }
    Ok(())
}

struct Open<F> {
    file: F,
    content: Content,
}

struct Run<C: Client> {
    /// Dropped before the site whose repository it reads.
    open: [Option<Open<C::File>>; SLOTS as usize],
    client: Option<C>,
    site: Site,
    tree: Arc<Tree>,
    revision: u64,
    trouble: Option<Trouble>,
    /// When the last trouble ended that clients remember.
    remembered: Option<Instant>,
    was_disturbed: bool,
    known: Known,
}

/// What must be there without a network.
#[derive(Default)]
struct Known {
    root: bool,
    entries: HashSet<String>,
    lists: HashSet<String>,
    contents: HashSet<Content>,
}

impl<C: Client> Run<C> {
    fn begin() -> Result<Self, String> {
        let site = Site::new();
        let client = C::start(&site)?;
        Ok(Run {
            open: Default::default(),
            client: Some(client),
            tree: site.tree(1),
            site,
            revision: 1,
            trouble: None,
            remembered: None,
            was_disturbed: false,
            known: Known { root: true, ..Known::default() },
        })
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Publish(edits) => self.site.publish(edits),
            Step::Evict(choice) => {
                self.wait_for_successor();
                self.site.evict(*choice);
                self.known = Known::default();
            }
            Step::Network(trouble) => {
                self.wait_for_successor();
                self.set_network(*trouble)?;
            }
            Step::Restart => self.restart()?,
            Step::PowerFailure(choice) => {
                self.open = Default::default();
                self.client = None;
                self.site.damage_cache(*choice);
                self.known = Known::default();
                self.restart()?;
            }
            Step::Update => self.update()?,
            Step::LookUp(place) => self.look_up(&self.tree.path(place))?,
            Step::List(place) => self.list(&self.tree.path(place))?,
            Step::Open(slot, place) => self.open(*slot, &self.tree.path(place))?,
            Step::Read(slot, part, length) => self.read(*slot, *part, *length)?,
            Step::Close(slot) => self.open[usize::from(*slot)] = None,
            Step::Together(place, readers) => self.together(&self.tree.path(place), *readers)?,
            Step::Race(edits, place) => self.race(edits, place)?,
            Step::Crash => {
                // Without its root catalog and without a server a successor can only answer with errors, once callers
                // have waited long enough; supervision has tests of its own.
                let is_hopeless = self.trouble.is_some() && !self.known.root;
                if let Some(client) = self.client.as_ref().filter(|_| !is_hopeless) {
                    client.crash();
                }
            }
        }
        Ok(())
    }

    fn set_network(&mut self, trouble: Option<Trouble>) -> Result<(), String> {
        if self.trouble.is_some_and(Trouble::is_remembered) {
            self.remembered = Some(Instant::now());
        }
        self.site.disturb(trouble);
        self.trouble = trouble;
        self.was_disturbed |= trouble.is_some();
        if self.client.is_none() && trouble.is_none() {
            self.restart()?;
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<(), String> {
        self.open = Default::default();
        // A client is stopped before the next one starts.
        self.client = None;
        match C::start(&self.site) {
            Ok(client) => {
                let revision = client.revision();
                self.client = Some(client);
                self.moved_to(revision)?;
                self.known.root = true;
                if self.trouble.is_none() && revision != self.site.newest() {
                    return Err(format!(
                        "revision {revision} after a start, there is {}",
                        self.site.newest()
                    ));
                }
                Ok(())
            }
            Err(_) if self.trouble.is_some() && !self.known.root => Ok(()),
            Err(error) => Err(format!("cannot start: {error}")),
        }
    }

    fn update(&mut self) -> Result<(), String> {
        let Some(client) = &self.client else { return Ok(()) };
        let mut outcome = client.refresh();
        while outcome.is_err() && self.trouble.is_none() && self.may_remember() {
            std::thread::sleep(Duration::from_millis(100));
            outcome = client.refresh();
        }
        let revision = client.revision();
        match outcome {
            Ok(()) if revision == self.site.newest() => {}
            Ok(()) => {
                return Err(format!("revision {revision} after an update, there is {}", self.site.newest()));
            }
            Err(error) if self.trouble.is_none() => return Err(error),
            Err(_) if revision == self.revision => {}
            Err(error) => return Err(format!("revision {revision} after an update that failed: {error}")),
        }
        self.moved_to(revision)
    }

    fn moved_to(&mut self, revision: u64) -> Result<(), String> {
        if revision < self.revision {
            return Err(format!("revision {revision} after {}", self.revision));
        }
        if revision != self.revision {
            self.known.entries.clear();
            self.known.lists.clear();
            // An update that finds nothing new loads no catalog, not even one that somebody has removed meanwhile.
            self.known.root = true;
        }
        self.revision = revision;
        self.tree = self.site.tree(revision);
        Ok(())
    }

    /// Who crashed is back before anything is taken away that a start needs.
    fn wait_for_successor(&self) {
        if let Some(client) = &self.client {
            client.revision();
        }
    }

    /// Whether the client may still remember a failure of a trouble that is over.
    fn may_remember(&self) -> bool {
        self.remembered.is_some_and(|ended| ended.elapsed() < MEMORY)
    }

    /// Judges an error: whether it may be, given what is known. Tries again while clients may remember a failure.
    fn attempt<T>(
        &self,
        must_succeed: bool,
        operation: impl Fn(&C) -> Result<T, Errno>,
    ) -> Result<Option<T>, String> {
        let Some(client) = &self.client else { return Ok(None) };
        loop {
            match operation(client) {
                Ok(value) => return Ok(Some(value)),
                Err(error) if ![libc::EIO, libc::ETIMEDOUT].contains(&error.number) => {
                    return Err(error.to_string());
                }
                Err(_) if self.trouble.is_some() && !must_succeed => return Ok(None),
                Err(error) => {
                    if self.trouble.is_some() || !self.may_remember() {
                        return Err(error.to_string());
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn look_up(&mut self, path: &str) -> Result<(), String> {
        let known = self.known.entries.contains(path);
        let Some(found) = self.attempt(known, |client| client.look_up(path))? else { return Ok(()) };
        compare(path, self.tree.attributes(path), found)?;
        self.known.entries.insert(path.to_owned());
        Ok(())
    }

    fn list(&mut self, path: &str) -> Result<(), String> {
        let known = self.known.lists.contains(path);
        let Some(mut found) = self.attempt(known, |client| client.list(path))? else { return Ok(()) };
        if let Some(names) = &mut found {
            names.sort();
        }
        let expected = self.tree.list(path);
        if found != expected {
            return Err(format!("/{path} has {found:?} instead of {expected:?}"));
        }
        self.known.lists.insert(path.to_owned());
        Ok(())
    }

    fn open(&mut self, slot: u8, path: &str) -> Result<(), String> {
        let Some(content) = self.tree.content(path) else { return Ok(()) };
        let known = self.known.entries.contains(path) && self.known.contents.contains(&content);
        let Some(file) = self.attempt(known, |client| client.open(path))? else { return Ok(()) };
        let file = file.ok_or_else(|| format!("/{path} is not there"))?;
        self.open[usize::from(slot)] = Some(Open { file, content });
        self.known.entries.insert(path.to_owned());
        Ok(())
    }

    fn read(&mut self, slot: u8, part: u8, length: u32) -> Result<(), String> {
        let Some(Open { file, content }) = &self.open[usize::from(slot)] else { return Ok(()) };
        let bytes = content.bytes();
        let offset = bytes.len() * usize::from(part) / 256;
        let length = (length as usize).min(bytes.len() + 10);
        let known = self.known.contents.contains(content);
        let read = self.attempt(known, |client| client.read(file, offset as u64, length))?;
        let Some(read) = read else { return Ok(()) };
        same_bytes(&bytes[offset..bytes.len().min(offset + length)], &read)?;
        if offset == 0 && length >= bytes.len() {
            self.known.contents.insert(*content);
        }
        Ok(())
    }

    fn together(&mut self, path: &str, readers: u8) -> Result<(), String> {
        let (Some(content), Some(client)) = (self.tree.content(path), &self.client) else { return Ok(()) };
        let known = self.known.entries.contains(path) && self.known.contents.contains(&content);
        self.site.origin.clear_requests();
        let barrier = std::sync::Barrier::new(readers.into());
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let read = || {
                barrier.wait();
                read_whole(client, path)
            };
            let threads: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
            threads.into_iter().map(|thread| thread.join().expect("a reader does not panic")).collect()
        });
        let mut complete = true;
        for outcome in outcomes {
            match outcome {
                Ok(Some(read)) => same_bytes(&content.bytes(), &read)?,
                Ok(None) => return Err(format!("/{path} is not there")),
                // Judged and repeated by one reader.
                Err(error) if known || !self.was_disturbed => return Err(error.to_string()),
                Err(_) => complete = false,
            }
        }
        if !self.was_disturbed {
            let mut asked = HashSet::new();
            for request in self.site.origin.requests() {
                if request.path.contains("/data/") && !asked.insert(request.path.clone()) {
                    return Err(format!("{} was fetched twice for {readers} readers", request.path));
                }
            }
        }
        if !complete {
            let Some(read) = self.attempt(false, |client| read_whole(client, path))? else { return Ok(()) };
            same_bytes(&content.bytes(), &read.ok_or_else(|| format!("/{path} is not there"))?)?;
        }
        self.known.entries.insert(path.to_owned());
        self.known.contents.insert(content);
        Ok(())
    }

    /// Readers see one revision or the other, in each answer.
    fn race(&mut self, edits: &[Edit], place: &Place) -> Result<(), String> {
        if self.client.is_none() || self.was_disturbed {
            return Ok(());
        }
        self.site.publish(edits);
        let (before, after) = (self.tree.clone(), self.site.tree(self.site.newest()));
        let path = before.path(place);
        // Opening a pipe would wait for a writer.
        let is_readable = |tree: &Tree| tree.content(&path).is_some() || !tree.exists(&path);
        let is_file = is_readable(&before) && is_readable(&after);
        let client = self.client.as_ref().ok_or("no client")?;
        let allowed = |tree: &Tree| (tree.attributes(&path), tree.content(&path));
        let (one, other) = (allowed(&before), allowed(&after));
        let outcome = std::thread::scope(|scope| {
            let read = || {
                for _ in 0..6 {
                    let seen =
                        client.look_up(&path).map_err(|error| format!("look-up of /{path}: {error}"))?;
                    if compare(&path, one.0.clone(), seen.clone()).is_err() {
                        compare(&path, other.0.clone(), seen)?;
                    }
                    if !is_file {
                        continue;
                    }
                    let read =
                        read_whole(client, &path).map_err(|error| format!("read of /{path}: {error}"))?;
                    let is_right = |content: Option<Content>| read == content.map(Content::bytes);
                    if !is_right(one.1) && !is_right(other.1) {
                        return Err(format!("/{path} is of neither revision"));
                    }
                }
                Ok(())
            };
            let readers: Vec<_> = (0..3).map(|_| scope.spawn(read)).collect();
            let refreshed = client.refresh();
            let read: Result<(), String> =
                readers.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"));
            refreshed.and(read)
        });
        outcome?;
        let revision = client.revision();
        if revision != self.site.newest() {
            return Err(format!("revision {revision} after an update, there is {}", self.site.newest()));
        }
        self.moved_to(revision)?;
        self.look_up(&path)
    }
}

/// All bytes; nothing if there is no entry.
fn read_whole<C: Client>(client: &C, path: &str) -> Result<Option<Vec<u8>>, Errno> {
    let Some(file) = client.open(path)? else { return Ok(None) };
    let mut bytes = Vec::new();
    loop {
        // Not aligned to anything.
        let piece = client.read(&file, bytes.len() as u64, 50_001)?;
        if piece.is_empty() {
            return Ok(Some(bytes));
        }
        bytes.extend_from_slice(&piece);
    }
}

fn compare(path: &str, expected: Option<Attributes>, found: Option<Attributes>) -> Result<(), String> {
    let is_same = match (&expected, &found) {
        // Nobody published the root's owner, mode and time.
        (Some(expected), Some(found)) if path.is_empty() => {
            (expected.kind, expected.nlink) == (found.kind, found.nlink)
        }
        _ => expected == found,
    };
    if is_same { Ok(()) } else { Err(format!("/{path} is {found:?} instead of {expected:?}")) }
}

fn same_bytes(expected: &[u8], found: &[u8]) -> Result<(), String> {
    if expected == found {
        return Ok(());
    }
    let at = expected.iter().zip(found).take_while(|(one, other)| one == other).count();
    Err(format!("{} bytes instead of {}, wrong from byte {at} on", found.len(), expected.len()))
}
