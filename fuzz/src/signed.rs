//! The chain of trust: letters, manifest, whitelist, keys, blacklist.

use std::sync::LazyLock;

use cvmfs_format::ObjectKind;
use cvmfs_format::blacklist::Blacklist;
use cvmfs_format::letter::Letter;
use cvmfs_format::manifest::{Breadcrumb, Manifest, is_valid_fqrn};
use cvmfs_format::signature::{Certificate, MasterKeys, PrivateKey};
use cvmfs_format::whitelist::Whitelist;

use crate::{Target, fixtures};

const REPOSITORY: &str = "basic-sha1";

pub(crate) const MANIFEST: Target = Target {
    name: "manifest",
    run: manifest,
    seeds: || {
        let all = ["basic-sha1", "shake128", "history", "external", "bad-manifest-sig"];
        let mut seeds: Vec<_> = all.map(|name| fixtures::stored(name, ".cvmfspublished")).into();
        seeds.push(fixtures::manifest("history").breadcrumb().to_text().into_bytes());
        seeds
    },
    words: &[
        "\n",
        "--\n",
        "C",
        "B",
        "R",
        "D240\n",
        "S",
        "Gyes\n",
        "A",
        "N",
        "X",
        "H",
        "T",
        "M",
        "Y",
        "-shake128",
        "-rmd160",
    ],
};

pub(crate) const WHITELIST: Target = Target {
    name: "whitelist",
    run: whitelist,
    seeds: || {
        let all = ["basic-sha1", "shake128", "bad-whitelist-sig", "bad-expired-whitelist"];
        all.map(|name| fixtures::stored(name, ".cvmfswhitelist")).into()
    },
    words: &[
        "\n",
        "--\n",
        "E20990101000000\n",
        "N",
        "Vpkcs7\n",
        "Wcachain\n",
        "20240101000000\n",
        "AA:",
        " # ",
        "99999999999999",
    ],
};

pub(crate) const KEYS: Target = Target {
    name: "keys",
    run: keys,
    seeds: || {
        let fixture = fixtures::fixture(REPOSITORY);
        let mut seeds = vec![certificate_pem()];
        let keys = fixture.keys.as_ref().expect("this fixture has keys");
        for entry in std::fs::read_dir(keys).into_iter().flatten().flatten() {
            seeds.extend(std::fs::read(entry.path()));
        }
        seeds
    },
    words: &[
        "-----BEGIN ",
        "-----END ",
        "PUBLIC KEY-----\n",
        "CERTIFICATE-----\n",
        "RSA PRIVATE KEY-----\n",
        "PRIVATE KEY-----\n",
        "\n",
        "MII",
        "=",
    ],
};

pub(crate) const BLACKLIST: Target = Target {
    name: "blacklist",
    run: blacklist,
    seeds: || {
        let text: [&[u8]; 2] = [
            b"# comment\n<basic-sha1.peer.example.org 5\n<other.example.org 18446744073709551615\n",
            b"4B:1F:3C:7A:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF # why\r\n\n",
        ];
        text.map(<[u8]>::to_vec).into()
    },
    words: &["<", ">", "#", "\n", " ", "AA:BB:", "basic-sha1.peer.example.org", "99999999999999999999"],
};

static MASTERS: LazyLock<MasterKeys> = LazyLock::new(|| {
    let pem = std::fs::read(&fixtures::fixture(REPOSITORY).master_pub).expect("the fixture has a key");
    MasterKeys::from_pem(&pem).expect("the fixture is good")
});

fn certificate_pem() -> Vec<u8> {
    let hash = fixtures::manifest(REPOSITORY).certificate.expect("the fixture is signed");
    fixtures::object(REPOSITORY, hash, ObjectKind::Certificate)
}

static CERTIFICATE: LazyLock<Certificate> =
    LazyLock::new(|| Certificate::from_pem(&certificate_pem()).expect("the fixture is good"));

/// Whether one of the good files has this text: no other one may be accepted.
fn is_original(text: &[u8], seeds: fn() -> Vec<Vec<u8>>) -> bool {
    seeds().iter().any(|seed| Letter::parse(seed).is_ok_and(|letter| letter.text == text))
}

fn manifest(bytes: &[u8]) {
    for text in Letter::parse(bytes).iter().map(|letter| letter.text).chain([bytes]) {
        let Ok(manifest) = Manifest::parse(text) else { continue };
        assert!(is_valid_fqrn(&manifest.fqrn), "{:?} is no name", manifest.fqrn);
        let again = Manifest::parse(&manifest.to_text()).expect("what was written is readable");
        assert_eq!(again, manifest);
        let breadcrumb = manifest.breadcrumb();
        if breadcrumb.timestamp > 0 && !breadcrumb.root_catalog.is_null() {
            assert_eq!(Breadcrumb::parse(breadcrumb.to_text().as_bytes()), Some(breadcrumb));
        }
        let _ = manifest.require_fqrn("basic-sha1.peer.example.org");
    }
    if let Ok(letter) = Letter::parse(bytes)
        && CERTIFICATE.verify_manifest(&letter).is_ok()
    {
        assert!(is_original(letter.text, MANIFEST.seeds), "a changed manifest was accepted");
    }
    let _ = Breadcrumb::parse(bytes);
}

fn whitelist(bytes: &[u8]) {
    let letter = Letter::parse(bytes);
    for text in letter.iter().map(|letter| letter.text).chain([bytes]) {
        let Ok(whitelist) = Whitelist::parse(text) else { continue };
        assert!(whitelist.is_expired(i64::MIN) && whitelist.is_expired(i64::MAX), "no calendar has these");
        for now in [0, 1_700_000_000] {
            assert_eq!(whitelist.is_expired(now), whitelist.expires_unix() <= now, "{whitelist:?} at {now}");
            let _ = whitelist.check("basic-sha1.peer.example.org", now, &CERTIFICATE);
        }
    }
    if let Ok(letter) = letter
        && MASTERS.verify_whitelist(&letter).is_ok()
    {
        assert!(is_original(letter.text, WHITELIST.seeds), "a changed whitelist was accepted");
    }
}

fn keys(bytes: &[u8]) {
    if let Ok(certificate) = Certificate::from_pem(bytes) {
        let _ = certificate.subject();
        let letter = fixtures::stored(REPOSITORY, ".cvmfspublished");
        let letter = Letter::parse(&letter).expect("the fixture is good");
        let _ = certificate.verify_manifest(&letter);
    }
    if let Ok(masters) = MasterKeys::from_pem(bytes) {
        let letter = fixtures::stored(REPOSITORY, ".cvmfswhitelist");
        let letter = Letter::parse(&letter).expect("the fixture is good");
        let _ = masters.verify_whitelist(&letter);
    }
    let _ = PrivateKey::from_pem(bytes);
}

fn blacklist(bytes: &[u8]) {
    let mut blacklist = Blacklist::new();
    blacklist.add(bytes);
    let lowest = blacklist.lowest_revision("basic-sha1.peer.example.org");
    let _ = blacklist.rejects_certificate(&CERTIFICATE);
    // More of the same never allows more.
    blacklist.add(bytes);
    assert_eq!(blacklist.lowest_revision("basic-sha1.peer.example.org"), lowest);
}
