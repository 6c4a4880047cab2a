//! What catalogs and objects carry: attributes, compressed bytes, hashes and names.

use cvmfs_format::compression::{Compression, Deflate, InflateError, Inflater};
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{ContentHash, ObjectName};

use crate::Target;

pub(crate) const XATTRS: Target = Target {
    name: "xattrs",
    run: |bytes| {
        let Ok(xattrs) = Xattrs::parse(bytes) else { return };
        let blob = xattrs.to_bytes().expect("what was read can be written").unwrap_or_default();
        if !xattrs.is_empty() {
            assert_eq!(Xattrs::parse(&blob).expect("what was written is readable"), xattrs);
        }
    },
    seeds: || {
        let mut xattrs = Xattrs::new();
        xattrs.insert(b"user.name".to_vec(), b"value".to_vec());
        xattrs.insert(b"security.capability".to_vec(), vec![0; 20]);
        let blob = xattrs.to_bytes().expect("short values").expect("there are some");
        vec![blob, vec![1, 0], vec![1, 1, 1, 0, b'a']]
    },
    words: &["user.", "trusted.overlay.opaque", "\x01", "\x02"],
};

pub(crate) const COMPRESSED: Target = Target {
    name: "compressed",
    run: compressed,
    seeds: || {
        let plain: Vec<u8> = (0..20_000_u32).flat_map(|number| (number / 7).to_le_bytes()).collect();
        let mut seeds: Vec<_> =
            [Deflate::Fast, Deflate::Stock].map(|deflate| deflate.compress(&plain)).into();
        seeds.push(Deflate::Fast.compress(&vec![0; 1 << 20]));
        seeds.push(Deflate::Fast.compress(b""));
        seeds
    },
    words: &[],
};

pub(crate) const NAMES: Target = Target {
    name: "names",
    run: |bytes| {
        if let Ok(hash) = ContentHash::parse(bytes) {
            assert_eq!(ContentHash::parse(hash.to_string().as_bytes()), Ok(hash));
        }
        let _ = ContentHash::parse_fingerprint(bytes);
        if let Ok(text) = std::str::from_utf8(bytes)
            && let Ok(name) = text.parse::<ObjectName>()
        {
            assert_eq!(name.to_string().parse(), Ok(name));
            let path = name.path();
            assert!(path.starts_with("data/") && !path.contains(".."), "{path}");
        }
    },
    seeds: || {
        let text: [&[u8]; 4] = [
            b"e7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5",
            b"e7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5-shake128C",
            b"2fd4e1c67a2d28fced849ee1bb76e7391b93eb12-rmd160P",
            b"4B:1F:3C:7A:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF",
        ];
        text.map(<[u8]>::to_vec).into()
    },
    words: &["-shake128", "-rmd160", "-md5", "C", "H", "X", "M", "L", "P", ":", "/"],
};

/// Inflates in pieces; the limit comes from the input.
fn compressed(bytes: &[u8]) {
    let limit = u64::from(bytes.first().copied().unwrap_or(0)) << 8;
    for compression in [Compression::Zlib, Compression::None] {
        let mut out = Vec::new();
        let mut inflater = Inflater::new(compression, limit);
        let step = bytes.len() % 700 + 1;
        let outcome = bytes.chunks(step).try_for_each(|piece| inflater.write(piece, &mut out));
        assert!(out.len() as u64 <= limit, "{} bytes with a limit of {limit}", out.len());
        assert_eq!(inflater.produced(), out.len() as u64);
        let whole = outcome.and_then(|()| inflater.finish());
        // The same bytes at once say the same.
        let at_once = cvmfs_format::compression::inflate(compression, bytes, limit);
        match (whole, at_once) {
            (Ok(length), Ok(plain)) => assert!(length == plain.len() as u64 && plain == out, "pieces matter"),
            (Err(InflateError::Write(error)), _) => panic!("memory cannot fail: {error}"),
            (Err(_), Err(_)) => {}
            (one, other) => panic!("in pieces {one:?}, at once {:?}", other.map(|plain| plain.len())),
        }
    }
}
