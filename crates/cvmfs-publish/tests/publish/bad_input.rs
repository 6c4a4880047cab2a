//! What must be refused: a clear message, the right exit code, nothing published.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use crate::support::Repository;
use crate::tar::{Header, Tar};

#[test]
fn archives_that_leave_their_place_are_refused_by_name() {
    let repository = Repository::create(&[]);
    let refused = |archive: Tar, name: &str| {
        let message = repository.refuses(1, &archive.file("more", b"x").finish(), &[]);
        assert!(message.contains(name), "{name}: {message}");
    };
    refused(Tar::default().file("a/../../etc/passwd", b"x"), "a/../../etc/passwd");
    refused(Tar::default().file("/etc/passwd", b"x"), "/etc/passwd");
    refused(Tar::default().file("a", b"x").link(b'1', "b", "../a"), "../a");
    refused(Tar::default().link(b'2', "out", "/etc").file("out/passwd", b"x"), "out/passwd");
    refused(Tar::default().file("f", b"x").file("f/below", b"x"), "f/below");
    refused(Tar::default().link(b'1', "link", "nothing"), "nothing");
    refused(Tar::default().dir("d", 0o755).link(b'1', "link", "d"), "link");
    refused(Tar::default().dir("d/.cvmfscatalog", 0o755), ".cvmfscatalog");
    refused(Tar::default().link(b'2', "d/.cvmfscatalog", "x"), ".cvmfscatalog");
    refused(Tar::default().add(&Header::new(b"odd", b'Z', 0o644), b""), "odd");
    repository.assert_sound();
}

#[test]
fn an_entry_below_a_published_file_is_refused_and_a_directory_in_its_place_is_not() {
    let repository = Repository::create(&[]);
    repository.ingest("refused", &Tar::default().file("f", b"x").link(b'2', "l", "/etc").finish(), &[]);
    for name in ["f/below", "l/passwd"] {
        let message = repository.refuses(1, &Tar::default().file(name, b"x").finish(), &[]);
        assert!(
            message.contains(&format!("/refused/{name}")) && message.contains("not a directory"),
            "{message}"
        );
    }
    let all = ["--base", "/refused/f/deeper", "--tar", "-"];
    let output = repository.run("ingest", &all, &Tar::default().finish());
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    repository.ingest("refused", &Tar::default().dir("f", 0o755).file("f/below", b"x").finish(), &[]);
    repository.assert_sound();
}

#[test]
fn cut_and_damaged_streams_are_refused() {
    let repository = Repository::create(&[]);
    let plain = Tar::default().file("f", &crate::round_trip::noise(100_000, 9)).finish();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&plain).unwrap();
    let gzip = encoder.finish().unwrap();
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    for whole in [&plain, &gzip, &zstd] {
        let cuts = [whole.len() / 3, whole.len() / 2, whole.len() - 600.min(whole.len() / 4)];
        for cut in cuts {
            repository.refuses(1, &whole[..cut], &[]);
        }
        repository.ingest("good", whole, &[]);
    }
    let mut flipped = gzip;
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x10;
    repository.refuses(1, &flipped, &[]);
    repository.refuses(1, b"this is no archive at all, but long enough to look at", &[]);
    repository.refuses(1, b"", &[]);
    repository.assert_sound();
}

#[test]
fn bad_requests_are_refused_before_any_work() {
    let repository = Repository::create(&[]);
    let archive = Tar::default().file("f", b"x").finish();
    let code = |options: &[&str]| repository.run("ingest", options, &archive).status.code();
    assert_eq!(code(&["--base", "a/../../b", "--tar", "-"]), Some(2));
    assert_eq!(code(&["--base", "/.cvmfs/x", "--tar", "-"]), Some(2));
    assert_eq!(code(&["--base", "/", "--tar", "-", "--catalog"]), Some(2));
    assert_eq!(code(&["--base", "b", "--tar", "-", "--tag", "two words"]), Some(2));
    assert_eq!(code(&["--base", "b", "--tar", "-", "--tag", "trunk"]), Some(2));
    assert_eq!(code(&["--base", "b", "--tar", "/nonexistent"]), Some(1));
    assert_eq!(code(&["--base", "b", "--chunk-size", "1:2:3", "--tar", "-"]), Some(2));

    let elsewhere = Repository::at(&repository.fqrn, &repository.storage.join("nothing"), &repository.keys);
    assert_eq!(elsewhere.run("ingest", &["--delete", "x"], b"").status.code(), Some(5));
    let other = Repository::at("other.example.org", &repository.storage, &repository.keys);
    assert_eq!(other.run("ingest", &["--delete", "x"], b"").status.code(), Some(3));
    let nowhere = Repository::at(&repository.fqrn, "s3:///prefix".as_ref(), &repository.keys);
    let output = nowhere.run("ingest", &["--delete", "x"], b"");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && message.contains("s3://BUCKET/PREFIX"), "{message}");
}

#[test]
fn row_98_keys_that_others_can_read_or_that_do_not_belong_are_refused() {
    let repository = Repository::create(&[]);
    let archive = Tar::default().file("f", b"x").finish();
    let key = repository.keys.join("test.example.org.key");
    let mode = |mode| std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o440);
    let message = repository.refuses(3, &archive, &[]);
    assert!(message.contains("test.example.org.key") && message.contains("0440"), "{message}");
    mode(0o400);

    // the release key of another repository is on nobody's whitelist here
    let other = Repository::create(&[]);
    for kind in ["key", "crt"] {
        let file = repository.keys.join(format!("test.example.org.{kind}"));
        std::fs::remove_file(&file).unwrap();
        std::fs::copy(other.keys.join(format!("test.example.org.{kind}")), &file).unwrap();
    }
    let message = repository.refuses(3, &archive, &[]);
    assert!(message.contains("whitelist"), "{message}");
}
