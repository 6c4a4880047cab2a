//! Layer archives become layers on disk that overlayfs merges as the image's author meant.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Archive, Mounted, apply_to, chain, listing, names, scratch, sh};
use layer_tar::Device;
use overlay::OpaqueXattr;
use overlay::apply::{Applied, ApplyOptions, Devices, apply};
use overlay::ids::{IdMap, IdMaps, IdRange};
use overlay::size::layer_size;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn base() -> Archive {
    Archive::new()
        .dir("bin")
        .file("bin/sh", "shell")
        .dir("etc")
        .dir("etc/conf")
        .file("etc/conf/a", "a")
        .file("etc/conf/b", "b")
        .file("etc/passwd", "root")
        .dir("var")
        .file("var/log", "log")
}

#[test]
fn every_kind_of_entry_is_written_with_all_its_metadata() {
    let scratch = scratch();
    let layer = Archive::new()
        .with(|next| (next.mode, next.owner, next.mtime) = (0o1777, (1, 2), (1_000_000_000, 123_456_789)))
        .dir("d")
        .with(|next| (next.mode, next.owner) = (0o6755, (3_000_000_000, 100)))
        .file("d/setuid", "program")
        .hard("d/hard", "d/setuid")
        .with(|next| (next.mode, next.owner) = (0o777, (5, 6)))
        .link("d/link", "/anywhere/../else")
        .with(|next| next.mode = 0o640)
        .fifo("d/pipe")
        .device("d/null", Device::Char { major: 1, minor: 3 })
        .device("d/disk", Device::Block { major: 259, minor: 1_048_575 })
        .with(|next| {
            (next.mode, next.xattrs) = (0o755, vec![(b"security.capability".to_vec(), CAPABILITY.to_vec())]);
        })
        .file("d/capable", "ping")
        .with(|next| next.xattrs = vec![(b"user.binary".to_vec(), b"\0\n=".to_vec())])
        .file("d/noted", "")
        .layer(&scratch.path().join("layer"));

    let d = fs::metadata(layer.join("d")).unwrap();
    assert_eq!(
        (d.mode() & 0o7777, d.uid(), d.gid(), d.mtime(), d.mtime_nsec()),
        (0o1777, 1, 2, 1_000_000_000, 123_456_789)
    );
    let file = fs::metadata(layer.join("d/setuid")).unwrap();
    assert_eq!((file.mode() & 0o7777, file.uid(), file.gid(), file.nlink()), (0o6755, 3_000_000_000, 100, 2));
    assert_eq!((file.mtime(), file.mtime_nsec()), (1_000_000_000, 123_456_789));
    assert_eq!(fs::metadata(layer.join("d/hard")).unwrap().ino(), file.ino());
    let link = fs::symlink_metadata(layer.join("d/link")).unwrap();
    assert_eq!((link.uid(), link.gid(), link.mtime_nsec()), (5, 6, 123_456_789));
    assert_eq!(fs::read_link(layer.join("d/link")).unwrap().as_os_str(), "/anywhere/../else");
    assert!(fs::metadata(layer.join("d/pipe")).unwrap().file_type().is_fifo());
    assert_eq!(
        sh(&layer, "stat -c '%F %a %t:%T' d/null d/disk"),
        "character special file 640 1:3\nblock special file 640 103:fffff\n"
    );
    let hex = |bytes: &[u8]| format!("0x{}", hex::encode(bytes));
    let attribute =
        |name: &str, file: &str| sh(&layer, &format!("getfattr -n {name} -e hex {file} | sed -n 's/.*=//p'"));
    assert_eq!(attribute("security.capability", "d/capable").trim(), hex(CAPABILITY));
    assert_eq!(attribute("user.binary", "d/noted").trim(), hex(b"\0\n="));
}

#[test]
fn the_result_reports_size_entries_and_names_of_the_root() {
    let scratch = scratch();
    let archive = Archive::new()
        .file("thin.json", "12345")
        .hard("again", "thin.json")
        .dir("d")
        .file("d/x", "678")
        .finish();
    let applied = apply_to(scratch.path(), &archive).unwrap();
    let root_entries = vec![b"again".to_vec(), b"d".to_vec(), b"thin.json".to_vec()];
    assert_eq!(applied, Applied { size: 8, entries: 4, root_entries, skipped_devices: 0 });
    assert_eq!(layer_size(scratch.path()).unwrap(), 8);
    let empty = scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert_eq!(apply_to(&empty, &[0; 1024]).unwrap(), Applied::default());
}

