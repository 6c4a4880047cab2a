//! What GNU tar writes, in all its dialects, is read as it was on disk.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Found, drain, find, is_root, read_all, sh};
use layer_tar::{EndOfArchive, EntryKind, LayerPath, LayerReader, Limits, TarError};
use std::path::Path;
use tempfile::TempDir;

fn tree(script: &str) -> TempDir {
    let directory = TempDir::new().unwrap();
    sh(directory.path(), &format!("umask 022; mkdir t; cd t; {script}"));
    directory
}

fn tar(directory: &Path, options: &str) -> Vec<u8> {
    sh(directory, &format!("tar -cf - --sort=name -C t {options} ."))
}

fn link_path(bytes: &[u8]) -> LayerPath {
    LayerPath::parse(bytes, Default::default()).unwrap()
}

#[test]
fn every_dialect_gives_the_same_entries() {
    let directory = tree(
        "mkdir -m 1777 tmp; printf hello > tmp/file; chmod 4755 tmp/file; ln tmp/file tmp/hard; \
         ln -s ../else/where link; mkfifo pipe; : > empty; head -c 70000 /dev/zero | tr '\\0' z > big; \
         touch -h -d @1700000000 . tmp tmp/* link pipe empty big",
    );
    for dialect in ["v7", "oldgnu", "gnu", "ustar", "posix"] {
        // V7 knows no named pipes.
        let without = if dialect == "v7" { "--exclude=pipe" } else { "" };
        let archive =
            tar(directory.path(), &format!("--format={dialect} --owner=1234 --group=4321 {without}"));
        let entries = read_all(&archive).unwrap_or_else(|error| panic!("{dialect}: {error:?}"));
        assert_eq!(entries.len(), if dialect == "v7" { 7 } else { 8 }, "{dialect}");
        for entry in &entries {
            assert_eq!((entry.uid, entry.gid), (1234, 4321), "{dialect}");
            assert_eq!(entry.mtime, (1_700_000_000, 0), "{dialect}");
        }
        let root = find(&entries, b"");
        assert_eq!((&root.kind, root.mode), (&EntryKind::Directory, 0o755));
        assert_eq!(
            (&find(&entries, b"tmp").kind, find(&entries, b"tmp").mode),
            (&EntryKind::Directory, 0o1777)
        );
        let file = find(&entries, b"tmp/file");
        assert_eq!(
            (&file.kind, file.mode, &file.content[..]),
            (&EntryKind::File { size: 5 }, 0o4755, &b"hello"[..])
        );
        assert_eq!(
            find(&entries, b"tmp/hard").kind,
            EntryKind::HardLink(link_path(b"tmp/file")),
            "{dialect}"
        );
        assert_eq!(find(&entries, b"link").kind, EntryKind::Symlink(b"../else/where".to_vec()), "{dialect}");
        assert_eq!(find(&entries, b"big").content, vec![b'z'; 70_000], "{dialect}");
        assert_eq!(find(&entries, b"empty").kind, EntryKind::File { size: 0 }, "{dialect}");
        if dialect != "v7" {
            assert_eq!(find(&entries, b"pipe").kind, EntryKind::Fifo, "{dialect}");
        }
    }
}

#[test]
fn long_and_binary_names_arrive_whole() {
    let long = "n".repeat(150);
    let deep = vec!["d".repeat(100); 5].join("/");
    let directory = tree(&format!(
        "mkdir -p {deep}; printf x > {deep}/{long}; ln -s {deep}/{long} sym; ln {deep}/{long} zhard; \
         printf y > $'caf\\xe9\\xff'; printf z > $'new\\nline'"
    ));
    for dialect in ["oldgnu", "gnu", "posix"] {
        let entries = read_all(&tar(directory.path(), &format!("--format={dialect}"))).unwrap();
        let path = format!("{deep}/{long}").into_bytes();
        assert_eq!(find(&entries, &path).content, b"x", "{dialect}");
        assert_eq!(find(&entries, b"sym").kind, EntryKind::Symlink(path.clone()), "{dialect}");
        assert_eq!(find(&entries, b"zhard").kind, EntryKind::HardLink(link_path(&path)), "{dialect}");
        assert_eq!(find(&entries, b"caf\xe9\xff").content, b"y", "{dialect}");
        assert_eq!(find(&entries, b"new\nline").content, b"z", "{dialect}");
    }
    let short = tree(&format!("mkdir -p {0}/{0}; printf x > {0}/{0}/leaf", "u".repeat(70)));
    let entries = read_all(&tar(short.path(), "--format=ustar")).unwrap();
    assert_eq!(find(&entries, format!("{0}/{0}/leaf", "u".repeat(70)).as_bytes()).content, b"x");
}

