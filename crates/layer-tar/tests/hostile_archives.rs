//! Archives made to hurt: every one ends in an error that names the rule, none in a panic, in endless work
//! or in wrong content.
#![allow(clippy::unwrap_used)]

mod common;

use common::{drain, read_all};
use layer_tar::{EntryKind, LayerEntryMeta, LayerPath, LayerReader, LayerWriter, Limits, TarError};
use proptest::prelude::*;
use std::io::{self, Read};

/// A USTAR header block with the checksum set; `edit` may spoil any field first.
fn header(name: &[u8], flag: u8, size: u64, edit: impl FnOnce(&mut [u8; 512])) -> [u8; 512] {
    let mut block = [0u8; 512];
    block[..name.len()].copy_from_slice(name);
    block[100..107].copy_from_slice(b"0000644");
    block[108..115].copy_from_slice(b"0000000");
    block[116..123].copy_from_slice(b"0000000");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[136..147].copy_from_slice(b"00000000000");
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    edit(&mut block);
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}

fn plain(name: &[u8], flag: u8) -> [u8; 512] {
    header(name, flag, 0, |_| {})
}

fn gnu(block: &mut [u8; 512]) {
    block[257..265].copy_from_slice(b"ustar  \0");
}

fn record(key: &str, value: &str) -> String {
    let rest = key.len() + value.len() + 3;
    let length = (rest + 1..).find(|length| *length == rest + length.to_string().len()).unwrap();
    format!("{length} {key}={value}\n")
}

fn pax(flag: u8, data: &[u8]) -> Vec<u8> {
    let mut blocks = header(b"PaxHeader", flag, data.len() as u64, |_| {}).to_vec();
    blocks.extend_from_slice(data);
    blocks.resize(blocks.len().next_multiple_of(512), 0);
    blocks
}

fn archive(parts: &[&[u8]]) -> Vec<u8> {
    let mut archive = parts.concat();
    archive.resize(archive.len() + 1024, 0);
    archive
}

fn refused(archive: &[u8]) -> String {
    let error = read_all(archive).expect_err("the archive must be refused");
    let mut message = error.to_string();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(next) = cause.source() {
        message = format!("{message}: {next}");
        cause = next;
    }
    message
}

#[test]
fn names_that_lead_out_of_the_layer() {
    assert!(refused(&archive(&[&plain(b"../etc/passwd", b'0')])).contains("contains '..'"));
    assert!(refused(&archive(&[&plain(b"a/b/../../../x", b'0')])).contains("contains '..'"));
    assert!(refused(&archive(&[&plain(b"/etc/passwd", b'0')])).contains("absolute"));
    assert!(
        refused(&archive(&[&pax(b'x', record("path", "../x").as_bytes()), &plain(b"ok", b'0')]))
            .contains("'..'")
    );
    assert!(
        refused(&archive(&[&pax(b'x', record("path", "a\0b").as_bytes()), &plain(b"ok", b'0')]))
            .contains("NUL")
    );
    assert!(refused(&archive(&[&plain(b"", b'0')])).contains("empty path"));
    assert!(refused(&archive(&[&plain(b".wh...", b'0')])).contains("whiteout without a target"));
    assert!(refused(&archive(&[&plain(b"./", b'2')])).contains("empty"));
    let link = header(b"link", b'1', 0, |block| block[157..163].copy_from_slice(b"../../"));
    assert!(refused(&archive(&[&link])).contains("hard link 'link' to '../../'"));
}

#[test]
fn a_root_that_is_not_a_directory() {
    assert!(refused(&archive(&[&plain(b".", b'0')])).contains("root of the layer"));
    assert!(refused(&archive(&[&plain(b"./.", b'6')])).contains("root of the layer"));
}

#[test]
fn links_without_a_usable_target() {
    assert!(refused(&archive(&[&plain(b"l", b'2')])).contains("link target is empty"));
    let long = record("linkpath", &"x".repeat(4096));
    assert!(
        refused(&archive(&[&pax(b'x', long.as_bytes()), &plain(b"l", b'2')])).contains("longer than 4095")
    );
    assert!(refused(&archive(&[&plain(b"l", b'1')])).contains("name is empty"));
}

#[test]
fn headers_with_a_wrong_checksum_or_garbage_numbers() {
    let mut block = plain(b"f", b'0');
    block[0] = b'g';
    assert!(refused(&archive(&[&block])).contains("checksum"));
    for field in [100..107, 108..115, 116..123, 136..147] {
        let block = header(b"f", b'0', 0, |block| block[field.clone()].fill(b'9'));
        refused(&archive(&[&block]));
    }
    let negative = header(b"f", b'0', 0, |block| block[124..136].fill(0xff));
    refused(&archive(&[&negative]));
    let negative = header(b"f", b'0', 0, |block| {
        block[108..116].fill(0xff);
    });
    assert!(refused(&archive(&[&negative])).contains("uid is not a Linux owner"));
    let huge = header(b"f", b'0', 0, |block| {
        block[136..148].fill(0);
        (block[136], block[137]) = (0x80, 0x01);
    });
    assert!(refused(&archive(&[&huge])).contains("mtime does not fit"));
    let device = header(b"d", b'3', 0, |block| block[329..336].copy_from_slice(b"0010000"));
    assert!(refused(&archive(&[&device])).contains("device major number"));
}

