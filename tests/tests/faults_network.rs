//! What a user of a mount sees while the network misbehaves.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use testkit::{Fault, Fixture, MountBuilder, Origin};

/// Two regular files of the fixture with different content: their paths below the mount point.
fn two_files(fixture: &Fixture) -> [String; 2] {
    let is_plain =
        |path: &str| path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
    let files: Vec<(String, u64)> = fixture
        .manifest
        .iter()
        .filter(|entry| entry.kind.as_deref() == Some("file"))
        .filter_map(|entry| Some((entry.path.to_str()?.trim_start_matches('/').to_owned(), entry.size?)))
        .filter(|(path, size)| *size > 0 && is_plain(path))
        .collect();
    let (first, size) = files[0].clone();
    let (second, _) = files.iter().find(|(_, other)| *other != size).unwrap().clone();
    [first, second]
}

fn read(mountpoint: &Path, file: &str) -> std::io::Result<Vec<u8>> {
    std::fs::read(mountpoint.join(file))
}

/// Asserts that the file can be read again within half a minute.
#[track_caller]
fn assert_comes_back(mountpoint: &Path, file: &str) {
    let begun = Instant::now();
    while let Err(error) = read(mountpoint, file) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{error}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn row_06_a_reader_gets_an_error_in_time_when_the_server_never_answers_and_status_answers_meanwhile() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    let mount = MountBuilder::new(&fixture.fqrn, &config).option("CVMFS_TIMEOUT_DIRECT=1").mount().unwrap();
    let [cached, cold] = two_files(&fixture);
    read(mount.path(), &cached).unwrap();
    std::fs::metadata(mount.path().join(&cold)).unwrap();
    origin.set_fault("*", Fault::Hang);
    let started = Instant::now();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(mount.path(), &cold).unwrap_err());
        std::thread::sleep(Duration::from_millis(200));
        let asked = Instant::now();
        mount.status().unwrap();
        assert!(asked.elapsed() < Duration::from_secs(8), "status took {:?}", asked.elapsed());
        read(mount.path(), &cached).unwrap();
        let error = reader.join().unwrap();
        let expected = [Some(libc::EIO), Some(libc::ETIMEDOUT)];
        assert!(expected.contains(&error.raw_os_error()), "{error}");
    });
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    // The server is well again, and so is the file.
    origin.clear_faults();
    assert_comes_back(mount.path(), &cold);
}

#[test]
fn row_21_cached_files_stay_readable_without_a_network_and_the_others_come_back_with_it() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let address = origin.address();
    let config = fixture.client_config(&origin.url()).unwrap();
    let mount = MountBuilder::new(&fixture.fqrn, &config).option("CVMFS_TIMEOUT_DIRECT=1").mount().unwrap();
    let [cached, cold] = two_files(&fixture);
    let content = read(mount.path(), &cached).unwrap();
    std::fs::metadata(mount.path().join(&cold)).unwrap();
    drop(origin);
    assert_eq!(read(mount.path(), &cached).unwrap(), content);
    let started = Instant::now();
    let error = read(mount.path(), &cold).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    let status = mount.status().unwrap();
    assert!(
        status["io_errors"].as_u64() > Some(0) && status["network_errors"].as_u64() > Some(0),
        "{status}"
    );
    let _origin = Origin::serve_at(&fixture.storage, address).unwrap();
    assert_comes_back(mount.path(), &cold);
}

#[test]
fn servers_are_told_who_reads_what_if_the_site_wants_it() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    let mount = MountBuilder::new(&fixture.fqrn, &config)
        .option("CVMFS_SEND_INFO_HEADER=yes")
        .option("CVMFS_HTTP_TRACING=yes")
        .mount()
        .unwrap();
    let [file, _] = two_files(&fixture);
    origin.clear_requests();
    read(mount.path(), &file).unwrap();
    let begun = Instant::now();
    loop {
        let requests = origin.requests();
        let told = requests.iter().find(|request| request.headers.contains_key("cvmfs-info"));
        if let Some(request) = told {
            assert_eq!(request.headers["cvmfs-info"], format!("/{file}"));
            assert!(request.headers["x-cvmfs-pid"].parse::<u32>().unwrap() > 0);
            assert_eq!(request.headers["x-cvmfs-uid"], rustix::process::getuid().as_raw().to_string());
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{requests:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