#[test]
fn sparse_files_of_every_form_expand_to_the_file_on_disk() {
    // 8 MiB with data at both ends of some extents, a hole at the end, and many extents for extension blocks.
    let directory = tree(
        "truncate -s 8M few; printf data | dd of=few bs=1 seek=1048576 conv=notrunc status=none; \
         printf tail | dd of=few bs=1 seek=4194304 conv=notrunc status=none; \
         truncate -s 4M many; for i in $(seq 0 60); do printf $i | dd of=many bs=1 seek=$((i*65536)) conv=notrunc status=none; done; \
         truncate -s 1M hole; printf dense > dense",
    );
    let forms = [
        ("--format=oldgnu --sparse", "oldgnu"),
        ("--format=gnu --sparse", "gnu"),
        ("--format=posix --sparse --sparse-version=0.0", "0.0"),
        ("--format=posix --sparse --sparse-version=0.1", "0.1"),
        ("--format=posix --sparse --sparse-version=1.0", "1.0"),
    ];
    for (options, form) in forms {
        let archive = tar(directory.path(), options);
        assert!(archive.len() < 2_000_000, "{form}: GNU tar did not write a sparse archive");
        let entries = read_all(&archive).unwrap_or_else(|error| panic!("{form}: {error:?}"));
        for name in ["few", "many", "hole", "dense"] {
            let expected = std::fs::read(directory.path().join("t").join(name)).unwrap();
            let entry = find(&entries, name.as_bytes());
            assert_eq!(entry.kind, EntryKind::File { size: expected.len() as u64 }, "{form} {name}");
            assert!(entry.content == expected, "{form} {name}: content differs");
        }
        assert_eq!(find(&entries, b"hole").ranges, [], "{form}");
        assert!(find(&entries, b"many").ranges.len() >= 60, "{form}");
        assert_eq!(entries.len(), 5, "{form}");
    }
}

#[test]
fn binary_extended_attributes_arrive_and_overlay_ones_do_not() {
    if !is_root() {
        return;
    }
    let directory = tree(
        "printf x > f; mkdir d; \
         setfattr -n user.plain -v text f; setfattr -n user.binary -v 0x000a3d0a31322061 f; setfattr -n user.a=b -v 1 f; \
         setfattr -n trusted.overlay.opaque -v y d; setfattr -n user.overlay.opaque -v y d; setfattr -n trusted.mine -v t d; \
         setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 f",
    );
    let entries = read_all(&tar(directory.path(), "--format=posix --xattrs --xattrs-include='*'")).unwrap();
    let value = |path: &[u8], name: &[u8]| {
        find(&entries, path).xattrs.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone())
    };
    assert_eq!(value(b"f", b"user.plain").unwrap(), b"text");
    assert_eq!(value(b"f", b"user.binary").unwrap(), b"\0\n=\n12 a");
    assert_eq!(value(b"f", b"user.a=b").unwrap(), b"1");
    assert_eq!(value(b"f", b"security.capability").unwrap().len(), 20);
    assert_eq!(value(b"d", b"trusted.mine").unwrap(), b"t");
    assert_eq!(value(b"d", b"trusted.overlay.opaque"), None);
    assert_eq!(value(b"d", b"user.overlay.opaque"), None);
}

#[test]
fn device_nodes_keep_their_numbers() {
    if !is_root() {
        return;
    }
    let directory = tree("mknod null c 1 3; mknod whiteout c 0 0; mknod disk b 259 1048575");
    for dialect in ["oldgnu", "gnu", "ustar", "posix"] {
        let entries = read_all(&tar(directory.path(), &format!("--format={dialect}"))).unwrap();
        assert_eq!(find(&entries, b"null").kind, EntryKind::Char { major: 1, minor: 3 }, "{dialect}");
        assert_eq!(find(&entries, b"whiteout").kind, EntryKind::Char { major: 0, minor: 0 }, "{dialect}");
        assert_eq!(
            find(&entries, b"disk").kind,
            EntryKind::Block { major: 259, minor: 1_048_575 },
            "{dialect}"
        );
    }
}

#[test]
fn owners_and_times_beyond_octal_fields_are_exact() {
    let directory =
        tree("printf x > f; touch -d @-86401.25 f; printf x > g; touch -d '@1700000000.123456789' g");
    for dialect in ["gnu", "posix"] {
        let archive =
            tar(directory.path(), &format!("--format={dialect} --owner=:3000000000 --group=:2097152"));
        let entries = read_all(&archive).unwrap();
        let (f, g) = (find(&entries, b"f"), find(&entries, b"g"));
        assert_eq!((f.uid, f.gid), (3_000_000_000, 2_097_152), "{dialect}");
        let (old, new) = match dialect {
            "gnu" => ((-86402, 0), (1_700_000_000, 0)),
            _ => ((-86402, 750_000_000), (1_700_000_000, 123_456_789)),
        };
        assert_eq!((f.mtime, g.mtime), (old, new), "{dialect}");
    }
}

#[test]
fn owners_that_linux_does_not_have_are_refused() {
    let directory = TempDir::new().unwrap();
    for owner in [u64::from(u32::MAX), 1 << 32] {
        for dialect in ["GNU", "PAX"] {
            let script = format!(
                "import sys,tarfile; t=tarfile.open(fileobj=sys.stdout.buffer,mode='w|',format=tarfile.{dialect}_FORMAT); \
                 i=tarfile.TarInfo('f'); i.uid={owner}; t.addfile(i); t.close()"
            );
            let archive = sh(directory.path(), &format!("/usr/bin/python3 -c \"{script}\""));
            match read_all(&archive) {
                Err(error @ TarError::Field { field: "uid", .. }) => {
                    assert!(error.to_string().contains("'f'"));
                }
                other => panic!("{dialect} {owner}: {other:?}"),
            }
        }
    }
}

