//! What the writer writes is what GNU tar, Python and our own reader understand.
#![allow(clippy::unwrap_used)]

mod common;

use common::{drain, is_root, read_all, sh};
use layer_tar::{
    Device, EntryKind, LayerEntryMeta, LayerPath, LayerReader, LayerWriter, Limits, TimePrecision, Timestamp,
    WriteError, Xattr,
};
use proptest::collection::vec;
use proptest::prelude::*;
use std::io::{self, Read};
use tempfile::TempDir;

fn path(bytes: &[u8]) -> LayerPath {
    LayerPath::parse(bytes, Default::default()).unwrap()
}

fn meta(name: &[u8], mode: u32) -> LayerEntryMeta {
    LayerEntryMeta { path: path(name), mode, uid: 0, gid: 0, mtime: (1_700_000_000, 0), xattrs: Vec::new() }
}

/// A layer with one of everything that needs thought.
fn everything() -> Vec<u8> {
    let mut writer = LayerWriter::new(Vec::new()).time_precision(TimePrecision::Nanoseconds);
    let long = [&b"long/"[..], &[b'n'; 150], b"/", &[b'm'; 200]].concat();
    writer.append_dir(&meta(b"dir", 0o1777)).unwrap();
    let owned = LayerEntryMeta { uid: 3_000_000_000, gid: 2_097_152, ..meta(b"dir/owned", 0o6711) };
    writer.append_file(&owned, 5, &b"hello"[..]).unwrap();
    let attributes = vec![
        (b"user.z".to_vec(), b"last".to_vec()),
        (b"user.binary".to_vec(), b"\0\n12 a=b\n".to_vec()),
        (b"user.a=b%".to_vec(), b"odd".to_vec()),
    ];
    let attributed = LayerEntryMeta { xattrs: attributes, ..meta(b"dir/attributed", 0o644) };
    writer.append_file(&attributed, 0, io::empty()).unwrap();
    let timed = LayerEntryMeta { mtime: (-2, 500_000_000), ..meta(b"old", 0o600) };
    writer.append_file(&timed, 512, &[7u8; 512][..]).unwrap();
    writer.append_dir(&meta(&long[..155], 0o755)).unwrap();
    writer.append_file(&meta(&long, 0o644), 3, &b"abc"[..]).unwrap();
    writer.append_symlink(&meta(b"short-link", 0o777), b"../dir").unwrap();
    writer.append_symlink(&meta(b"long-link", 0o777), &long).unwrap();
    writer.append_hardlink(&meta(b"hard", 0o644), &path(&long)).unwrap();
    writer.append_file(&meta(b"caf\xe9\xff", 0o644), 1, &b"x"[..]).unwrap();
    writer.append_fifo(&meta(b"pipe", 0o600)).unwrap();
    writer.append_device(&meta(b"null", 0o666), Device::Char { major: 1, minor: 3 }).unwrap();
    writer.append_device(&meta(b"disk", 0o660), Device::Block { major: 259, minor: 1_048_575 }).unwrap();
    writer.finish().unwrap()
}

#[test]
fn the_empty_layer_is_1024_zero_bytes() {
    assert_eq!(LayerWriter::new(Vec::new()).finish().unwrap(), [0; 1024]);
}

#[test]
fn plain_entries_take_one_header_block_and_archives_end_with_two_zero_blocks() {
    let mut writer = LayerWriter::new(Vec::new());
    let name = [&[b'p'; 155][..], b"/", &[b'n'; 100]].concat();
    writer.append_file(&meta(&name, 0o644), 1, &b"x"[..]).unwrap();
    let archive = writer.finish().unwrap();
    assert_eq!(archive.len(), 512 + 512 + 1024);
    assert_eq!(archive[1024..], [0; 1024]);
    assert_eq!(read_all(&archive).unwrap()[0].path, name);
}

#[test]
fn the_same_entries_give_the_same_bytes() {
    assert_eq!(everything(), everything());
    let with = |xattrs: Vec<Xattr>| {
        let mut writer = LayerWriter::new(Vec::new());
        writer.append_dir(&LayerEntryMeta { xattrs, ..meta(b"d", 0o755) }).unwrap();
        writer.finish().unwrap()
    };
    let (a, b) = ((b"user.a".to_vec(), b"1".to_vec()), (b"user.b".to_vec(), b"2".to_vec()));
    assert_eq!(with(vec![a.clone(), b.clone()]), with(vec![b, a]));
}

