//! Parsers of signed and stored text never panic and undo what the writers do.

use std::convert::Infallible;

use cvmfs_format::chunking::{ChunkDetector, ChunkSizes};
use cvmfs_format::compression::{Compression, Deflate, inflate};
use cvmfs_format::letter::{Letter, seal};
use cvmfs_format::manifest::{Breadcrumb, Manifest};
use cvmfs_format::signature::{Certificate, MasterKeys, PrivateKey};
use cvmfs_format::whitelist::Whitelist;
use cvmfs_format::xattr::Xattrs;
use cvmfs_format::{ContentHash, HashAlgorithm, ObjectName};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

fn algorithm() -> impl Strategy<Value = HashAlgorithm> {
    prop::sample::select(&HashAlgorithm::ALL[..])
}

fn hash() -> impl Strategy<Value = ContentHash> {
    (algorithm(), prop::array::uniform20(1u8..))
        .prop_map(|(algorithm, digest)| ContentHash { algorithm, digest })
}

fn manifest() -> impl Strategy<Value = Manifest> {
    let numbers = (any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>());
    let hashes = (
        hash(),
        prop::option::of(hash()),
        prop::option::of(hash()),
        prop::option::of(hash()),
        prop::option::of(hash()),
    );
    (numbers, hashes, any::<(bool, bool)>(), "[a-z0-9][a-z0-9._-]{0,60}").prop_map(
        |(
            (size, ttl, revision, timestamp),
            (root, certificate, history, metainfo, reflog),
            (gc, alternative),
            fqrn,
        )| Manifest {
            root_catalog: root,
            root_catalog_size: size,
            ttl,
            revision,
            garbage_collectable: gc,
            alternative_paths: alternative,
            fqrn,
            certificate,
            history,
            timestamp,
            metainfo,
            reflog,
        },
    )
}