#[test]
fn files_beyond_the_octal_size_are_read() {
    // 9 GiB, sparse on disk; dense in the archive, which is piped and counted, never stored.
    let directory = tree("truncate -s 9G huge");
    for dialect in ["gnu", "posix"] {
        let mut tar = std::process::Command::new("tar")
            .args(["-cf", "-", &format!("--format={dialect}"), "-C", "t", "huge"])
            .current_dir(directory.path())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut reader = LayerReader::new(tar.stdout.take().unwrap(), Limits::default());
        {
            let entry = reader.next_entry().unwrap().unwrap();
            assert_eq!(entry.kind, EntryKind::File { size: 9 << 30 }, "{dialect}");
        }
        drop(reader);
        tar.wait().unwrap();
    }
}

#[test]
fn a_global_header_sets_owner_and_time_of_what_follows() {
    let directory = tree("printf x > f; printf y > g; touch -d @1700000000 f g");
    let archive = sh(
        directory.path(),
        "tar -cf - --format=posix -C t --pax-option=globexthdr.name=g,comment=hello,uid=77,gid=88 f g",
    );
    assert_eq!(archive[156], b'g', "GNU tar wrote no global header");
    let entries = read_all(&archive).unwrap();
    assert_eq!(entries.len(), 2);
    for entry in &entries {
        assert_eq!((entry.uid, entry.gid), (77, 88));
    }
    let archive =
        sh(directory.path(), "tar -cf - --format=posix -C t --pax-option=globexthdr.name=g,linkpath=x f g");
    match read_all(&archive) {
        Err(error @ TarError::Global { .. }) => assert!(error.to_string().contains("'linkpath'"), "{error}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_layer_cannot_hold_is_refused_by_name() {
    let directory = tree("printf x > f");
    let archive = sh(directory.path(), "tar -cf - --label=volume -C t f");
    match read_all(&archive) {
        Err(TarError::Unsupported { entry, flag }) => assert_eq!((&entry[..], &flag[..]), ("volume", "V")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn absolute_names_and_parents_are_refused_unless_a_slash_may_be_stripped() {
    let directory = tree("printf x > f");
    let archive = sh(directory.path(), "tar -cPf - --transform=s,^,/etc/, -C t f");
    match read_all(&archive) {
        Err(error @ TarError::Path { .. }) => assert!(error.to_string().contains("/etc/f"), "{error}"),
        other => panic!("{other:?}"),
    }
    let strip = LayerReader::new(&archive[..], Limits::default())
        .absolute_names(layer_tar::AbsoluteNames::StripOneSlash);
    assert_eq!(drain(strip).unwrap()[0].path, b"etc/f");

    let archive = sh(directory.path(), "tar -cPf - --transform=s,^,../, -C t f");
    assert!(matches!(read_all(&archive), Err(TarError::Path { .. })));

    let archive =
        sh(directory.path(), "ln t/f t/g; tar -cPf - --sort=name --transform='flags=h;s,^,../../,' -C t f g");
    assert!(matches!(read_all(&archive), Err(TarError::LinkTarget { .. })), "{:?}", read_all(&archive));
}

#[test]
fn every_cut_of_an_archive_is_an_error() {
    let directory = tree("printf hello > f; mkdir d; ln -s f l; setfattr -n user.x -v y f; touch -d @1.5 f");
    let archive = tar(directory.path(), "--format=posix --xattrs --blocking-factor=1");
    let whole = read_all(&archive).unwrap();
    assert_eq!(whole.len(), 4);
    for cut in 0..archive.len() {
        match read_all(&archive[..cut]) {
            Err(TarError::CutArchive { .. } | TarError::CutEntry { .. }) => {}
            other => panic!("cut at {cut} of {}: {other:?}", archive.len()),
        }
    }
    // Without the final blocks an archive whose completeness is known otherwise may end between entries.
    let optional = |bytes: &[u8]| -> Result<Vec<Found>, TarError> {
        drain(LayerReader::new(bytes, Limits::default()).end_of_archive(EndOfArchive::Optional))
    };
    assert_eq!(optional(&archive[..archive.len() - 1024]).unwrap(), whole);
    assert_eq!(optional(&archive[..archive.len() - 512]).unwrap(), whole);
    assert!(optional(&archive[..archive.len() - 1025]).is_err());
    assert!(optional(&archive[..archive.len() - 1023]).is_err());
}

#[test]
fn padding_behind_the_archive_is_read_to_the_end_of_the_stream() {
    let directory = tree("printf hello > f");
    let archive = tar(directory.path(), "--blocking-factor=400");
    let mut rest = &archive[..];
    drain(LayerReader::new(&mut rest, Limits::default())).unwrap();
    assert!(rest.is_empty());
}
