//! Which revision a repository shows, and how it moves on.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use cvmfs_client::clock::{Clock, ManualClock, SystemClock};
use cvmfs_client::error::ClientError;
use cvmfs_client::repository::{Refreshed, Repository};
use cvmfs_client::snapshot::Located;
use cvmfs_client::trust::TrustError;
use cvmfs_format::hash::ContentHash;
use support::{manifest_of, republish, seconds};
use testkit::tar::TarBuilder;
use testkit::{Fixture, Origin, Published};

/// Name, revision and time of the fixture's tags.
const TAGS: [(&str, u64, i64); 4] =
    [("v1", 2, 1_795_449_215), ("v2", 3, 1_795_449_217), ("v3", 4, 1_795_449_219), ("v5", 6, 1_795_449_223)];

struct Site {
    fixture: Fixture,
    origin: Option<Origin>,
    url: String,
    clock: Arc<ManualClock>,
}

impl Site {
    fn new(fixture: &str) -> Self {
        let fixture = Fixture::unpack(fixture).unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        let (url, clock) = (origin.url(), Arc::new(ManualClock::at(SystemClock.unix())));
        Self { fixture, origin: Some(origin), url, clock }
    }

    fn open(&self, options: &[(&str, &str)]) -> Result<Repository, ClientError> {
        let key = self.fixture.master_pub.to_str().unwrap();
        let mut all = vec![("CVMFS_SERVER_URL", self.url.as_str()), ("CVMFS_PUBLIC_KEY", key)];
        all.extend(options);
        let settings = support::settings(&self.fixture.fqrn, self.fixture.dir.path(), &all);
        Repository::open(settings, self.clock.clone())
    }

    fn blacklist(&self, text: &str) {
        std::fs::write(self.fixture.dir.path().join("blacklist"), text).unwrap();
    }

    /// Publishes the same root catalog as a newer revision.
    fn publish(&self) {
        republish(&self.fixture, |manifest| {
            manifest.revision += 1;
            manifest.timestamp += 1;
        });
    }

    fn root_of(&self, tag: &str) -> ContentHash {
        let tags = std::fs::read_to_string(self.fixture.root().join("tags.txt")).unwrap();
        let line = tags.lines().find(|line| line.split(' ').next() == Some(tag)).unwrap();
        ContentHash::parse(line.split(' ').nth(1).unwrap().as_bytes()).unwrap()
    }
}

fn revision(repository: &Repository) -> u64 {
    repository.snapshot().pinned().revision
}

#[test]
fn a_tag_a_date_or_a_root_hash_fixes_the_revision() {
    let site = Site::new("history");
    for (tag, number, unix) in TAGS {
        let repository = site.open(&[("CVMFS_REPOSITORY_TAG", tag)]).unwrap();
        assert_eq!(revision(&repository), number, "{tag}");
        assert_eq!(repository.snapshot().pinned().root_hash, site.root_of(tag));
        assert!(repository.is_fixed() && repository.status().fixed);
        assert_eq!(repository.refresh(seconds(10)).unwrap(), Refreshed::UpToDate);
        assert_eq!(revision(&repository), number, "a fixed revision stays");
        let date = time_text(unix);
        let by_date = site.open(&[("CVMFS_REPOSITORY_DATE", &date)]).unwrap();
        assert_eq!(revision(&by_date), number, "{date}");
        let hash = site.root_of(tag).to_string();
        let by_hash = site.open(&[("CVMFS_ROOT_HASH", &hash), ("CVMFS_REPOSITORY_TAG", "v3")]).unwrap();
        assert_eq!(
            revision(&by_hash),
            number,
            "the hash wins over the tag, and the catalog tells its revision"
        );
    }
    let newest = site.open(&[]).unwrap();
    assert!(!newest.is_fixed());
    assert_eq!(revision(&newest), 6);
}

fn time_text(unix: i64) -> String {
    let date = time::OffsetDateTime::from_unix_timestamp(unix).unwrap();
    let (year, month, day) = date.to_calendar_date();
    let (hour, minute, second) = date.to_hms();
    format!("{year}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", u8::from(month))
}

