use std::fs;
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::testing::DirectoryMounts;
use super::*;

fn place(path: &str) -> Location {
    Location::new("a.example.org", path).unwrap()
}

fn repository(layers: &[&str]) -> (TempDir, Arc<DirectoryMounts>, Repositories) {
    let directory = TempDir::new().unwrap();
    for layer in layers {
        fs::create_dir_all(directory.path().join("a.example.org").join(layer)).unwrap();
    }
    let mounts = Arc::new(DirectoryMounts::new(directory.path()));
    let repositories = Repositories::new(Arc::clone(&mounts) as Arc<dyn RepositoryMounts>);
    (directory, mounts, repositories)
}

#[test]
fn a_repository_is_mounted_once_and_unmounted_when_the_last_layer_left() {
    let (_directory, mounts, repositories) = repository(&["layers/x"]);
    let x = place("layers/x");
    repositories.acquire("container-1", &[&x]).unwrap();
    repositories.acquire("container-1", &[&x]).unwrap();
    repositories.acquire("container-2", &[&x]).unwrap();
    repositories.release("container-1");
    repositories.unmount_all();
    assert_eq!(mounts.log(), ["mount a.example.org"]);
    repositories.release("container-2");
    repositories.release("container-2");
    repositories.unmount_idle();
    assert_eq!(mounts.log().len(), 1, "it stays a while");
    repositories.unmount_all();
    assert_eq!(mounts.log(), ["mount a.example.org", "unmount a.example.org"]);
}

#[test]
fn the_repository_is_mounted_again_each_time_however_often_the_last_layer_left() {
    let (_directory, mounts, repositories) = repository(&["layers/x"]);
    let x = place("layers/x");
    for _ in 0..1000 {
        repositories.acquire("container", &[&x]).unwrap();
        repositories.release("container");
        repositories.unmount_all();
    }
    assert_eq!(mounts.log().len(), 2000);
    assert_eq!(repositories.holders("a.example.org"), 0);
}

#[test]
fn a_mount_that_failed_is_not_counted_and_tried_again() {
    let (directory, _mounts, repositories) = repository(&[]);
    let x = place("layers/x");
    let error = repositories.acquire("container", &[&x]).unwrap_err();
    let message = error.to_string();
    let cause = "cannot mount repository a.example.org: not configured: add config.d/FQRN.conf; ";
    assert!(message.starts_with(cause), "{message}");
    assert!(message.contains("run `cvmfs-client check a.example.org`"), "{message}");
    assert_eq!(repositories.holders("a.example.org"), 0);
    fs::create_dir_all(directory.path().join("a.example.org/layers/x")).unwrap();
    repositories.acquire("container", &[&x]).unwrap();
}

#[test]
fn a_layer_that_is_not_there_is_looked_for_in_a_newer_revision_once() {
    let (_directory, mounts, repositories) = repository(&["layers/x"]);
    mounts.appears_after_refresh("layers/new");
    repositories.acquire("container", &[&place("layers/x"), &place("layers/new")]).unwrap();
    assert_eq!(mounts.log(), ["mount a.example.org", "refresh a.example.org"]);

    let error = repositories.acquire("other", &[&place("layers/gone"), &place("layers/gone2")]).unwrap_err();
    let expected = "layer layers/gone not in repository a.example.org at revision 7: it was removed";
    assert!(error.to_string().starts_with(expected), "{error}");
    assert_eq!(repositories.holders("a.example.org"), 1, "only the first holder holds it");
}

#[test]
fn a_failed_start_leaves_nothing_mounted_that_nobody_else_uses() {
    let (_directory, mounts, repositories) = repository(&["layers/x"]);
    repositories.acquire("container", &[&place("layers/gone")]).unwrap_err();
    assert_eq!(mounts.log(), ["mount a.example.org", "refresh a.example.org", "unmount a.example.org"]);

    repositories.acquire("running", &[&place("layers/x")]).unwrap();
    repositories.acquire("container", &[&place("layers/gone")]).unwrap_err();
    assert_eq!(mounts.mounted().len(), 1);
}

#[test]
fn links_inside_the_repository_are_followed_and_links_out_of_it_are_not() {
    let (directory, _mounts, repositories) = repository(&["layers/x"]);
    let root = directory.path().join("a.example.org");
    symlink("layers/x", root.join("inside")).unwrap();
    symlink("/etc", root.join("absolute")).unwrap();
    symlink("../..", root.join("upwards")).unwrap();
    let found = repositories.acquire("c", &[&place("inside")]).unwrap();
    assert_eq!(found, [root.canonicalize().unwrap().join("layers/x")]);
    for out in ["absolute", "upwards", "upwards/tmp"] {
        let error = repositories.acquire("c", &[&place(out)]).unwrap_err();
        assert!(matches!(error, RepositoryError::LeadsOut { .. }), "{error}");
    }
}

#[test]
fn a_file_is_no_layer() {
    let (directory, _mounts, repositories) = repository(&["layers/x"]);
    fs::write(directory.path().join("a.example.org/layers/file"), "").unwrap();
    let error = repositories.acquire("c", &[&place("layers/file")]).unwrap_err();
    assert!(matches!(error, RepositoryError::LayerMissing { .. }), "{error}");
}
