//! The chain of trust against repositories that the C++ tools wrote, good and broken.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use cvmfs_client::clock::{Clock, ManualClock, SystemClock};
use cvmfs_client::config::ClientSettings;
use cvmfs_client::error::ClientError;
use cvmfs_client::store::ObjectStore;
use cvmfs_client::trust::{self, TrustError, Trusted};
use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{HashAlgorithm, ObjectKind, ObjectName};
use cvmfs_format::signature::Certificate;
use support::{manifest_of, republish, seconds};
use testkit::{Fixture, Origin};

struct Client {
    settings: ClientSettings,
    store: ObjectStore,
    clock: Arc<ManualClock>,
}

impl Client {
    fn new(fixture: &Fixture, servers: &str) -> Self {
        Self::with(fixture, &[("CVMFS_SERVER_URL", servers)])
    }

    fn with(fixture: &Fixture, options: &[(&str, &str)]) -> Self {
        let mut options = options.to_vec();
        options.push(("CVMFS_PUBLIC_KEY", fixture.master_pub.to_str().unwrap()));
        let settings = support::settings(&fixture.fqrn, fixture.dir.path(), &options);
        let store = ObjectStore::open(&settings).unwrap();
        Self { settings, store, clock: Arc::new(ManualClock::at(SystemClock.unix())) }
    }

    fn verify(&self) -> Result<Trusted, TrustError> {
        trust::verify(&self.store, &self.settings, self.clock.as_ref(), seconds(20))
    }

    fn verify_or_last_good(&self) -> Result<Trusted, TrustError> {
        trust::verify_or_last_good(&self.store, &self.settings, self.clock.as_ref(), seconds(20))
    }
}

#[test]
fn repositories_of_the_cxx_tools_are_trusted() {
    for name in ["basic-sha1", "shake128", "nocompress", "chunked", "history", "ingested-layers", "volatile"]
    {
        let fixture = Fixture::unpack(name).unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        let client = Client::new(&fixture, &origin.url());
        let trusted = client.verify().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(trusted.manifest, manifest_of(&fixture.storage), "{name}");
        assert!(!trusted.offline);
        assert!(trusted.whitelist_expires > 2_500_000_000, "{name}: until 2051");
        let known = trust::last_accepted(&client.store, &fixture.fqrn).unwrap();
        assert_eq!(known, trusted.manifest.breadcrumb(), "{name}");
    }
}

#[test]
fn row_29_each_broken_chain_is_refused_for_its_own_reason() {
    let table = [
        ("bad-expired-whitelist", "whitelist expired on 2020", 3),
        (
            "bad-fqrn",
            "repository name does not match (found basic-sha1.peer.example.org, expected other.example.org)",
            3,
        ),
        ("bad-manifest-sig", "failed to verify repository manifest", 3),
        ("bad-root-truncated", "root catalog", 4),
        ("bad-whitelist-fingerprint", "certificate not on whitelist", 3),
        ("bad-whitelist-sig", "invalid whitelist signature", 3),
        ("bad-wrong-key", "invalid whitelist signature", 3),
    ];
    for (name, reason, exit_code) in table {
        let fixture = Fixture::unpack(name).unwrap();
        let origin = Origin::serve(&fixture.storage).unwrap();
        let client = Client::new(&fixture, &origin.url());
        let error = client.verify_or_last_good().unwrap_err();
        assert!(error.to_string().contains(reason), "{name}: {error}");
        assert!(
            trust::last_accepted(&client.store, &fixture.fqrn).is_none(),
            "{name}: nothing is remembered"
        );
        assert_eq!(ClientError::from(error).exit_code(), exit_code, "{name}");
    }
}

#[test]
fn row_27_a_whitelist_ends_with_the_clock() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let client = Client::new(&fixture, &origin.url());
    let expires = client.verify().unwrap().whitelist_expires;
    client.clock.set(expires - 1);
    client.verify().unwrap();
    client.clock.set(expires);
    let error = client.verify().unwrap_err();
    assert!(error.to_string().contains("whitelist expired"), "{error}");
    // A client that had accepted the revision before keeps it.
    let trusted = client.verify_or_last_good().unwrap();
    assert!(trusted.offline);
    assert_eq!(trusted.manifest.root_catalog, manifest_of(&fixture.storage).root_catalog);
}

#[test]
fn row_31_an_older_manifest_is_refused_although_it_is_properly_signed() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let old = std::fs::read(fixture.storage.join(".cvmfspublished")).unwrap();
    republish(&fixture, |manifest| {
        manifest.revision += 1;
        manifest.timestamp += 60;
    });
    let client = Client::new(&fixture, &origin.url());
    let newest = client.verify().unwrap().manifest;
    std::fs::write(fixture.storage.join(".cvmfspublished"), old).unwrap();
    let error = client.verify().unwrap_err();
    assert!(matches!(error, TrustError::Replayed { offered, known, .. } if offered < known), "{error}");
    assert!(error.to_string().contains("cvmfschecksum"), "names the file to remove: {error}");
    assert_eq!(ClientError::from(error).exit_code(), 3);
    // Not forgotten by a restart, and the known revision stays usable.
    let again = Client::new(&fixture, &origin.url());
    let trusted = again.verify_or_last_good().unwrap();
    assert_eq!((trusted.offline, trusted.manifest.revision), (true, newest.revision));
}