#[test]
fn extension_records_that_lie() {
    for data in
        ["13 uid=-1234\n", "9 uid=x\n\n", "5 u=1", "999 path=x\n", "abc", "11 size=1e9\n", "12 mtime=1.x\n"]
    {
        refused(&archive(&[&pax(b'x', data.as_bytes()), &plain(b"f", b'0')]));
    }
    // Two in a row, one in front of a global header, one in front of nothing.
    let uid = pax(b'x', record("uid", "1").as_bytes());
    assert!(refused(&archive(&[&uid, &uid, &plain(b"f", b'0')])).contains("duplicate PAX"));
    let comment = pax(b'g', record("comment", "c").as_bytes());
    assert!(refused(&archive(&[&uid, &comment, &plain(b"f", b'0')])).contains("without a following"));
    assert!(refused(&archive(&[&uid])).contains("without a following"));
    for key in ["path", "linkpath", "size", "SCHILY.xattr.user.x", "GNU.sparse.major"] {
        let global = pax(b'g', record(key, "1").as_bytes());
        assert!(refused(&archive(&[&global, &plain(b"f", b'0')])).contains(key));
    }
}

#[test]
fn extension_headers_of_great_size() {
    let data = record("comment", &"c".repeat(1 << 20));
    assert!(refused(&archive(&[&pax(b'x', data.as_bytes()), &plain(b"f", b'0')])).contains("exceeds limit"));
    let claim = header(b"PaxHeader", b'x', 0o77777777777, |_| {});
    assert!(refused(&archive(&[&claim])).contains("exceeds limit"));
    let claim = header(b"long", b'L', 0o77777777777, gnu);
    assert!(refused(&archive(&[&claim])).contains("exceeds limit"));
    let value = record("SCHILY.xattr.user.big", &"v".repeat(65537));
    assert!(
        refused(&archive(&[&pax(b'x', value.as_bytes()), &plain(b"f", b'0')])).contains("larger than 65536")
    );
    let many: String = (0..1025).map(|i| record(&format!("SCHILY.xattr.user.{i}"), "")).collect();
    assert!(
        refused(&archive(&[&pax(b'x', many.as_bytes()), &plain(b"f", b'0')]))
            .contains("1024 extended attributes")
    );
}