#[test]
fn whiteouts_hide_files_and_directories_of_the_layers_below() {
    let scratch = scratch();
    let base = base().layer(&scratch.path().join("base"));
    let top = Archive::new()
        .file(".wh.bin", "")
        .file("etc/.wh.passwd", "")
        .file("etc/conf/.wh.a", "")
        .file("etc/conf/.wh.never-there", "")
        .layer(&scratch.path().join("top"));
    let device = fs::symlink_metadata(top.join("etc/passwd")).unwrap();
    assert!(device.file_type().is_char_device() && device.rdev() == 0);
    let merged = Mounted::read_only(&scratch.path().join("merged"), &[&top, &base]);
    let shown: Vec<String> =
        names(&merged.0).into_iter().filter(|name| !name.ends_with("never-there")).collect();
    assert_eq!(shown, ["etc/", "etc/conf/", "etc/conf/b", "var/", "var/log"]);
    assert!(!merged.0.join("etc/conf/never-there").exists());
}

#[test]
fn opaque_directories_hide_what_lies_below_wherever_the_marker_stands() {
    let scratch = scratch();
    let base = base().layer(&scratch.path().join("base"));
    let before = Archive::new().file("etc/conf/.wh..wh..opq", "").dir("etc/conf").file("etc/conf/new", "n");
    let after =
        Archive::new().dir("etc").dir("etc/conf").file("etc/conf/new", "n").file("etc/conf/.wh..wh..opq", "");
    for (index, archive) in [before, after].into_iter().enumerate() {
        let top = archive.layer(&scratch.path().join(format!("top{index}")));
        let merged = Mounted::read_only(&scratch.path().join("merged"), &[&top, &base]);
        let shown = names(&merged.0);
        assert_eq!(
            shown,
            ["bin/", "bin/sh", "etc/", "etc/conf/", "etc/conf/new", "etc/passwd", "var/", "var/log"]
        );
    }
}

#[test]
fn an_opaque_root_hides_the_whole_image_below() {
    let scratch = scratch();
    let base = base().layer(&scratch.path().join("base"));
    let top = Archive::new().file(".wh..wh..opq", "").file("only", "o").layer(&scratch.path().join("top"));
    assert_eq!(sh(&top, "getfattr --only-values -n trusted.overlay.opaque ."), "y");
    let merged = Mounted::read_only(&scratch.path().join("merged"), &[&top, &base]);
    assert_eq!(names(&merged.0), ["only"]);
}

#[test]
fn opaque_marks_are_written_for_the_kind_of_mount_that_will_read_them() {
    for (opaque, expected) in [
        (OpaqueXattr::Trusted, "trusted.overlay.opaque\n"),
        (OpaqueXattr::User, "user.overlay.opaque\n"),
        (OpaqueXattr::Both, "trusted.overlay.opaque\nuser.overlay.opaque\n"),
    ] {
        let scratch = scratch();
        let archive = Archive::new().file("d/.wh..wh..opq", "").finish();
        let options = ApplyOptions { opaque, ..ApplyOptions::default() };
        apply(&archive[..], scratch.path(), &options).unwrap();
        assert_eq!(sh(scratch.path(), "getfattr -m overlay d | grep overlay | sort"), expected);
    }
}

#[test]
fn a_directory_that_was_removed_and_made_again_shows_nothing_old() {
    let scratch = scratch();
    let base = base().layer(&scratch.path().join("base"));
    let entry = Archive::new().file("etc/.wh.conf", "").dir("etc/conf").file("etc/conf/new", "n");
    let implicit = Archive::new().file("etc/.wh.conf", "").file("etc/conf/new", "n");
    for (index, archive) in [entry, implicit].into_iter().enumerate() {
        let top = archive.layer(&scratch.path().join(format!("top{index}")));
        let merged = Mounted::read_only(&scratch.path().join("merged"), &[&top, &base]);
        assert_eq!(names(&merged.0.join("etc")), ["conf/", "conf/new", "passwd"]);
    }
}

