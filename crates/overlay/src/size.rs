//! How large a layer is.

use crate::tree::{self, TreeError, kind};
use rustix::fs::FileType;
use std::collections::HashSet;
use std::path::Path;

/// The sum of the sizes of the regular files in a layer, in bytes, holes included, each inode counted once.
pub fn layer_size(directory: &Path) -> Result<u64, TreeError> {
    let mut linked = HashSet::new();
    let mut size = 0u64;
    tree::walk::<TreeError>(directory, |node| {
        let first = node.stat.st_nlink <= 1 || linked.insert((node.stat.st_dev, node.stat.st_ino));
        if kind(node.stat) == FileType::RegularFile && first {
            size += node.stat.st_size as u64;
        }
        Ok(())
    })?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn each_inode_counts_once_with_its_apparent_size() {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        fs::create_dir(path("d")).unwrap();
        fs::write(path("d/a"), [1; 1000]).unwrap();
        fs::hard_link(path("d/a"), path("b")).unwrap();
        fs::File::create(path("sparse")).unwrap().set_len(1 << 30).unwrap();
        std::os::unix::fs::symlink("target", path("link")).unwrap();
        assert_eq!(layer_size(scratch.path()).unwrap(), 1000 + (1 << 30));
    }
}