#[test]
fn a_tag_or_date_that_does_not_exist_is_refused_and_those_that_exist_are_named() {
    let site = Site::new("history");
    let error = site.open(&[("CVMFS_REPOSITORY_TAG", "v4")]).unwrap_err();
    assert_eq!(error.exit_code(), 5);
    let text = error.to_string();
    assert!(text.contains("'v4'") && text.contains("'v5'") && text.contains("history.peer"), "{text}");
    let error = site.open(&[("CVMFS_REPOSITORY_DATE", "2001-01-01T00:00:00Z")]).unwrap_err();
    assert!(error.to_string().contains("2001-01-01"), "{error}");
    let without = Site::new("basic-sha1");
    republish(&without.fixture, |manifest| manifest.history = None);
    let error = without.open(&[("CVMFS_REPOSITORY_TAG", "v1")]).unwrap_err();
    assert!(error.to_string().contains("has no history"), "{error}");
}

#[test]
fn a_tag_is_found_without_a_server_once_it_was_mounted() {
    let mut site = Site::new("history");
    site.open(&[("CVMFS_REPOSITORY_TAG", "v2")]).unwrap();
    site.origin = None;
    let repository = site.open(&[("CVMFS_REPOSITORY_TAG", "v2")]).unwrap();
    assert_eq!(revision(&repository), 3);
    assert!(!repository.status().online);
    site.open(&[("CVMFS_REPOSITORY_TAG", "v1")]).unwrap_err();
}

#[test]
fn row_31_a_replayed_manifest_is_no_way_to_older_tags() {
    let site = Site::new("history");
    let old = std::fs::read(site.fixture.storage.join(".cvmfspublished")).unwrap();
    site.publish();
    site.open(&[("CVMFS_REPOSITORY_TAG", "v2")]).unwrap();
    std::fs::write(site.fixture.storage.join(".cvmfspublished"), old).unwrap();
    let repository = site.open(&[("CVMFS_REPOSITORY_TAG", "v2")]).unwrap();
    assert!(!repository.status().online, "the known history is used, not the older one");
    let error = site.open(&[]).unwrap_err();
    assert!(matches!(error, ClientError::Trust(TrustError::Replayed { .. })), "{error}");
    assert!(error.to_string().contains("cvmfsmanifest."), "{error}");
}

#[test]
fn the_alternative_path_is_used_for_a_fixed_root_catalog() {
    let site = Site::new("history");
    let root = site.root_of("v2");
    let path = format!("data/{}/{}C", &root.to_string()[..2], &root.to_string()[2..]);
    let storage = &site.fixture.storage;
    std::fs::rename(storage.join(path), storage.join(format!(".cvmfsalt-{root}C"))).unwrap();
    let hash = root.to_string();
    site.open(&[("CVMFS_ROOT_HASH", &hash)]).unwrap_err();
    // A missing object is not asked for again at once; another client does.
    let cache = site.fixture.dir.path().join("other");
    let options = [
        ("CVMFS_ROOT_HASH", &*hash),
        ("CVMFS_ALT_ROOT_PATH", "yes"),
        ("CVMFS_CACHE_BASE", cache.to_str().unwrap()),
    ];
    assert_eq!(revision(&site.open(&options).unwrap()), 3);
}

#[test]
fn an_administrator_can_switch_to_another_root_catalog_and_stays_there() {
    let site = Site::new("history");
    let repository = site.open(&[]).unwrap();
    assert_eq!(repository.switch_root(site.root_of("v1"), seconds(10)).unwrap(), Refreshed::Updated);
    assert_eq!(revision(&repository), 2);
    assert_eq!(repository.refresh(seconds(10)).unwrap(), Refreshed::UpToDate);
    assert_eq!((revision(&repository), repository.is_fixed()), (2, true));
    let absent = ContentHash::parse(b"00000000000000000000000000000000000000aa").unwrap();
    repository.switch_root(absent, seconds(10)).unwrap_err();
    assert_eq!(revision(&repository), 2);
    site.blacklist(&format!("<{} 4\n", site.fixture.fqrn));
    let error = repository.switch_root(site.root_of("v2"), seconds(10)).unwrap_err();
    assert!(error.to_string().contains("blacklisted"), "{error}");
}