#[test]
fn later_entries_replace_earlier_ones_of_any_kind() {
    let scratch = scratch();
    let layer = Archive::new()
        .file("x", "file")
        .dir("x")
        .file("x/child", "c")
        .file("y", "first")
        .file("y", "second")
        .dir("z")
        .file("z/inside", "i")
        .link("z", "y")
        .link("w", "/etc")
        .dir("w")
        .file("w/mine", "m")
        .file("gone", "g")
        .file(".wh.gone", "")
        .file("back", "b")
        .file(".wh.back", "")
        .file("back", "again")
        .layer(&scratch.path().join("layer"));
    assert_eq!(names(&layer), ["back", "gone", "w/", "w/mine", "x/", "x/child", "y", "z"]);
    assert_eq!(fs::read_to_string(layer.join("y")).unwrap(), "second");
    assert_eq!(fs::read_to_string(layer.join("back")).unwrap(), "again");
    assert_eq!(fs::read_link(layer.join("z")).unwrap().as_os_str(), "y");
    assert!(fs::symlink_metadata(layer.join("gone")).unwrap().file_type().is_char_device());
}

#[test]
fn parents_that_the_archive_leaves_out_belong_to_root_and_are_readable() {
    let scratch = scratch();
    let layer = Archive::new()
        .with(|next| next.owner = (7, 7))
        .file("a/b/c", "x")
        .layer(&scratch.path().join("layer"));
    for parent in ["a", "a/b"] {
        let metadata = fs::metadata(layer.join(parent)).unwrap();
        assert_eq!((metadata.permissions().mode() & 0o7777, metadata.uid(), metadata.gid()), (0o755, 0, 0));
    }
}

#[test]
fn directories_keep_their_times_although_files_are_made_in_them() {
    let scratch = scratch();
    let layer = Archive::new()
        .with(|next| next.mtime = (1_234_567_890, 5))
        .dir("d")
        .dir("d/e")
        .with(|next| next.mtime = (1_500_000_000, 0))
        .file("d/e/f", "x")
        .layer(&scratch.path().join("layer"));
    for directory in ["d", "d/e"] {
        let metadata = fs::metadata(layer.join(directory)).unwrap();
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (1_234_567_890, 5));
    }
}

#[test]
fn the_entry_of_the_root_sets_its_metadata() {
    let scratch = scratch();
    let layer = scratch.path().join("layer");
    let archive =
        Archive::new().with(|next| (next.mode, next.owner) = (0o711, (3, 4))).dir(".").file("f", "x");
    archive.layer(&layer);
    let metadata = fs::metadata(&layer).unwrap();
    assert_eq!(
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid(), metadata.mtime()),
        (0o711, 3, 4, 1_600_000_000)
    );
}

#[test]
fn bookkeeping_of_aufs_is_left_out() {
    let scratch = scratch();
    let layer = Archive::new()
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/12.34", "x")
        .file(".wh..wh.aufs", "")
        .file("real", "r")
        .layer(&scratch.path().join("layer"));
    assert_eq!(names(&layer), ["real"]);
}

#[test]
fn sparse_files_stay_sparse() {
    let scratch = scratch();
    sh(
        scratch.path(),
        "mkdir t layer; truncate -s 256M t/big; printf x | dd of=t/big bs=1 seek=100000000 conv=notrunc status=none",
    );
    for format in
        ["--format=gnu", "--format=posix --sparse-version=0.1", "--format=posix --sparse-version=1.0"]
    {
        sh(scratch.path(), &format!("tar -cf a.tar {format} --sparse -C t big"));
        let archive = fs::read(scratch.path().join("a.tar")).unwrap();
        let layer = scratch.path().join("layer");
        assert_eq!(apply_to(&layer, &archive).unwrap().size, 256 << 20);
        sh(scratch.path(), "cmp t/big layer/big");
        assert!(fs::metadata(layer.join("big")).unwrap().blocks() * 512 < 1 << 20, "{format}");
    }
}

