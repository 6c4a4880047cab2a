//! Overlays on this machine's kernel, in every way that leads to one.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Archive, Mounted, chain, names, scratch, sh};
use overlay::OpaqueXattr;
use overlay::apply::{ApplyOptions, apply};
use overlay::mount::{
    MAX_LOWERS, Marks, MountError, OverlayMount, Support, Unmount, Way, probe, remove_mount_point, unmount,
};
use overlay::mountinfo::{mount_at, mounts_below};
use std::fs;
use std::path::{Path, PathBuf};

const WAYS: [Way; 3] = [Way::Descriptors, Way::Strings, Way::Classic];

/// The kernel's support as if it had nothing better than `way`. Skips ways that this kernel does not have.
fn ways() -> Vec<Support> {
    let best = probe().unwrap();
    let from = WAYS.iter().position(|way| *way == best.way).unwrap();
    WAYS[from..].iter().map(|way| Support { way: *way, ..best }).collect()
}

fn mount_with(overlay: &OverlayMount, at: &Path, support: &Support) -> Result<Mounted, MountError> {
    fs::create_dir_all(at).unwrap();
    overlay.mount_with(at, support)?;
    Ok(Mounted(at.to_owned()))
}

fn layers(root: &Path, count: usize) -> Vec<PathBuf> {
    (0..count)
        .map(|index| {
            let layer = root.join(format!("l/{index:03}"));
            fs::create_dir_all(&layer).unwrap();
            fs::write(layer.join(format!("f{index}")), b"").unwrap();
            fs::write(layer.join("topmost"), index.to_string()).unwrap();
            layer
        })
        .collect()
}

#[test]
fn a_modern_kernel_takes_descriptors_and_knows_the_options() {
    let release = sh(Path::new("/"), "uname -r");
    let support = probe().unwrap();
    let version: Vec<u32> = release.split(['.', '-']).take(2).map(|part| part.parse().unwrap()).collect();
    if (version[0], version[1]) >= (6, 13) {
        assert_eq!(
            support,
            Support { way: Way::Descriptors, index: true, redirect_dir: true, metacopy: true }
        );
    }
}

#[test]
fn every_way_gives_the_same_mount_with_the_same_options() {
    let mut seen = Vec::new();
    for support in ways() {
        let scratch = scratch();
        let lowers = layers(scratch.path(), 3);
        let (upper, work) = (scratch.path().join("up"), scratch.path().join("work"));
        fs::create_dir_all(&upper).unwrap();
        fs::create_dir_all(&work).unwrap();
        let overlay =
            OverlayMount { lowers, upper: Some(upper.clone()), work: Some(work), ..OverlayMount::default() };
        let merged = mount_with(&overlay, &scratch.path().join("merged"), &support).unwrap();
        assert_eq!(names(&merged.0), ["f0", "f1", "f2", "topmost"], "{support:?}");
        assert_eq!(fs::read_to_string(merged.0.join("topmost")).unwrap(), "0", "{support:?}");
        fs::write(merged.0.join("new"), b"n").unwrap();
        fs::remove_file(merged.0.join("f1")).unwrap();
        assert_eq!(names(&upper), ["f1", "new"], "{support:?}");
        let info = mount_at(&merged.0).unwrap().unwrap();
        assert!(info.is_overlay());
        let options = info.super_options.into_string().unwrap();
        for unwanted in ["index=on", "redirect_dir=on", "metacopy=on"] {
            assert!(!options.contains(unwanted), "{support:?}: {options}");
        }
        seen.push(support.way);
    }
    assert!(seen.contains(&Way::Classic));
}

#[test]
fn directory_renames_do_not_leave_redirects_behind() {
    let scratch = scratch();
    let lower = Archive::new().file("d/f", "x").layer(&scratch.path().join("lower"));
    let upper = scratch.path().join("upper");
    let merged = Mounted::writable(&scratch.path().join("merged"), &upper, &[&lower]);
    assert!(fs::rename(merged.0.join("d"), merged.0.join("e")).is_err(), "redirect_dir is on");
    sh(&merged.0, "mv d e; chmod 600 e/f");
    drop(merged);
    assert_eq!(sh(&upper, "getfattr -R -h -m 'redirect|metacopy' . | grep -c overlay || true"), "0\n");
    assert_eq!(fs::read_to_string(upper.join("e/f")).unwrap(), "x");
}