#[test]
fn gnu_tar_and_python_list_the_same_members() {
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.path().join("a.tar"), everything()).unwrap();
    let gnu = sh(directory.path(), "tar --quoting-style=escape -tf a.tar 2>errors; test ! -s errors");
    let listed: Vec<&str> =
        std::str::from_utf8(&gnu).unwrap().lines().map(|line| line.trim_end_matches('/')).collect();
    let ours: Vec<String> = read_all(&everything())
        .unwrap()
        .iter()
        .map(|entry| {
            entry
                .path
                .iter()
                .map(|&b| if b < 128 { (b as char).to_string() } else { format!("\\{b:o}") })
                .collect()
        })
        .collect();
    assert_eq!(listed, ours);

    let script = r#"
import tarfile, sys
for m in tarfile.open('a.tar'):
    sys.stdout.write('%r %s %o %d %d %r %d %d:%d\n' % (m.name.encode('utf-8', 'surrogateescape'), m.type.decode(), m.mode, m.uid,
                     m.gid, float(m.mtime), m.size, m.devmajor, m.devminor))
"#;
    std::fs::write(directory.path().join("list.py"), script).unwrap();
    let python = String::from_utf8(sh(directory.path(), "/usr/bin/python3 list.py")).unwrap();
    let lines: Vec<&str> = python.lines().collect();
    assert_eq!(lines.len(), ours.len());
    assert_eq!(lines[0], "b'dir' 5 1777 0 0 1700000000.0 0 0:0");
    assert_eq!(lines[1], "b'dir/owned' 0 6711 3000000000 2097152 1700000000.0 5 0:0");
    assert_eq!(lines[3], "b'old' 0 600 0 0 -1.5 512 0:0");
    assert_eq!(lines[9], "b'caf\\xe9\\xff' 0 644 0 0 1700000000.0 1 0:0");
    assert_eq!(lines[12], "b'disk' 4 660 0 0 1700000000.0 0 259:1048575");
}

#[test]
fn gnu_tar_extracts_every_detail() {
    if !is_root() {
        return;
    }
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.path().join("a.tar"), everything()).unwrap();
    sh(directory.path(), "mkdir x; tar --xattrs --xattrs-include='*' --numeric-owner -xpf a.tar -C x");
    let x = directory.path().join("x");
    let stat = |name: &str| {
        let listed = sh(&x, &format!("stat -c '%F|%a|%u|%g|%.9Y|%s|%h' {name}"));
        String::from_utf8(listed).unwrap().trim().to_owned()
    };
    assert_eq!(stat("dir"), "directory|1777|0|0|1700000000.000000000|4096|2");
    assert_eq!(stat("dir/owned"), "regular file|6711|3000000000|2097152|1700000000.000000000|5|1");
    assert_eq!(stat("old"), "regular file|600|0|0|-1.500000000|512|1");
    assert_eq!(stat("hard"), "regular file|644|0|0|1700000000.000000000|3|2");
    assert_eq!(stat("pipe"), "fifo|600|0|0|1700000000.000000000|0|1");
    assert_eq!(
        String::from_utf8_lossy(&sh(&x, "stat -c '%F %a %t:%T' null disk")),
        "character special file 666 1:3\nblock special file 660 103:fffff\n"
    );
    assert_eq!(sh(&x, "readlink long-link | wc -c"), b"357\n");
    assert_eq!(sh(&x, "cat $(readlink long-link) hard"), b"abcabc");
    assert_eq!(sh(&x, "getfattr --only-values -n user.binary dir/attributed"), b"\0\n12 a=b\n");
    assert_eq!(sh(&x, "getfattr --only-values -n user.a=b% dir/attributed"), b"odd");
}