#[test]
fn names_of_any_bytes_and_paths_of_any_length_are_written_and_removed() {
    let scratch = scratch();
    let layer = scratch.path().join("layer");
    // 30 names of 250 bytes: the path is nearly twice as long as PATH_MAX.
    let long = vec!["n".repeat(250); 30].join("/");
    let archive = Archive::new()
        .bytes(b"caf\xe9 \xff\n:,\\", b"odd")
        .file(&format!("{long}/leaf"), "leaf")
        .hard("short", &format!("{long}/leaf"))
        .dir(&long)
        .file(&format!("{long}/.wh.hidden"), "");
    archive.layer(&layer);
    assert_eq!(fs::read_to_string(layer.join("short")).unwrap(), "leaf");
    assert_eq!(fs::metadata(layer.join("short")).unwrap().nlink(), 2);
    assert_eq!(layer_size(&layer).unwrap(), 7);
    overlay::tree::remove(&layer).unwrap();
    assert!(!layer.exists());
}

#[test]
fn owners_are_mapped_and_unmapped_ones_refused() {
    let scratch = scratch();
    let map = || IdMap::new(vec![IdRange { container: 0, host: 100_000, size: 65_536 }]);
    let options = ApplyOptions { ids: IdMaps { users: map(), groups: map() }, ..ApplyOptions::default() };
    let archive = Archive::new().with(|next| next.owner = (33, 44)).file("d/f", "x").finish();
    apply(&archive[..], scratch.path(), &options).unwrap();
    assert_eq!(sh(scratch.path(), "stat -c '%u:%g' d d/f"), "100000:100000\n100033:100044\n");
    let archive = Archive::new().with(|next| next.owner = (70_000, 0)).file("f", "x").finish();
    let error = apply(&archive[..], scratch.path(), &options).unwrap_err();
    assert_eq!(chain(&error), "entry 'f' cannot be written: user 70000 is outside of the mapped range");
}

#[test]
fn device_nodes_can_be_left_out_but_whiteouts_not() {
    let scratch = scratch();
    let archive = Archive::new()
        .device("null", Device::Char { major: 1, minor: 3 })
        .device("hidden", Device::Char { major: 0, minor: 0 })
        .file(".wh.also", "")
        .finish();
    let options = ApplyOptions { devices: Devices::Skip, ..ApplyOptions::default() };
    let applied = apply(&archive[..], scratch.path(), &options).unwrap();
    assert_eq!(applied.skipped_devices, 1);
    assert_eq!(names(scratch.path()), ["also", "hidden"]);
}

#[test]
fn attributes_of_the_host_stay_out_of_layers() {
    let scratch = scratch();
    let xattrs = [("trusted.secret", "x"), ("security.selinux", "label"), ("user.kept", "k")];
    let archive = Archive::new()
        .with(|next| {
            next.xattrs =
                xattrs.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec())).collect();
        })
        .file("f", "x")
        .dir("d")
        .finish();
    apply_to(scratch.path(), &archive).unwrap();
    assert_eq!(sh(scratch.path(), "getfattr -d -m - f | grep ="), "user.kept=\"k\"\n");
    assert!(listing(scratch.path()).contains("user.kept"));
}

#[test]
fn a_piece_of_a_real_system_is_written_as_gnu_tar_writes_it() {
    let scratch = scratch();
    sh(
        scratch.path(),
        "mkdir ours theirs; tar -cf a.tar --sort=name --format=posix --exclude='*.lock' -C / etc usr/sbin 2>/dev/null; \
         tar --numeric-owner -xpf a.tar -C theirs",
    );
    let archive = fs::File::open(scratch.path().join("a.tar")).unwrap();
    let applied = apply(archive, &scratch.path().join("ours"), &ApplyOptions::default()).unwrap();
    assert!(applied.entries > 100);
    let strip_usr = |listing: String| -> Vec<String> {
        // The parent that is not in the archive has the time of its making.
        listing.lines().filter(|line| !line.starts_with("usr|")).map(str::to_owned).collect()
    };
    let (ours, theirs) = (listing(&scratch.path().join("ours")), listing(&scratch.path().join("theirs")));
    assert_eq!(strip_usr(ours), strip_usr(theirs));
}