#[test]
fn sparse_maps_that_contradict_their_data() {
    let sparse = |records: &[(&str, &str)], size: u64| {
        let data: String = records.iter().map(|(key, value)| record(key, value)).collect();
        archive(&[&pax(b'x', data.as_bytes()), &header(b"f", b'0', size, |_| {}), &[b'x'; 512]])
    };
    let map = |map: &str, real: &str| {
        sparse(&[("GNU.sparse.size", real), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.map", map)], 512)
    };
    assert_eq!(read_all(&map("0,512", "512")).unwrap()[0].content, [b'x'; 512]);
    assert!(refused(&map("0,512", "511")).contains("beyond the file's end"));
    assert!(refused(&map("0,511", "512")).contains("stored bytes"));
    assert!(refused(&map("256,256,0,256", "512")).contains("unordered"));
    assert!(refused(&map("18446744073709551615,512", "512")).contains("beyond"));
    assert!(refused(&map("0", "512")).contains("odd number"));
    // A version that nobody has defined must not be delivered as if it were the file.
    let version_2 = [("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")];
    assert!(refused(&sparse(&version_2, 512)).contains("form that is not supported"));
    assert!(refused(&sparse(&[("SCHILY.realsize", "9")], 512)).contains("star's form"));
}

#[test]
fn sparse_headers_without_end() {
    // Old GNU: extension blocks that always announce another one.
    let first = header(b"f", b'S', 0, |block| {
        gnu(block);
        block[482] = 1;
        block[483..494].copy_from_slice(b"00000000000");
    });
    let mut extension = [0u8; 512];
    extension[504] = 1;
    let blocks = extension.repeat(64 * 1024);
    let archive = [&first[..], &blocks].concat();
    assert!(refused(&archive).contains("take more than 8388608 bytes"), "{}", refused(&archive));
    // Version 1.0: a map without a single line end.
    let data: String = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")]
        .map(|(k, v)| record(k, v))
        .concat();
    let start = [pax(b'x', data.as_bytes()), header(b"f", b'0', 1 << 30, |_| {}).to_vec()].concat();
    let endless = start.chain(io::repeat(b'1'));
    match drain(LayerReader::new(endless, Limits::default())) {
        Err(TarError::HeaderTooLarge { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn holes_larger_than_the_limit() {
    let data = record("GNU.sparse.size", "9000000000000000000")
        + &record("GNU.sparse.numblocks", "1")
        + &record("GNU.sparse.map", "0,0");
    let bomb = archive(&[&pax(b'x', data.as_bytes()), &plain(b"bomb", b'0')]);
    let mut reader = LayerReader::new(&bomb[..], Limits::default());
    match reader.next_entry() {
        Err(TarError::Limit { entry, limit, .. }) => {
            assert_eq!((&entry[..], limit), ("bomb", Limits::TOTAL_SIZE));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(reader.next_entry(), Err(TarError::Broken)));
}

#[test]
fn more_entries_than_the_limit() {
    let comment = pax(b'g', record("comment", "c").as_bytes());
    let many = archive(&[&plain(b"a", b'0'), &comment, &plain(b"b", b'0')]);
    let limits = Limits { entries: 2, ..Limits::default() };
    match drain(LayerReader::new(&many[..], limits)) {
        Err(TarError::Limit { entry, limit: 2, .. }) => assert_eq!(entry, "b"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_zero_block_in_the_middle() {
    let archive = archive(&[&plain(b"a", b'0'), &[0; 512], &plain(b"b", b'0')]);
    match read_all(&archive) {
        Err(TarError::LoneZeroBlock { offset: 512 }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn types_that_are_not_layer_content() {
    for flag in [b'D', b'M', b'N', b'V', b'8', b'Z', 0xff] {
        assert!(refused(&archive(&[&plain(b"f", flag)])).contains("which a layer cannot hold"));
    }
    // Extension types count only in dialects that have them.
    let v7 = header(b"f", b'L', 0, |block| block[257..265].fill(0));
    assert!(refused(&archive(&[&v7])).contains("type 'L'"));
}

#[test]
fn an_empty_stream_is_a_cut_archive() {
    assert!(matches!(read_all(b""), Err(TarError::CutArchive { offset: 0 })));
    assert!(matches!(read_all(&[0; 512]), Err(TarError::CutArchive { offset: 512 })));
    assert!(read_all(&[0; 1024]).unwrap().is_empty());
}

#[test]
fn errors_of_the_stream_keep_their_cause() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::new(io::ErrorKind::ConnectionReset, "peer is gone"))
        }
    }
    let block = header(b"f", b'0', 1000, |_| {});
    let stream = block.chain(Failing);
    match drain(LayerReader::new(stream, Limits::default())) {
        Err(TarError::Io { source, .. }) => assert_eq!(source.kind(), io::ErrorKind::ConnectionReset),
        other => panic!("{other:?}"),
    }
}

fn valid() -> Vec<u8> {
    let mut writer = LayerWriter::new(Vec::new());
    let meta = |name: &[u8]| LayerEntryMeta {
        path: LayerPath::parse(name, Default::default()).unwrap(),
        mode: 0o644,
        uid: 3_000_000_000,
        gid: 0,
        mtime: (-5, 0),
        xattrs: vec![(b"user.x".to_vec(), b"\0\n".to_vec())],
    };
    writer.append_dir(&meta(b"d")).unwrap();
    writer.append_file(&meta(&[b'n'; 150]), 700, io::repeat(b'c')).unwrap();
    writer.append_hardlink(&meta(b"h"), &meta(&[b'n'; 150]).path).unwrap();
    let sparse = record("GNU.sparse.major", "1")
        + &record("GNU.sparse.minor", "0")
        + &record("GNU.sparse.realsize", "2048");
    let mut map = b"2\n0\n512\n1024\n512\n".to_vec();
    map.resize(512, 0);
    let mut bytes = writer.finish().unwrap();
    bytes.truncate(bytes.len() - 1024);
    archive(&[
        &bytes,
        &pax(b'x', sparse.as_bytes()),
        &header(b"s", b'0', 1536, |_| {}),
        &map,
        &[b'a'; 512],
        &[b'b'; 512],
    ])
}

#[test]
fn the_archive_that_is_spoilt_below_is_good() {
    let entries = read_all(&valid()).unwrap();
    assert_eq!(entries.len(), 4);
    assert_eq!(entries[3].kind, EntryKind::File { size: 2048 });
    let expected = [[b'a'; 512], [0; 512], [b'b'; 512], [0; 512]].concat();
    assert_eq!(entries[3].content, expected);
}

/// Repairs all checksums, so that spoilt fields reach the code behind the checksum.
fn with_checksums(mut bytes: Vec<u8>) -> Vec<u8> {
    for block in bytes.chunks_exact_mut(512) {
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
            block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = read_all(&bytes);
    }

    #[test]
    fn spoilt_archives_never_panic_and_never_leave_the_layer(
        spoils in proptest::collection::vec((0usize..8192, any::<u8>()), 1..12)
    ) {
        let mut bytes = valid();
        let length = bytes.len();
        for (at, value) in spoils {
            bytes[at % length] = value;
        }
        let limits = Limits { total_size: 1 << 20, ..Limits::default() };
        if let Ok(entries) = drain(LayerReader::new(&with_checksums(bytes)[..], limits)) {
            for entry in entries {
                prop_assert!(!entry.path.starts_with(b"/"));
                prop_assert!(entry.path.split(|&byte| byte == b'/').all(|component| component != b".."));
            }
        }
    }
}