#[test]
fn row_31_the_same_revision_with_an_earlier_time_of_signing_is_refused() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let client = Client::new(&fixture, &origin.url());
    client.verify().unwrap();
    republish(&fixture, |manifest| manifest.timestamp -= 1);
    assert!(matches!(client.verify().unwrap_err(), TrustError::Replayed { .. }));
}

#[test]
fn without_a_server_the_last_good_revision_is_used() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let url = origin.url();
    let first = Client::new(&fixture, &url);
    let online = first.verify().unwrap();
    drop(origin);
    let error = first.verify().unwrap_err();
    assert_eq!(ClientError::from(error).exit_code(), 4, "a network problem");
    let second = Client::new(&fixture, &url);
    let offline = second.verify_or_last_good().unwrap();
    assert!(offline.offline);
    assert_eq!(offline.manifest.breadcrumb(), online.manifest.breadcrumb());
    let root = ObjectName::new(offline.manifest.root_catalog, ObjectKind::Catalog);
    second.store.object(&root, Compression::Zlib, None, seconds(1)).unwrap();
}

#[test]
fn a_host_with_a_bad_whitelist_is_left_for_the_next_one() {
    let bad = Fixture::unpack("bad-expired-whitelist").unwrap();
    let good = Fixture::unpack("basic-sha1").unwrap();
    let (first, second) = (Origin::serve(&bad.storage).unwrap(), Origin::serve(&good.storage).unwrap());
    let client = Client::new(&good, &format!("{};{}", first.url(), second.url()));
    client.verify().unwrap();
    assert_eq!(client.store.status().host, second.url());
}

#[test]
fn row_30_blacklisted_certificates_and_revisions_are_refused_even_offline() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let client = Client::new(&fixture, &origin.url());
    let manifest = client.verify().unwrap().manifest;
    let blacklist = fixture.dir.path().join("blacklist");
    std::fs::write(&blacklist, format!("<{} {}\n", fixture.fqrn, manifest.revision + 1)).unwrap();
    let error = client.verify_or_last_good().unwrap_err();
    assert!(matches!(error, TrustError::RevisionBlacklisted { .. }), "{error}");
    let pem = fixture.keys.as_ref().unwrap().join(format!("{}.crt", fixture.fqrn));
    let certificate = Certificate::from_pem(&std::fs::read(pem).unwrap()).unwrap();
    std::fs::write(&blacklist, certificate.fingerprint(HashAlgorithm::Sha1).to_fingerprint()).unwrap();
    let error = client.verify_or_last_good().unwrap_err();
    assert!(matches!(error, TrustError::CertificateBlacklisted { .. }), "{error}");
}

#[test]
fn row_34_an_unusable_key_file_is_named() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let key = fixture.dir.path().join("my.pub");
    let check = |words: &str| {
        let options = [("CVMFS_SERVER_URL", &*origin.url()), ("CVMFS_PUBLIC_KEY", key.to_str().unwrap())];
        let settings = support::settings(&fixture.fqrn, fixture.dir.path(), &options);
        let store = ObjectStore::open(&settings).unwrap();
        let error = trust::verify_or_last_good(&store, &settings, &SystemClock, seconds(20)).unwrap_err();
        assert!(error.to_string().contains("my.pub") && error.to_string().contains(words), "{error}");
        assert_eq!(ClientError::from(error).exit_code(), 1);
    };
    check("No such file");
    std::fs::write(&key, "").unwrap();
    check("public master key");
    std::fs::write(&key, [0xff; 300_000]).unwrap();
    check("public master key");
    let certificate = fixture.keys.as_ref().unwrap().join(format!("{}.crt", fixture.fqrn));
    std::fs::copy(certificate, &key).unwrap();
    check("public master key");
    let private = fixture.keys.as_ref().unwrap().join(format!("{}.key", fixture.fqrn));
    std::fs::copy(private, &key).unwrap();
    check("public master key");
    std::fs::copy(&fixture.master_pub, &key).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    check("everybody may write it");
    std::fs::remove_file(&key).unwrap();
    std::fs::create_dir(&key).unwrap();
    check("directory");
    std::fs::remove_dir(&key).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &key, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    check("not a regular file");
}