#[test]
fn five_hundred_layers_mount_and_one_more_is_a_clear_error() {
    for support in ways() {
        let scratch = scratch();
        let mut lowers = layers(scratch.path(), MAX_LOWERS);
        let at = scratch.path().join("merged");
        let overlay = OverlayMount { lowers: lowers.clone(), ..OverlayMount::default() };
        let merged = mount_with(&overlay, &at, &support)
            .unwrap_or_else(|error| panic!("{support:?} {}", chain(&error)));
        assert_eq!(fs::read_dir(&merged.0).unwrap().count(), MAX_LOWERS + 1, "{support:?}");
        assert_eq!(fs::read_to_string(merged.0.join("topmost")).unwrap(), "0", "{support:?}");
        let info = mount_at(&at).unwrap().unwrap();
        assert!(info.is_overlay() && info.super_options.len() > 2000, "{support:?}");
        drop(merged);

        lowers.push(lowers[0].with_file_name("one-more"));
        fs::create_dir(lowers.last().unwrap()).unwrap();
        let overlay = OverlayMount { lowers, ..OverlayMount::default() };
        let error = mount_with(&overlay, &at, &support).map(|_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "501 layers cannot be stacked: the kernel's limit is 500 lower directories; flatten the image"
        );
        assert!(mount_at(&at).unwrap().is_none());
    }
}

#[test]
fn five_hundred_layers_with_long_paths_mount_too() {
    for support in ways() {
        let scratch = scratch();
        // Too long for one string of options even relative to the common directory, and for fsconfig's 255 bytes.
        let lowers = layers(&scratch.path().join("p".repeat(200)).join("q".repeat(200)), MAX_LOWERS);
        let lowers: Vec<PathBuf> = lowers
            .into_iter()
            .enumerate()
            .map(|(index, layer)| {
                let longer = layer.with_file_name(format!("{index:03}{}", "r".repeat(60)));
                fs::rename(layer, &longer).unwrap();
                longer
            })
            .collect();
        let overlay = OverlayMount { lowers, ..OverlayMount::default() };
        let merged = mount_with(&overlay, &scratch.path().join("merged"), &support)
            .unwrap_or_else(|error| panic!("{support:?} {}", chain(&error)));
        assert_eq!(fs::read_dir(&merged.0).unwrap().count(), MAX_LOWERS + 1, "{support:?}");
    }
}