#[test]
fn row_30_a_blacklisted_revision_is_refused_while_mounted_until_a_better_one_is_there() {
    let site = Site::new("history");
    let repository = site.open(&[]).unwrap();
    repository.check_usable().unwrap();
    site.blacklist(&format!("<{} 7\n", site.fixture.fqrn));
    let error = repository.refresh(seconds(10)).unwrap_err();
    assert!(error.to_string().contains("revision 6"), "{error}");
    let error = repository.check_usable().unwrap_err();
    assert!(matches!(error, ClientError::Refused(_)), "{error}");
    assert!(repository.status().refused.unwrap().contains("at least 7"));
    site.publish();
    // The same root catalog under a higher number: nothing is switched, but the number counts.
    repository.refresh(seconds(10)).unwrap();
    repository.check_usable().unwrap();
    assert_eq!(repository.status().refused, None);
}

#[test]
fn row_30_a_blacklisted_fixed_revision_is_refused_at_mount_and_while_mounted() {
    let site = Site::new("history");
    let hash = site.root_of("v2").to_string();
    let repository = site.open(&[("CVMFS_ROOT_HASH", &hash)]).unwrap();
    site.blacklist(&format!("<{} 4\n", site.fixture.fqrn));
    repository.refresh(seconds(10)).unwrap();
    repository.check_usable().unwrap_err();
    for option in [("CVMFS_ROOT_HASH", &*hash), ("CVMFS_REPOSITORY_TAG", "v2")] {
        let error = site.open(&[option]).unwrap_err();
        assert!(error.to_string().contains("revision 3"), "{option:?}: {error}");
        assert_eq!(error.exit_code(), 3);
    }
}

#[test]
fn row_27_the_end_of_the_whitelist_is_visible_days_ahead() {
    let site = Site::new("history");
    let repository = site.open(&[]).unwrap();
    let expires = repository.status().whitelist_expires.unwrap();
    assert_eq!(repository.status().warnings, [""; 0]);
    for (before, days, words) in
        [(5 * 86_400, 5, "expires in 5 days"), (3_600, 0, "within a day"), (-1, -1, "has expired")]
    {
        site.clock.set(expires - before);
        let status = repository.status();
        assert_eq!(status.whitelist_days, Some(days));
        assert!(status.warnings[0].contains(words), "{:?}", status.warnings);
    }
}

#[test]
fn row_27_an_expired_whitelist_refuses_a_cold_mount_and_leaves_a_running_one_its_revision() {
    let site = Site::new("history");
    let running = site.open(&[]).unwrap();
    site.clock.set(running.status().whitelist_expires.unwrap());
    running.refresh(seconds(10)).unwrap_err();
    assert_eq!(revision(&running), 6);
    running.check_usable().unwrap();
    let cold = site.fixture.dir.path().join("cold");
    let error = site.open(&[("CVMFS_CACHE_BASE", cold.to_str().unwrap())]).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("whitelist expired on 2") && text.contains(&site.fixture.fqrn), "{text}");
}

#[test]
fn row_26_a_clock_that_jumps_a_year_forward_keeps_the_revision_and_back_again_recovers() {
    let site = Site::new("history");
    let repository = site.open(&[]).unwrap();
    let now = site.clock.unix();
    let expires = repository.status().whitelist_expires.unwrap();
    site.clock.set(expires + 365 * 86_400);
    repository.refresh(seconds(10)).unwrap_err();
    assert_eq!(revision(&repository), 6);
    assert!(repository.status().last_error.unwrap().contains("whitelist expired"));
    assert_eq!(repository.ttl(), Duration::from_secs(180), "it is tried again soon");
    site.clock.set(now - 365 * 86_400);
    repository.refresh(seconds(10)).unwrap();
    assert_eq!(repository.status().last_error, None);
}

