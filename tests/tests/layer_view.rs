//! `-o layer_view`: the whiteouts of container layers that foreign publishers stored as plain files work as
//! whiteouts under overlayfs.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

mod common;

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use common::{Overlay, assert_same, layer_content, unpack_layers};
use testkit::tar::TarBuilder;
use testkit::{Fixture, MountBuilder, Origin, Published, TreeEntry, compare, walk_tree};

const LAYER1: &str = ".layers/35/35d1292a7e7f8b32a4436488b407e7273c04827f5aa9cbd09c568b5d165bb12d/layerfs";
const LAYER2: &str = ".layers/2d/2df6ce4965948becf21f004d9c3875fc1e5b39aa36c74c5f9fbfb4b686d2003c/layerfs";

#[test]
fn whiteout_files_appear_as_overlayfs_understands_them() {
    let fixture = Fixture::unpack("ingested-layers").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    let mount = MountBuilder::new(&fixture.fqrn, &config).option("layer_view").mount().unwrap();
    let layer = mount.path().join(LAYER2);

    let hidden = std::fs::symlink_metadata(layer.join("etc/deleteme")).unwrap();
    assert!(hidden.file_type().is_char_device() && hidden.rdev() == 0);
    assert!(!layer.join("etc/.wh.deleteme").exists());
    assert!(!layer.join("var/cache/.wh..wh..opq").exists());
    let names: Vec<_> =
        std::fs::read_dir(layer.join("var/cache")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["new"]);
    let mut value = [0_u8; 8];
    let length = rustix::fs::getxattr(layer.join("var/cache"), "trusted.overlay.opaque", &mut value).unwrap();
    assert_eq!(&value[..length], b"y");
}

#[test]
fn two_layers_of_a_foreign_publisher_give_the_tree_that_an_engine_unpacks() {
    let fixture = Fixture::unpack("ingested-layers").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let config = fixture.client_config(&origin.url()).unwrap();
    let mount = MountBuilder::new(&fixture.fqrn, &config).option("layer_view").mount().unwrap();
    let overlay = Overlay::of(&[&mount.path().join(LAYER2), &mount.path().join(LAYER1)]);

    let tarball = |name: &str| std::fs::read(fixture.root().join("tarballs").join(name)).unwrap();
    let reference = unpack_layers(&[&tarball("layer1.tar"), &tarball("layer2.tar")]);
    // The C++ publisher gave everything to its own user and dropped extended attributes.
    let comparable = |entries: &[TreeEntry]| -> Vec<TreeEntry> {
        let strip = |entry| TreeEntry { uid: None, gid: None, xattrs: None, ..entry };
        layer_content(entries).into_iter().map(strip).collect()
    };
    assert_same(&compare(
        &comparable(&walk_tree(reference.path().join("root"))),
        &comparable(&walk_tree(overlay.path())),
    ));
}

#[test]
fn links_of_an_image_are_shown_as_they_are_and_tell_nothing_of_the_node() {
    let repository = Published::create("links.example.org").unwrap();
    let tar = TarBuilder::new()
        .symlink("secret", "$(MY_SECRET)")
        .symlink("proxy", "$(CVMFS_HTTP_PROXY)/x")
        .symlink("plain", "/usr/bin")
        .finish();
    repository.ingest("layer", &tar, &["--catalog"]).unwrap();
    let config = repository.client_config().unwrap();
    let mount = |option: &str| {
        MountBuilder::new(&repository.fqrn, &config)
            .option(option)
            .environment("MY_SECRET", "s3cret")
            .option("CVMFS_PROXY_RESET_AFTER=60")
            .mount()
            .unwrap()
    };
    let layers = mount("layer_view");
    for (name, target) in
        [("secret", "$(MY_SECRET)"), ("proxy", "$(CVMFS_HTTP_PROXY)/x"), ("plain", "/usr/bin")]
    {
        let path = layers.path().join("layer").join(name);
        assert_eq!(std::fs::read_link(&path).unwrap().to_str(), Some(target));
        assert_eq!(std::fs::symlink_metadata(&path).unwrap().len(), target.len() as u64);
    }
    layers.unmount().unwrap();
    // Without the layer view they are variant links.
    let plain = mount("cvmfs_suid");
    assert_eq!(std::fs::read_link(plain.path().join("layer/secret")).unwrap().to_str(), Some("s3cret"));
}