#[test]
fn paths_with_every_special_character_work_in_every_way() {
    for support in ways() {
        let scratch = scratch();
        let home = scratch.path().join("a:b, c\\d=\"e\":\\,").join("caf\u{e9}\\:x");
        let lowers = vec![home.join("top:1,\\"), home.join("bottom:\\:2")];
        let (upper, work) = (home.join("up:per,\\"), home.join("work:,\\\\"));
        for directory in lowers.iter().chain([&upper, &work]) {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(lowers[0].join("t"), b"").unwrap();
        fs::write(lowers[1].join("b"), b"").unwrap();
        let overlay =
            OverlayMount { lowers, upper: Some(upper.clone()), work: Some(work), ..OverlayMount::default() };
        let at = home.join("merged here:,\\");
        let merged = mount_with(&overlay, &at, &support)
            .unwrap_or_else(|error| panic!("{support:?} {}", chain(&error)));
        fs::write(merged.0.join("u"), b"").unwrap();
        assert_eq!(names(&merged.0), ["b", "t", "u"], "{support:?}");
        assert!(upper.join("u").exists());
        assert_eq!(mount_at(&at).unwrap().unwrap().mount_point, at, "{support:?}");
        assert_eq!(mounts_below(&home).unwrap().len(), 1, "{support:?}");
    }
}

#[test]
fn one_layer_alone_and_an_upper_alone_can_be_mounted() {
    for support in ways() {
        let scratch = scratch();
        let lowers = layers(scratch.path(), 1);
        let merged = scratch.path().join("merged");
        let alone = OverlayMount { lowers, ..OverlayMount::default() };
        let mounted = mount_with(&alone, &merged, &support).unwrap();
        assert_eq!(names(&mounted.0), ["f0", "topmost"], "{support:?}");
        assert!(fs::write(mounted.0.join("x"), b"").is_err(), "a mount without upper directory is read-only");
        drop(mounted);
        let (upper, work) = (scratch.path().join("up"), scratch.path().join("work"));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let alone = OverlayMount { upper: Some(upper), work: Some(work), ..OverlayMount::default() };
        let mounted = mount_with(&alone, &merged, &support).unwrap();
        fs::write(mounted.0.join("x"), b"").unwrap();
        drop(mounted);
        assert!(fs::read_dir(&merged).unwrap().next().is_none());
    }
    let nowhere = scratch();
    let error = OverlayMount::default().mount(nowhere.path()).unwrap_err();
    assert!(matches!(error, MountError::Empty));
}

#[test]
fn user_attributes_count_on_request() {
    for support in ways() {
        let scratch = scratch();
        let base = Archive::new().file("d/old", "o").layer(&scratch.path().join("base"));
        let top = scratch.path().join("top");
        fs::create_dir(&top).unwrap();
        let archive = Archive::new().file("d/.wh..wh..opq", "").file("d/new", "n").finish();
        apply(&archive[..], &top, &ApplyOptions { opaque: OpaqueXattr::User, ..ApplyOptions::default() })
            .unwrap();
        let overlay = OverlayMount { lowers: vec![top, base], marks: Marks::User, ..OverlayMount::default() };
        let merged = mount_with(&overlay, &scratch.path().join("merged"), &support).unwrap();
        assert_eq!(names(&merged.0), ["d/", "d/new"], "{support:?}");
        drop(merged);
        let overlay = OverlayMount { marks: Marks::Trusted, ..overlay };
        let merged = mount_with(&overlay, &scratch.path().join("merged"), &support).unwrap();
        assert_eq!(names(&merged.0), ["d/", "d/new", "d/old"], "{support:?}");
    }
}

#[test]
fn what_is_missing_is_named() {
    for support in ways() {
        let scratch = scratch();
        let mut lowers = layers(scratch.path(), 2);
        lowers.push(scratch.path().join("l/gone"));
        let overlay = OverlayMount { lowers, ..OverlayMount::default() };
        let message =
            chain(&mount_with(&overlay, &scratch.path().join("merged"), &support).map(|_| ()).unwrap_err());
        assert!(message.contains("cannot open the lower directory"), "{message}");
        assert!(message.contains("/l/gone'") && message.contains("No such file"), "{message}");
    }
}

#[test]
fn the_kernel_s_own_words_are_in_the_error() {
    let scratch = scratch();
    let lowers = layers(scratch.path(), 3);
    let disk = scratch.path().join("disk");
    fs::create_dir_all(disk.join("upper")).unwrap();
    fs::create_dir_all(disk.join("work")).unwrap();
    sh(scratch.path(), "mount --bind disk disk; mount -o remount,bind,ro disk");
    let _read_only = Mounted(disk.clone());
    for support in ways() {
        let overlay = OverlayMount {
            lowers: lowers.clone(),
            upper: Some(disk.join("upper")),
            work: Some(disk.join("work")),
            ..OverlayMount::default()
        };
        let message =
            chain(&mount_with(&overlay, &scratch.path().join("merged"), &support).map(|_| ()).unwrap_err());
        let expected = if support.way == Way::Classic { "dmesg" } else { "read-only" };
        assert!(message.contains(expected) && message.contains("3 layers"), "{support:?} {message}");
    }
    assert!(mount_at(&scratch.path().join("merged")).unwrap().is_none());
}

#[test]
fn a_label_cannot_smuggle_in_options() {
    let scratch = scratch();
    let overlay = OverlayMount {
        lowers: layers(scratch.path(), 2),
        label: Some("x\",upperdir=/etc".to_owned()),
        ..OverlayMount::default()
    };
    assert!(matches!(overlay.mount(scratch.path()), Err(MountError::Label { .. })));
}

#[test]
fn unmounting_says_whether_there_was_a_mount() {
    let scratch = scratch();
    let lowers = layers(scratch.path(), 2);
    let at = scratch.path().join("merged");
    fs::create_dir(&at).unwrap();
    assert!(!unmount(&at, Unmount::Normal).unwrap());
    assert!(!unmount(&scratch.path().join("nowhere"), Unmount::Lazy).unwrap());
    OverlayMount { lowers, ..OverlayMount::default() }.mount(&at).unwrap();
    let busy = fs::File::open(at.join("f0")).unwrap();
    assert!(matches!(unmount(&at, Unmount::Normal), Err(MountError::Unmount { .. })));
    assert!(unmount(&at, Unmount::Lazy).unwrap());
    drop(busy);
    remove_mount_point(&at).unwrap();
    remove_mount_point(&at).unwrap();
    fs::create_dir_all(at.join("content")).unwrap();
    assert!(matches!(remove_mount_point(&at), Err(MountError::MountPoint { .. })));
}

#[test]
fn two_mounts_of_the_same_layers_do_not_get_in_each_other_s_way() {
    let scratch = scratch();
    let lowers = layers(scratch.path(), 2);
    let layers: Vec<&Path> = lowers.iter().map(PathBuf::as_path).collect();
    let one = Mounted::writable(&scratch.path().join("one"), &scratch.path().join("up1"), &layers);
    let two = Mounted::writable(&scratch.path().join("two"), &scratch.path().join("up2"), &layers);
    fs::write(one.0.join("f0"), b"changed").unwrap();
    assert_eq!(fs::read_to_string(two.0.join("f0")).unwrap(), "");
}
