//! What the loop remembers between rounds, on disk.
//!
//! ```text
//! STATE/lock                  held by the process that works on it
//! STATE/images/HEX.json       one converted image
//! STATE/retired/HEX.json      an image that is no longer wished for, or replaced
//! STATE/unfit/HEX.json        an image that was fetched and cannot be published
//! STATE/rounds.json           the last rounds
//! STATE/repository.json       the repository's name
//! ```
//!
//! Each file is replaced as a whole, so that a kill at any point leaves the old one or
//! the new one. What is lost costs work and nothing else: an image without a record is
//! looked at again, and its layers are found in the repository.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::failure::ConvertError;

/// Largest accepted record; an image has at most a few hundred layers.
const MAX_RECORD_BYTES: u64 = 4 << 20;
/// Directories of records.
const BELOW: [&str; 3] = ["images", "retired", "unfit"];

/// A converted image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    /// The image as the list means it.
    pub(super) image: String,
    /// Digest of its manifest or index.
    pub(super) digest: String,
    /// Digest of what the name led to; more than the image if that is an index of which
    /// one platform was wanted.
    pub(super) top_digest: String,
    /// The platforms that were converted.
    pub(super) platform: String,
    /// The layout that it was converted to.
    #[serde(default)]
    pub(super) layout: String,
    /// Its layers in the repository.
    pub(super) layers: Vec<LayerRecord>,
    /// What it has in the repository beside its layers, absolute paths.
    #[serde(default)]
    pub(super) others: Vec<String>,
    /// The thin image.
    pub(super) output: Option<OutputRecord>,
    /// The revision that has all layers.
    pub(super) revision: u64,
    /// When it was converted, Unix time.
    pub(super) converted: i64,
    /// What was fetched for it.
    pub(super) bytes_downloaded: u64,
}

/// A layer of a converted image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    /// Its directory, an absolute path in the repository.
    pub(super) path: String,
    /// Bytes of its blob.
    pub(super) bytes: u64,
}

/// A thin image that was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OutputRecord {
    pub(super) reference: String,
    pub(super) digest: String,
}

/// An image whose layers go when the grace is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RetiredRecord {
    pub(super) record: ImageRecord,
    /// Since when nobody wishes for it, Unix time.
    pub(super) since: i64,
}

/// An image that was fetched and turned out to be unfit: what its layers hold is not what it says, or breaks a rule.
/// Until it changes, it is fetched again only now and then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UnfitRecord {
    /// The image as the list means it.
    image: String,
    /// Digest of what the name led to.
    top_digest: String,
    /// What is wrong with it.
    error: String,
    /// How often this was found out.
    times: u32,
    /// When it was found out last, Unix time.
    since: i64,
}

impl UnfitRecord {
    /// When it is fetched again, Unix time: an hour later, and twice as long each time, but within a day.
    fn due(&self) -> i64 {
        let hours = 1_i64.checked_shl(self.times.saturating_sub(1)).unwrap_or(i64::MAX);
        self.since.saturating_add(hours.clamp(1, 24) * 3600)
    }
}

impl ImageRecord {
    /// All it has in the repository.
    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().map(|layer| &layer.path).chain(&self.others).map(String::as_str)
    }

    /// Bytes of all its layers.
    pub(super) fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes).sum()
    }
}

/// The directory, locked.
#[derive(Debug)]
pub(super) struct Records {
    directory: PathBuf,
    fqrn: String,
    _lock: File,
}

