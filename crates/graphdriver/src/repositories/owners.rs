//! Owners of files in repositories as an engine with a user namespace needs them.
//!
//! A layer on disk is unpacked with the host's ids of the container's owners. A repository has the container's, so the
//! client shows them as the host's: by its maps of owners, which are files.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use overlay::ids::{IdMap, IdMaps};

/// What the kernel shows for owners that a namespace does not have.
const NOBODY: u32 = 65_534;

/// Writes the client's maps of owners into `directory` and returns its parameters that name them; none without a user
/// namespace.
///
/// # Errors
/// A file cannot be written.
pub fn parameters(maps: &IdMaps, directory: &Path) -> io::Result<Vec<(String, String)>> {
    let mut parameters = Vec::new();
    for (name, map) in [("UID", &maps.users), ("GID", &maps.groups)] {
        let Some(text) = text(map) else { continue };
        fs::create_dir_all(directory)?;
        let file = directory.join(format!("{}.map", name.to_ascii_lowercase()));
        let new = file.with_extension("new");
        let mut out = fs::File::create(&new)?;
        out.write_all(text.as_bytes())?;
        // A client that starts after a power failure must not find an empty map.
        out.sync_all()?;
        fs::rename(&new, &file)?;
        parameters.push((format!("CVMFS_{name}_MAP"), file.to_string_lossy().into_owned()));
    }
    Ok(parameters)
}

/// A map file; `None` if every owner stays what it is.
fn text(map: &IdMap) -> Option<String> {
    let ranges = map.ranges();
    if ranges.is_empty() {
        return None;
    }
    let mut text = "# From the engine's user namespace.\n".to_owned();
    for range in ranges.iter().filter(|range| range.size > 0) {
        let last = range.container.saturating_add(range.size - 1);
        text.push_str(&format!("{}-{last} {}\n", range.container, range.host));
    }
    text.push_str(&format!("* {NOBODY}\n"));
    Some(text)
}

#[cfg(test)]
mod tests {
    use cvmfs_client::config::IdMap as ClientMap;
    use overlay::ids::IdRange;

    use super::*;

    #[test]
    fn the_client_maps_owners_as_layers_on_disk_have_them() {
        let directory = tempfile::tempdir().unwrap();
        let range = |container, host, size| IdRange { container, host, size };
        let users =
            IdMap::new(vec![range(0, 100_000, 1000), range(1000, 5000, 1), range(1001, 101_001, 64_535)]);
        let maps = IdMaps { users, groups: IdMap::new(vec![range(0, 200_000, 10)]) };
        let parameters = parameters(&maps, &directory.path().join("state")).unwrap();
        let names: Vec<_> = parameters.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["CVMFS_UID_MAP", "CVMFS_GID_MAP"]);
        let read =
            |index: usize| ClientMap::parse(&fs::read_to_string(&parameters[index].1).unwrap()).unwrap();
        let (uids, gids) = (read(0), read(1));
        for id in [0, 999, 1000, 1001, 65_535] {
            assert_eq!(uids.map(id), maps.to_host(id, 0).unwrap().0, "{id}");
        }
        assert_eq!([9, 10].map(|id| gids.map(id)), [200_009, NOBODY]);
        assert!(super::parameters(&IdMaps::default(), directory.path()).unwrap().is_empty());
    }
}
