//! Consistent hashing over the proxies of a group (`CVMFS_PROXY_SHARD`, client behaviour §5.2).
//!
//! Each proxy has [`POINTS`] points on a ring of 32-bit numbers; a request takes the first point at or after the key
//! of its object. The points are those of the C++ client, so that both kinds of client ask the same proxy for an
//! object.

use std::sync::Arc;

use cvmfs_format::hash::{ContentHash, HashAlgorithm};

use super::way::Way;

/// Points of one proxy.
const POINTS: usize = 16;

#[derive(Debug)]
pub(super) struct Ring {
    /// Sorted by point.
    points: Vec<(u32, Arc<Way>)>,
}

impl Ring {
    pub(super) fn new(ways: &[Arc<Way>]) -> Self {
        let mut points = Vec::with_capacity(ways.len() * POINTS);
        for way in ways {
            let mut generator = Generator::seeded(u64::from(seed(&way.shown)));
            points.extend((0..POINTS).map(|_| (generator.next(), Arc::clone(way))));
        }
        points.sort_by_key(|(point, _)| *point);
        Self { points }
    }

    /// The way for `key` that is not in `tried`.
    pub(super) fn find(&self, key: u32, tried: &[u64]) -> Option<Arc<Way>> {
        let start = self.points.partition_point(|(point, _)| *point < key);
        let (before, after) = self.points.split_at_checked(start)?;
        after.iter().chain(before).find(|(_, way)| !tried.contains(&way.id)).map(|(_, way)| Arc::clone(way))
    }

    pub(super) fn has(&self, way: u64) -> bool {
        self.points.iter().any(|(_, known)| known.id == way)
    }

    pub(super) fn remove(&mut self, way: u64) {
        self.points.retain(|(_, known)| known.id != way);
    }
}

/// The first 32 bits of the SHA-1 of a proxy's URL.
fn seed(url: &str) -> u32 {
    let hash = ContentHash::of(HashAlgorithm::Sha1, url.as_bytes());
    let [a, b, c, d, ..] = hash.digest;
    u32::from_be_bytes([a, b, c, d])
}

/// The linear congruential generator that places the points.
struct Generator(u64);

impl Generator {
    fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// The next point, below 2^32 - 1.
    fn next(&mut self) -> u32 {
        const BOUND: f64 = 4_294_967_295.0;
        const RANGE: f64 = 18_446_744_073_709_551_616.0;
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let scaled = (self.0 as f64 * BOUND / RANGE) as u64;
        u32::try_from(scaled % u64::from(u32::MAX)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::url::Url;

    #[test]
    fn the_ring_is_the_same_in_every_process_and_wraps_around() {
        let way = |address: &str| {
            let url = Url::parse(&format!("http://{address}")).unwrap();
            Arc::new(Way::proxy(&url, Some(address.parse().unwrap())))
        };
        let ways = [way("10.0.0.1:3128"), way("10.0.0.2:3128")];
        let (ring, again) = (Ring::new(&ways), Ring::new(&[Arc::clone(&ways[1]), Arc::clone(&ways[0])]));
        assert_eq!(ring.points.len(), 2 * POINTS);
        let first = &ring.points[0].1;
        assert_eq!(ring.find(u32::MAX, &[]).unwrap().id, first.id, "past the last point comes the first");
        for key in (0..=u32::MAX).step_by(1 << 26) {
            assert_eq!(ring.find(key, &[]).unwrap().id, again.find(key, &[]).unwrap().id);
            assert_ne!(ring.find(key, &[ways[0].id]).unwrap().id, ways[0].id);
        }
        assert!(ring.find(0, &[ways[0].id, ways[1].id]).is_none());
    }

    #[test]
    fn the_generator_has_the_numbers_of_its_definition() {
        let mut generator = Generator::seeded(0);
        // 1442695040888963407 * (2^32 - 1) / 2^64
        assert_eq!(generator.next(), 335_903_614);
    }
}