#[test]
fn the_time_between_looks_is_the_catalogs_or_the_configured_maximum_and_180_seconds_offline() {
    let mut site = Site::new("history");
    let repository = site.open(&[]).unwrap();
    assert_eq!(repository.ttl(), Duration::from_secs(240));
    let brief = site.open(&[("CVMFS_MAX_TTL", "2")]).unwrap();
    assert_eq!(brief.ttl(), Duration::from_secs(120));
    site.origin = None;
    repository.refresh(seconds(10)).unwrap_err();
    assert_eq!(repository.ttl(), Duration::from_secs(180));
    brief.refresh(seconds(10)).unwrap_err();
    assert_eq!(brief.ttl(), Duration::from_secs(120));
    brief.set_max_ttl(Some(Duration::from_secs(60)));
    assert_eq!((brief.ttl(), brief.max_ttl()), (Duration::from_secs(60), Some(Duration::from_secs(60))));
    brief.set_max_ttl(None);
    assert_eq!(brief.ttl(), Duration::from_secs(180));
}

#[test]
fn row_45_a_repository_that_vanished_from_its_servers_goes_on_from_the_cache() {
    let site = Site::new("history");
    let repository = site.open(&[]).unwrap();
    std::fs::remove_dir_all(&site.fixture.storage).unwrap();
    std::fs::create_dir(&site.fixture.storage).unwrap();
    repository.refresh(seconds(10)).unwrap_err();
    assert_eq!(revision(&repository), 6);
    let again = site.open(&[]).unwrap();
    assert_eq!((revision(&again), again.status().online), (6, false));
}

#[test]
fn entries_are_counted_for_statfs_and_nested_catalogs_can_be_detached() {
    let site = Site::new("basic-sha1");
    let repository = site.open(&[]).unwrap();
    let counts = repository.entry_counts();
    let manifest = &site.fixture.manifest;
    assert!(counts.total >= manifest.len() as u64, "{counts:?} of {}", manifest.len());
    let snapshot = repository.snapshot();
    for entry in manifest {
        snapshot.resolve(entry.path.as_bytes(), seconds(10)).unwrap();
    }
    let attached = snapshot.attached().len();
    assert!(attached > 1);
    assert!(repository.entry_counts().attached > counts.attached);
    assert_eq!(repository.detach_nested_catalogs(), attached - 1);
    assert_eq!(snapshot.attached().len(), 1);
    assert_eq!(repository.entry_counts().attached, counts.attached);
    let last = manifest.last().unwrap();
    assert!(snapshot.resolve(last.path.as_bytes(), seconds(10)).unwrap().is_some(), "attached again");
}

#[test]
fn the_newest_manifest_is_what_a_client_follows() {
    let site = Site::new("history");
    let repository = site.open(&[]).unwrap();
    for _ in 0..20 {
        site.publish();
        repository.refresh(seconds(10)).unwrap();
        let manifest = manifest_of(&site.fixture.storage);
        assert_eq!(repository.status().revision, manifest.revision);
    }
}

#[test]
fn a_directory_of_the_revision_before_does_not_lead_the_new_one_to_its_catalog() {
    let repository = Published::create("follow.example.org").unwrap();
    let publish = |text: &[u8]| {
        let set = TarBuilder::new().directory("set", 0o755).file("set/.cvmfscatalog", 0o644, b"");
        repository.ingest("/", &set.file("set/f", 0o644, text).finish(), &[]).unwrap();
    };
    publish(b"one");
    let (url, key) = (repository.origin.url(), repository.public_key());
    let options = [("CVMFS_SERVER_URL", url.as_str()), ("CVMFS_PUBLIC_KEY", key.to_str().unwrap())];
    let settings = support::settings(&repository.fqrn, repository.scratch(), &options);
    let mounted = Repository::open(settings, Arc::new(SystemClock)).unwrap();
    let before = mounted.snapshot().resolve(b"/set", seconds(10)).unwrap().unwrap();
    publish(b"two and more");
    assert_eq!(mounted.refresh(seconds(10)).unwrap(), Refreshed::Updated);

    // Somebody who began before the change goes on with the directory that he has.
    let snapshot = mounted.snapshot();
    let size =
        |directory: &Located| snapshot.child(directory, b"f", seconds(10)).unwrap().unwrap().entry.size;
    assert_eq!(size(&before), 3);
    let after = snapshot.resolve(b"/set", seconds(10)).unwrap().unwrap();
    assert_eq!(size(&after), 12, "the new revision shows its own file");
    // Once that is attached, everybody sees it.
    assert_eq!(size(&before), 12);
}
