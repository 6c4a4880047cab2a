//! Owners inside and outside of a user namespace.

use thiserror::Error;

/// A run of owners of a container and where they lie on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First owner inside.
    pub container: u32,
    /// First owner on the host.
    pub host: u32,
    /// How many follow each other.
    pub size: u32,
}

/// A mapping of owners; without ranges every owner stays what it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap(Vec<IdRange>);

/// The mappings of users and groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// For users.
    pub users: IdMap,
    /// For groups.
    pub groups: IdMap,
}

/// An owner outside of all ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{what} {id} is outside of the mapped range")]
pub struct Unmapped {
    /// `user` or `group`.
    pub what: &'static str,
    /// The owner.
    pub id: u32,
}

impl IdMap {
    /// A mapping by ranges. An empty list maps every owner to itself.
    pub fn new(ranges: Vec<IdRange>) -> Self {
        IdMap(ranges)
    }

    /// The ranges; none if every owner stays what it is.
    pub fn ranges(&self) -> &[IdRange] {
        &self.0
    }

    fn to_host(&self, id: u32) -> Option<u32> {
        self.map(id, |range| (range.container, range.host))
    }

    fn to_container(&self, id: u32) -> Option<u32> {
        self.map(id, |range| (range.host, range.container))
    }

    fn map(&self, id: u32, direction: impl Fn(&IdRange) -> (u32, u32)) -> Option<u32> {
        if self.0.is_empty() {
            return Some(id);
        }
        self.0.iter().find_map(|range| {
            let (from, to) = direction(range);
            let distance = id.checked_sub(from).filter(|distance| *distance < range.size)?;
            to.checked_add(distance)
        })
    }
}

impl IdMaps {
    /// The host's owner for a container's.
    pub fn to_host(&self, uid: u32, gid: u32) -> Result<(u32, u32), Unmapped> {
        let user = self.users.to_host(uid).ok_or(Unmapped { what: "user", id: uid })?;
        let group = self.groups.to_host(gid).ok_or(Unmapped { what: "group", id: gid })?;
        Ok((user, group))
    }

    /// The container's owner for a host's.
    pub fn to_container(&self, uid: u32, gid: u32) -> Result<(u32, u32), Unmapped> {
        let user = self.users.to_container(uid).ok_or(Unmapped { what: "user", id: uid })?;
        let group = self.groups.to_container(gid).ok_or(Unmapped { what: "group", id: gid })?;
        Ok((user, group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_map_there_and_back_and_not_beyond() {
        let map = IdMap::new(vec![
            IdRange { container: 0, host: 100_000, size: 1000 },
            IdRange { container: 5000, host: u32::MAX - 1, size: 10 },
        ]);
        let maps = IdMaps { users: map, groups: IdMap::default() };
        assert_eq!(maps.to_host(0, 7), Ok((100_000, 7)));
        assert_eq!(maps.to_host(999, 7), Ok((100_999, 7)));
        assert_eq!(maps.to_container(100_999, 7), Ok((999, 7)));
        assert_eq!(maps.to_host(1000, 7), Err(Unmapped { what: "user", id: 1000 }));
        assert_eq!(maps.to_container(99_999, 7), Err(Unmapped { what: "user", id: 99_999 }));
        assert_eq!(maps.to_host(5009, 7), Err(Unmapped { what: "user", id: 5009 }));
    }
}