impl Records {
    /// Opens the directory of a repository's records and makes it if necessary.
    pub(super) fn open(directory: &Path, fqrn: &str) -> Result<Self, ConvertError> {
        let failed = |cause| failed(directory, cause);
        for below in BELOW {
            fs::create_dir_all(directory.join(below)).map_err(failed)?;
        }
        let lock = File::options().create(true).truncate(false).write(true).open(directory.join("lock"));
        let lock = lock.map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(ConvertError::Busy { directory: directory.to_owned() });
            }
            Err(fs::TryLockError::Error(cause)) => return Err(failed(cause)),
        }
        let records = Self { directory: directory.to_owned(), fqrn: fqrn.to_owned(), _lock: lock };
        records.remove_remains();
        let owner = directory.join("repository.json");
        match read::<String>(&owner) {
            Some(before) if before != fqrn => {
                return Err(ConvertError::OtherRepository { now: fqrn.to_owned(), before });
            }
            Some(_) => {}
            None => records.write(&owner, &fqrn)?,
        }
        Ok(records)
    }

    /// The record of an image, if there is a readable one.
    pub(super) fn image(&self, image: &str) -> Option<ImageRecord> {
        read(&self.image_file(image)).filter(|record: &ImageRecord| record.image == image)
    }

    /// All images whose records can be read.
    pub(super) fn images(&self) -> Result<Vec<ImageRecord>, ConvertError> {
        Ok(self.all("images")?.0)
    }

    /// All images and all retired ones. An error if one of them cannot be read: what it has
    /// must not be taken for unneeded.
    pub(super) fn everything(&self) -> Result<(Vec<ImageRecord>, Vec<RetiredRecord>), ConvertError> {
        let (images, unreadable) = self.all("images")?;
        let (retired, also) = self.all("retired")?;
        match unreadable.or(also) {
            None => Ok((images, retired)),
            Some(file) => Err(ConvertError::Record { file }),
        }
    }

    /// The repository that the records are of.
    pub(super) fn fqrn(&self) -> &str {
        &self.fqrn
    }

    /// Keeps an image. What it was before is retired first, so that its layers are not
    /// forgotten.
    pub(super) fn keep(&self, record: &ImageRecord, now: i64) -> Result<(), ConvertError> {
        if let Some(before) = self.image(&record.image)
            && (before.digest != record.digest || before.layout != record.layout)
        {
            self.retire(&before, now)?;
        }
        self.write(&self.image_file(&record.image), record)?;
        self.remove(&self.unfit_file(&record.image))?;
        // It is wished for again: another grace begins when it leaves again.
        self.remove(&self.retired_file(record))
    }

    /// Takes an image off the list: its grace begins.
    pub(super) fn take_off(&self, record: &ImageRecord, now: i64) -> Result<(), ConvertError> {
        self.retire(record, now)?;
        self.remove(&self.image_file(&record.image))
    }

    /// Notes that an image was fetched and turned out to be unfit.
    pub(super) fn note_unfit(
        &self,
        image: &str,
        top_digest: &str,
        error: &str,
        now: i64,
    ) -> Result<(), ConvertError> {
        let before = self.unfit_record(image, top_digest).map_or(0, |before| before.times);
        let record = UnfitRecord {
            image: image.to_owned(),
            top_digest: top_digest.to_owned(),
            error: error.to_owned(),
            times: before.saturating_add(1),
            since: now,
        };
        self.write(&self.unfit_file(image), &record)
    }

    /// That an image is known to be unfit, and is not to be fetched again now.
    pub(super) fn unfit(&self, image: &str, top_digest: &str, now: i64) -> Option<ConvertError> {
        let record = self.unfit_record(image, top_digest)?;
        // A clock that was set back does not make it wait for longer.
        let waits = (record.since..record.due()).contains(&now);
        waits.then(|| ConvertError::KnownUnfit {
            error: record.error.clone(),
            until: super::rfc3339(record.due()),
            record: self.unfit_file(image),
        })
    }

    /// Forgets what is known of images that are not among these.
    pub(super) fn keep_unfit(&self, images: &HashSet<String>) -> Result<(), ConvertError> {
        let (records, _) = self.all::<UnfitRecord>("unfit")?;
        for record in records.iter().filter(|record| !images.contains(&record.image)) {
            self.remove(&self.unfit_file(&record.image))?;
        }
        Ok(())
    }

    fn unfit_record(&self, image: &str, top_digest: &str) -> Option<UnfitRecord> {
        let record: UnfitRecord = read(&self.unfit_file(image))?;
        (record.image == image && record.top_digest == top_digest).then_some(record)
    }

    /// Forgets a retired image whose layers are gone.
    pub(super) fn forget(&self, retired: &RetiredRecord) -> Result<(), ConvertError> {
        self.remove(&self.retired_file(&retired.record))
    }

    /// The last rounds, as they were written.
    pub(super) fn rounds<T: DeserializeOwned>(&self) -> Option<T> {
        read(&self.directory.join("rounds.json"))
    }

    /// Keeps the last rounds.
    pub(super) fn keep_rounds<T: Serialize>(&self, rounds: &T) -> Result<(), ConvertError> {
        self.write(&self.directory.join("rounds.json"), rounds)
    }

    fn retire(&self, record: &ImageRecord, now: i64) -> Result<(), ConvertError> {
        let file = self.retired_file(record);
        self.write(&file, &RetiredRecord { record: record.clone(), since: now })
    }

    fn image_file(&self, image: &str) -> PathBuf {
        self.directory.join("images").join(file_name(&[image]))
    }

    fn unfit_file(&self, image: &str) -> PathBuf {
        self.directory.join("unfit").join(file_name(&[image]))
    }

    fn retired_file(&self, record: &ImageRecord) -> PathBuf {
        self.directory.join("retired").join(file_name(&[&record.image, &record.digest, &record.layout]))
    }

    /// What can be read, and a file that cannot.
    fn all<T: DeserializeOwned>(&self, below: &str) -> Result<(Vec<T>, Option<PathBuf>), ConvertError> {
        let directory = self.directory.join(below);
        let mut files = Vec::new();
        for entry in fs::read_dir(&directory).map_err(|cause| failed(&directory, cause))? {
            files.push(entry.map_err(|cause| failed(&directory, cause))?.path());
        }
        files.sort();
        let (mut records, mut unreadable) = (Vec::with_capacity(files.len()), None);
        for file in files {
            match read(&file) {
                Some(record) => records.push(record),
                // Removed this moment by hand, if it is not there.
                None if file.exists() => unreadable = Some(file),
                None => {}
            }
        }
        Ok((records, unreadable))
    }

    fn write<T: Serialize>(&self, file: &Path, value: &T) -> Result<(), ConvertError> {
        let text = serde_json::to_vec(value).expect("strings, numbers and lists always have a JSON form");
        let write = || {
            let directory = file.parent().unwrap_or(&self.directory);
            let mut temporary = tempfile::Builder::new().prefix(".new-").tempfile_in(directory)?;
            temporary.write_all(&text)?;
            temporary.as_file().sync_all()?;
            temporary.persist(file).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(|cause| failed(file, cause))
    }

    fn remove(&self, file: &Path) -> Result<(), ConvertError> {
        match fs::remove_file(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(|cause| failed(file, cause)),
        }
    }

    /// Files that a killed process did not finish.
    fn remove_remains(&self) {
        for directory in ["."].iter().chain(&BELOW) {
            for entry in fs::read_dir(self.directory.join(directory)).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(".new-") {
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
    }
}

fn failed(path: &Path, cause: io::Error) -> ConvertError {
    ConvertError::State { path: path.to_owned(), cause }
}

/// A file that is not there, or is not what it should be, is none.
fn read<T: DeserializeOwned>(file: &Path) -> Option<T> {
    let opened = match File::open(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "a record cannot be read and is made anew");
            return None;
        }
    };
    let mut text = Vec::new();
    let read = opened.take(MAX_RECORD_BYTES + 1).read_to_end(&mut text);
    if read.is_err() || text.len() as u64 > MAX_RECORD_BYTES {
        tracing::warn!(file = %file.display(), "a record cannot be read and is made anew");
        return None;
    }
    match serde_json::from_slice(&text) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "a record is damaged and is made anew");
            None
        }
    }
}

