//! What must be refused: a clear message, the right exit code, nothing published.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

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
    assert_eq!(repository.assert_sound().unreferenced_count, 0, "what was stored for them is left");
}

#[test]
fn an_entry_below_a_published_file_is_refused_and_a_directory_in_its_place_is_not() {
    let repository = Repository::create(&[]);
    repository.ingest("refused", &Tar::default().file("f", b"x").link(b'2', "l", "/etc").finish(), &[]);
    for name in ["f/below", "l/passwd"] {
        let message = repository.refuses(1, &Tar::default().file(name, b"x").finish(), &[]);
        assert!(message.contains(name) && message.contains("not a directory"), "{message}");
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
    assert_eq!(code(&["--base", "b", "--tar", "/nonexistent"]), Some(5));
    assert_eq!(code(&["--base", "b", "--chunk-size", "1:2:3", "--tar", "-"]), Some(2));

    let elsewhere = Repository::at(&repository.fqrn, &repository.storage.join("nothing"), &repository.keys);
    assert_eq!(elsewhere.run("ingest", &["--delete", "x"], b"").status.code(), Some(5));
    let other = Repository::at("other.example.org", &repository.storage, &repository.keys);
    assert_eq!(other.run("ingest", &["--delete", "x"], b"").status.code(), Some(5));
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

fn stored_objects(repository: &Repository) -> Vec<(String, u64)> {
    let mut objects = Vec::new();
    repository.open_storage().list_objects(&mut |object| objects.push((object.path, object.size))).unwrap();
    objects.sort();
    objects
}

#[test]
fn a_refused_archive_leaves_no_objects_and_takes_none_that_were_there() {
    let repository = Repository::create(&[]);
    let kept = crate::round_trip::noise(5_000, 1);
    repository.ingest("x", &Tar::default().file("kept", &kept).finish(), &[]);
    let before = stored_objects(&repository);
    let files = || Tar::default().file("kept", &kept).file("new", &crate::round_trip::noise(70_000, 2));
    repository.refuses(1, &files().file("../out", b"x").finish(), &[]);
    repository.refuses(1, &files().finish()[..60_000], &[]);
    assert_eq!(stored_objects(&repository), before);

    // One that a power failure cut is mended, and stays.
    let (path, size) = before.iter().max_by_key(|(_, size)| *size).unwrap();
    std::fs::OpenOptions::new().write(true).open(repository.storage.join(path)).unwrap().set_len(7).unwrap();
    assert!(!repository.check().ok);
    repository.refuses(1, &files().file("../out", b"x").finish(), &[]);
    assert!(stored_objects(&repository).contains(&(path.clone(), *size)));
    repository.assert_sound();
}

#[test]
fn a_tag_that_cannot_be_is_refused_before_anything_is_stored() {
    let repository = Repository::create(&[]);
    repository.ingest("x", &Tar::default().file("f", b"x").finish(), &["--tag", "taken"]);
    let before = stored_objects(&repository);
    // What is never read cannot be stored: the archive is not there.
    for (tag, word) in
        [("a b", "blanks"), ("", "1 to 255"), ("trunk", "kept by"), ("taken", "exists already")]
    {
        let output = repository.run("ingest", &["--base", "y", "--tar", "/nothing", "--tag", tag], b"");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(word), "{tag:?}: {message}");
    }
    assert_eq!(stored_objects(&repository), before);
}

#[test]
fn a_repository_gets_no_name_that_clients_refuse_to_mount() {
    let directory = tempfile::tempdir().unwrap();
    let storage = directory.path().join("storage");
    for name in ["bad..name", "nodot", "a.b.", "-x.y.z", ".a.b", "a/b.c", ""] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvmfs-publish"));
        command.arg("mkfs").arg("--storage").arg(&storage).arg("--keys").arg(directory.path().join("keys"));
        let output = command.args(["--", name]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains("is not a repository name"), "{message}");
        assert!(!storage.exists(), "{name:?} left a storage");
    }
}

#[test]
fn what_is_not_there_has_an_exit_code_of_its_own() {
    let repository = Repository::create(&[]);
    let code =
        |repository: &Repository, options: &[&str]| repository.run("ingest", options, b"").status.code();
    assert_eq!(code(&repository, &["--base", "x", "--tar", "/nothing.tar"]), Some(5));
    assert_eq!(code(&repository, &["--base", "x", "--tree", "/nothing"]), Some(5));
    let missing = repository.storage.join("missing");
    let keyless = Repository::at(&repository.fqrn, &repository.storage, &missing);
    assert_eq!(code(&keyless, &["--delete", "x"]), Some(5));
    let homeless = Repository::at(&repository.fqrn, &missing, &repository.keys);
    assert_eq!(code(&homeless, &["--delete", "x"]), Some(5));
}

#[test]
fn a_log_level_that_is_none_is_wrong_usage() {
    let repository = Repository::create(&[]);
    let output = repository.run("info", &["--log-level", "bogus"], b"");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && message.contains("bogus"), "{message}");
}

#[test]
fn a_log_in_a_pipe_has_no_colours() {
    let repository = Repository::create(&[]);
    let options = ["--base", "x", "--tar", "-", "--log-level", "debug"];
    let output = repository.run("ingest", &options, &Tar::default().file("f", b"x").finish());
    assert!(output.status.success() && !output.stderr.is_empty());
    assert!(!output.stderr.contains(&0x1b), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_cause_is_said_once() {
    let repository = Repository::create(&[]);
    let mut archive = Tar::default().file("f", b"x").finish();
    archive[100..107].copy_from_slice(b"zzzzzzz");
    archive[148..156].fill(b' ');
    let sum: u32 = archive[..512].iter().map(|&byte| u32::from(byte)).sum();
    archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let message = repository.refuses(1, &archive, &[]);
    assert_eq!(message.matches("invalid octal field").count(), 1, "{message}");
}