#[test]
fn a_file_that_shrinks_while_it_is_archived_spoils_the_archive() {
    let mut writer = LayerWriter::new(Vec::new());
    match writer.append_file(&meta(b"log", 0o644), 10, &b"short"[..]) {
        Err(WriteError::Shrunk { expected: 10, found: 5, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(writer.append_dir(&meta(b"d", 0o755)), Err(WriteError::Broken)));
    assert!(matches!(writer.finish(), Err(WriteError::Broken)));
}

#[test]
fn a_file_that_grows_is_archived_with_its_announced_size() {
    let mut writer = LayerWriter::new(Vec::new());
    writer.append_file(&meta(b"log", 0o644), 4, io::repeat(b'x')).unwrap();
    assert_eq!(read_all(&writer.finish().unwrap()).unwrap()[0].content, b"xxxx");
}

#[test]
fn sizes_beyond_the_octal_field_go_into_a_record() {
    const SIZE: u64 = 9 << 30;
    /// Keeps the head of an archive and counts the rest.
    #[derive(Debug)]
    struct Head(Vec<u8>, u64);
    impl io::Write for Head {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.extend(bytes.iter().take(4096usize.saturating_sub(self.0.len())));
            self.1 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut writer = LayerWriter::new(Head(Vec::new(), 0));
    writer.append_file(&meta(b"huge", 0o644), SIZE, io::repeat(0)).unwrap();
    let Head(head, length) = writer.finish().unwrap();
    assert_eq!(length, 3 * 512 + SIZE + 1024);
    let mut reader = LayerReader::new(head.chain(io::repeat(0)), Limits::default());
    assert_eq!(reader.next_entry().unwrap().unwrap().kind, EntryKind::File { size: SIZE });
}

#[derive(Debug, Clone)]
enum Kind {
    Dir,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Hard(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![4 => b'a'..=b'z', 1 => any::<u8>()];
    let component = vec(byte, 1..120).prop_map(|mut component: Vec<u8>| {
        component.iter_mut().for_each(|byte| {
            if matches!(*byte, 0 | b'/') {
                *byte = b'_';
            }
        });
        component[0] = b'c';
        component
    });
    vec(component, 1..5).prop_map(|components| components.join(&b'/'))
}

fn entry() -> impl Strategy<Value = (LayerEntryMeta, Kind)> {
    let kind = prop_oneof![
        Just(Kind::Dir),
        vec(any::<u8>(), 0..1500).prop_map(Kind::File),
        vec(1u8..=255, 1..300).prop_map(Kind::Symlink),
        name().prop_map(Kind::Hard),
        (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| Kind::Char(major, minor)),
        (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| Kind::Block(major, minor)),
        Just(Kind::Fifo),
    ];
    let owner = || prop_oneof![0u32..70_000, 0..u32::MAX];
    let time = (prop_oneof![0i64..2_000_000_000, any::<i64>()], prop_oneof![Just(0u32), 0u32..1_000_000_000]);
    let xattrs = proptest::collection::btree_map("user\\.[a-z=%]{1,20}", vec(any::<u8>(), 0..200), 0..4);
    (name(), 0u32..0o10000, owner(), owner(), time, xattrs, kind).prop_map(
        |(name, mode, uid, gid, mtime, xattrs, kind)| {
            let xattrs = xattrs.into_iter().map(|(name, value)| (name.into_bytes(), value)).collect();
            (LayerEntryMeta { path: path(&name), mode, uid, gid, mtime, xattrs }, kind)
        },
    )
}

fn write(entries: &[(LayerEntryMeta, Kind)]) -> Vec<u8> {
    let mut writer = LayerWriter::new(Vec::new()).time_precision(TimePrecision::Nanoseconds);
    for (meta, kind) in entries {
        match kind {
            Kind::Dir => writer.append_dir(meta),
            Kind::File(content) => writer.append_file(meta, content.len() as u64, &content[..]),
            Kind::Symlink(target) => writer.append_symlink(meta, target),
            Kind::Hard(target) => writer.append_hardlink(meta, &path(target)),
            Kind::Char(major, minor) => {
                writer.append_device(meta, Device::Char { major: *major, minor: *minor })
            }
            Kind::Block(major, minor) => {
                writer.append_device(meta, Device::Block { major: *major, minor: *minor })
            }
            Kind::Fifo => writer.append_fifo(meta),
        }
        .unwrap();
    }
    writer.finish().unwrap()
}

/// Hands bytes over in portions that a test chooses.
struct Portions<'a>(&'a [u8], usize);

impl Read for Portions<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = self.1.min(buffer.len());
        self.0.read(&mut buffer[..limit])
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(entries in vec(entry(), 0..8), portion in 1usize..2000) {
        let archive = write(&entries);
        let read = drain(LayerReader::new(Portions(&archive, portion), Limits::default())).unwrap();
        prop_assert_eq!(read.len(), entries.len());
        for ((meta, kind), found) in entries.iter().zip(&read) {
            prop_assert_eq!(meta.path.as_bytes(), &found.path[..]);
            prop_assert_eq!((meta.mode, meta.uid, meta.gid), (found.mode, found.uid, found.gid));
            let mtime: Timestamp = meta.mtime;
            prop_assert_eq!(mtime, found.mtime);
            prop_assert_eq!(&meta.xattrs, &found.xattrs);
            let expected = match kind {
                Kind::Dir => EntryKind::Directory,
                Kind::File(content) => EntryKind::File { size: content.len() as u64 },
                Kind::Symlink(target) => EntryKind::Symlink(target.clone()),
                Kind::Hard(target) => EntryKind::HardLink(path(target)),
                Kind::Char(major, minor) => EntryKind::Char { major: *major, minor: *minor },
                Kind::Block(major, minor) => EntryKind::Block { major: *major, minor: *minor },
                Kind::Fifo => EntryKind::Fifo,
            };
            prop_assert_eq!(&expected, &found.kind);
            if let Kind::File(content) = kind {
                prop_assert_eq!(content, &found.content);
            }
        }
    }
}