/// Names of images have slashes; their hash has none.
fn file_name(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    format!("{}.json", hex::encode(hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(image: &str, digest: &str) -> ImageRecord {
        ImageRecord {
            image: image.to_owned(),
            digest: digest.to_owned(),
            top_digest: digest.to_owned(),
            platform: "linux/amd64".to_owned(),
            layout: String::new(),
            layers: vec![LayerRecord { path: format!("/layers/{digest}"), bytes: 7 }],
            others: Vec::new(),
            output: None,
            revision: 2,
            converted: 1,
            bytes_downloaded: 7,
        }
    }

    #[test]
    fn an_image_that_moves_on_leaves_its_old_layers_in_the_retired_ones() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path(), "r.example.org").unwrap();
        records.keep(&record("r.org/a:1", "one"), 10).unwrap();
        records.keep(&record("r.org/a:1", "two"), 20).unwrap();
        assert_eq!(records.image("r.org/a:1").unwrap().digest, "two");
        let retired = records.everything().unwrap().1;
        assert_eq!((retired[0].record.digest.as_str(), retired[0].since), ("one", 20));
        // It comes back and leaves again: a new grace begins.
        records.keep(&record("r.org/a:1", "one"), 30).unwrap();
        records.take_off(&record("r.org/a:1", "one"), 40).unwrap();
        assert!(records.image("r.org/a:1").is_none());
        let dates: Vec<i64> = records.everything().unwrap().1.iter().map(|retired| retired.since).collect();
        assert_eq!(dates.len(), 2);
        assert!(dates.contains(&30) && dates.contains(&40), "{dates:?}");
    }

    #[test]
    fn an_unfit_image_is_fetched_again_after_an_hour_then_after_two_and_at_once_when_it_changed() {
        const HOUR: i64 = 3600;
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path(), "r.example.org").unwrap();
        let waits = |digest: &str, now| records.unfit("r.org/a:1", digest, now).is_some();
        records.note_unfit("r.org/a:1", "one", "it lies", 0).unwrap();
        assert!(waits("one", 0) && waits("one", HOUR - 1) && !waits("one", HOUR) && !waits("one", -1));
        let told = records.unfit("r.org/a:1", "one", 10).unwrap().to_string();
        assert!(told.contains("it lies") && told.contains("1970-01-01T01:00:00Z"), "{told}");
        records.note_unfit("r.org/a:1", "one", "it lies", HOUR).unwrap();
        assert!(waits("one", 3 * HOUR - 1) && !waits("one", 3 * HOUR));
        for _ in 0..100 {
            records.note_unfit("r.org/a:1", "one", "it lies", 0).unwrap();
        }
        assert!(waits("one", 24 * HOUR - 1) && !waits("one", 24 * HOUR));
        assert!(!waits("two", 0));
        records.note_unfit("r.org/a:1", "two", "it lies", 0).unwrap();
        assert!(waits("two", 0) && !waits("two", HOUR), "another image begins anew");
        records.keep(&record("r.org/a:1", "two"), 1).unwrap();
        assert!(!waits("two", 1));
        records.note_unfit("r.org/a:1", "two", "it lies", 0).unwrap();
        records.keep_unfit(&HashSet::new()).unwrap();
        assert!(!waits("two", 0));
    }

    #[test]
    fn damaged_records_and_remains_of_a_kill_are_no_obstacle() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path(), "r.example.org").unwrap();
        records.keep(&record("r.org/a:1", "one"), 10).unwrap();
        fs::write(directory.path().join("images/x.json"), b"{\"image\":").unwrap();
        fs::write(directory.path().join("images/.new-1"), b"half").unwrap();
        assert_eq!(records.images().unwrap().len(), 1);
        assert!(
            matches!(records.everything(), Err(ConvertError::Record { .. })),
            "nothing is removed on its word"
        );
        assert!(matches!(Records::open(directory.path(), "r.example.org"), Err(ConvertError::Busy { .. })));
        drop(records);
        let other = Records::open(directory.path(), "other.example.org");
        assert!(matches!(other, Err(ConvertError::OtherRepository { .. })));
        Records::open(directory.path(), "r.example.org").unwrap();
        assert!(!directory.path().join("images/.new-1").exists());
    }
}