/// What may happen to a whitelist on its way, or be put in its place.
fn spoilt_whitelists(good: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let end = good.windows(4).position(|window| window == b"\n--\n").unwrap();
    let mut listed_more = good.to_vec();
    listed_more.splice(end..end, *b"\n00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33");
    vec![
        ("empty", Vec::new()),
        ("cut in the text", good[..end / 2].to_vec()),
        ("cut in the signature", good[..good.len() - 1].to_vec()),
        ("without signature", good[..end + 1].to_vec()),
        ("with bytes after it", [good, b"x"].concat()),
        ("with a listed line more", listed_more),
        ("of another form", b"<html>please log in</html>".to_vec()),
        ("too large", [good, &vec![b'x'; 100_000]].concat()),
    ]
}

#[test]
fn row_28_a_spoilt_whitelist_is_refused_and_the_next_host_or_the_old_revision_is_used() {
    let spoilt = Fixture::unpack("basic-sha1").unwrap();
    let good = Fixture::unpack("basic-sha1").unwrap();
    let whitelist = std::fs::read(good.storage.join(".cvmfswhitelist")).unwrap();
    for (what, bytes) in spoilt_whitelists(&whitelist) {
        std::fs::write(spoilt.storage.join(".cvmfswhitelist"), bytes).unwrap();
        let (first, second) =
            (Origin::serve(&spoilt.storage).unwrap(), Origin::serve(&good.storage).unwrap());
        let cold = tempfile::tempdir().unwrap();
        let cache = cold.path().to_str().unwrap();
        let alone = Client::with(&good, &[("CVMFS_SERVER_URL", &first.url()), ("CVMFS_CACHE_BASE", cache)]);
        let error = alone.verify_or_last_good().unwrap_err();
        assert!(error.to_string().contains("whitelist"), "{what}: {error}");
        let both = format!("{};{}", first.url(), second.url());
        let two = Client::with(&good, &[("CVMFS_SERVER_URL", &both), ("CVMFS_CACHE_BASE", cache)]);
        assert!(!two.verify().unwrap_or_else(|error| panic!("{what}: {error}")).offline);
        assert!(alone.verify_or_last_good().unwrap().offline, "{what}: the old revision");
    }
}

#[test]
fn row_29_a_spoilt_manifest_is_refused_and_the_next_host_or_the_old_revision_is_used() {
    let spoilt = Fixture::unpack("bad-manifest-sig").unwrap();
    let good = Fixture::unpack("basic-sha1").unwrap();
    let (first, second) = (Origin::serve(&spoilt.storage).unwrap(), Origin::serve(&good.storage).unwrap());
    let both = Client::new(&good, &format!("{};{}", first.url(), second.url()));
    both.verify().unwrap();
    assert_eq!(both.store.status().host, second.url());
    let alone = Client::new(&good, &first.url());
    let trusted = alone.verify_or_last_good().unwrap();
    assert!(trusted.offline);
    assert_eq!(trusted.manifest.revision, manifest_of(&good.storage).revision);
}

#[test]
fn row_32_the_manifest_of_another_repository_is_refused_though_it_is_properly_signed() {
    let other = Fixture::unpack("basic-sha1").unwrap();
    republish(&other, |manifest| manifest.fqrn = "other.example.org".to_owned());
    let origin = Origin::serve(&other.storage).unwrap();
    let error = Client::new(&other, &origin.url()).verify_or_last_good().unwrap_err();
    assert!(error.to_string().contains("found other.example.org, expected basic-sha1"), "{error}");
}

#[test]
fn row_33_strange_manifests_are_refused_or_read_as_they_were_signed() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let good = std::fs::read(fixture.storage.join(".cvmfspublished")).unwrap();
    let long_line = [&b"Q"[..], &vec![b'x'; 1 << 20], b"\n", &good].concat();
    let crlf =
        good.iter().flat_map(|byte| if *byte == b'\n' { vec![b'\r', b'\n'] } else { vec![*byte] }).collect();
    for (what, bytes) in [
        ("a line of 1 MB", long_line),
        ("line ends of DOS", crlf),
        ("a zero byte", [b"\0", &good[..]].concat()),
        ("no UTF-8", [b"N\xff\xfe\n", &good[..]].concat()),
        ("two names", [b"Nother.example.org\n", &good[..]].concat()),
        ("nothing", Vec::new()),
    ] {
        std::fs::write(fixture.storage.join(".cvmfspublished"), bytes).unwrap();
        let client = Client::new(&fixture, &origin.url());
        let error = client.verify_or_last_good().unwrap_err();
        assert!(!error.to_string().contains('\n'), "{what}: {error}");
    }
    // Unknown and repeated keys are no reason to refuse what is properly signed.
    std::fs::write(fixture.storage.join(".cvmfspublished"), &good).unwrap();
    support::republish_text(&fixture, |text| [b"?unknown\nS1\n", text].concat());
    Client::new(&fixture, &origin.url()).verify().unwrap();
}