/// Bytes that get past the first checks more often than uniform noise: fragments of real documents.
fn nearly_a_document() -> impl Strategy<Value = Vec<u8>> {
    let fragments: Vec<&[u8]> = vec![
        b"\n",
        b"--\n",
        b"\n--\n",
        b"C",
        b"Rd41d8cd98f00b204e9800998ecf8427e\n",
        b"D240\n",
        b"S1\n",
        b"Na.b\n",
        b"Ce7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5\n",
        b"20240101120000\n",
        b"E20240131120000\n",
        b"Vpkcs7\n",
        b"Wcachain\n",
        b"4B:1F:3C:7A:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF",
        b" # x",
        b"-shake128",
        b"T",
        b"R7",
        b"-----BEGIN CERTIFICATE-----\n",
        b"-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\n",
        b"MAA=\n",
        b"-----END PRIVATE KEY-----\n",
        b"-----BEGIN PUBLIC KEY-----\n",
        b"-----END PUBLIC KEY-----\n",
        b"\x01\x02",
        b"\xff",
    ];
    let piece = prop_oneof![3 => prop::sample::select(fragments).prop_map(<[u8]>::to_vec), 1 => vec(any::<u8>(), 0..20)];
    vec(piece, 0..20).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn row_33_no_parser_panics_on_any_bytes(bytes in prop_oneof![nearly_a_document(), vec(any::<u8>(), 0..300)]) {
        let _ = Manifest::parse(&bytes);
        let _ = Whitelist::parse(&bytes).map(|whitelist| whitelist.is_expired(0));
        let _ = Letter::parse(&bytes).map(|letter| MasterKeys::new().verify_whitelist(&letter));
        let _ = Xattrs::parse(&bytes);
        let _ = Breadcrumb::parse(&bytes);
        let _ = ContentHash::parse(&bytes);
        let _ = ContentHash::parse_fingerprint(&bytes);
        let _ = String::from_utf8_lossy(&bytes).parse::<ObjectName>();
        let _ = Certificate::from_pem(&bytes);
        let _ = PrivateKey::from_pem(&bytes);
        let _ = MasterKeys::from_pem(&bytes);
        let _ = inflate(Compression::Zlib, &bytes, 1 << 16);
        let zlib = [&[0x78, 0x9c][..], &bytes].concat();
        let _ = inflate(Compression::Zlib, &zlib, 1 << 16);
    }

    #[test]
    fn a_manifest_comes_back_from_its_letter(manifest in manifest(), algorithm in algorithm()) {
        let file = seal(manifest.to_text(), algorithm, |_| Ok::<_, Infallible>(vec![1; 256])).unwrap();
        let letter = Letter::parse(&file).unwrap();
        prop_assert_eq!(letter.text, manifest.to_text());
        prop_assert_eq!(&Manifest::parse(letter.text).unwrap(), &manifest);
        prop_assert_eq!(&Manifest::parse(&file).unwrap(), &manifest);
        let breadcrumb = manifest.breadcrumb();
        prop_assert_eq!(Breadcrumb::parse(breadcrumb.to_text().as_bytes()), Some(breadcrumb).filter(|b| b.timestamp > 0));
    }

    #[test]
    fn any_changed_byte_of_the_text_is_noticed(manifest in manifest(), position in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut file = seal(manifest.to_text(), HashAlgorithm::Sha1, |_| Ok::<_, Infallible>(vec![1; 256])).unwrap();
        let position = position.index(manifest.to_text().len());
        file[position] ^= flip;
        prop_assert!(Letter::parse(&file).is_err());
    }

    #[test]
    fn a_whitelist_comes_back(prints in vec(hash(), 0..5), expires in 0i64..253_402_300_800, fqrn in "[a-z0-9.-]{1,60}") {
        let whitelist = Whitelist::parse(&Whitelist::compose(0, expires, &fqrn, &prints)).unwrap();
        prop_assert_eq!(whitelist.expires_unix(), expires - expires.rem_euclid(3600));
        prop_assert_eq!(&whitelist.fingerprints, &prints);
        prop_assert_eq!(&whitelist.fqrn, &fqrn);
        prop_assert!(whitelist.is_expired(expires));
        prop_assert!(!whitelist.is_expired(whitelist.expires_unix() - 1));
    }

    #[test]
    fn attributes_come_back(attributes in btree_map(vec(1u8.., 1..=255), vec(any::<u8>(), 0..=255), 0..40)) {
        let xattrs: Xattrs = attributes.into_iter().collect();
        match xattrs.to_bytes().unwrap() {
            None => prop_assert!(xattrs.is_empty()),
            Some(blob) => prop_assert_eq!(Xattrs::parse(&blob).unwrap(), xattrs),
        }
    }

    #[test]
    fn hashes_and_fingerprints_come_back(hash in hash()) {
        prop_assert_eq!(hash.to_string().parse::<ContentHash>().unwrap(), hash);
        prop_assert_eq!(ContentHash::parse_fingerprint(hash.to_fingerprint().as_bytes()), Some(hash));
    }

    #[test]
    fn deflated_bytes_come_back(plain in vec(any::<u8>(), 0..5000)) {
        for deflate in [Deflate::Stock, Deflate::Fast] {
            let stored = deflate.compress(&plain);
            prop_assert_eq!(inflate(Compression::Zlib, &stored, plain.len() as u64).unwrap(), plain.clone());
            if !plain.is_empty() {
                prop_assert!(inflate(Compression::Zlib, &stored, plain.len() as u64 - 1).is_err());
            }
        }
    }

    #[test]
    fn chunk_boundaries_do_not_depend_on_how_the_bytes_arrive(data in vec(any::<u8>(), 0..5000), piece in 1usize..700) {
        let sizes = ChunkSizes { min: 64, avg: 128, max: 300 };
        let cuts = |piece: usize| {
            let mut detector = ChunkDetector::new(sizes).unwrap();
            let mut cuts = vec![0];
            let mut end = 0;
            for mut rest in data.chunks(piece) {
                end += rest.len();
                while let Some(cut) = detector.next_cut(rest) {
                    rest = &rest[cut..];
                    cuts.push(end - rest.len());
                }
            }
            cuts
        };
        let whole = cuts(data.len().max(1));
        prop_assert_eq!(&cuts(piece), &whole);
        for pair in whole.windows(2) {
            prop_assert!((64..=300).contains(&(pair[1] - pair[0])));
        }
        prop_assert!(data.len() - whole.last().unwrap() <= 300);
    }
}
