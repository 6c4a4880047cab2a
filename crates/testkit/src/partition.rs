//! Small partitions for tests of full and failing disks. They need root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{ScratchDir, process};

/// A mounted partition, unmounted when dropped.
#[derive(Debug)]
pub struct Partition {
    directory: ScratchDir,
    image: Option<PathBuf>,
}

impl Partition {
    /// A tmpfs with these options, such as `size=4m`; `None` without root.
    pub fn in_memory(options: &str) -> Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: a partition needs root");
            return Ok(None);
        }
        let directory = ScratchDir::new("partition")?;
        std::fs::create_dir(directory.path().join("mount"))?;
        let options = std::ffi::CString::new(options)?;
        let partition = Self { directory, image: None };
        mount("tmpfs", partition.path(), "tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .context("cannot mount a tmpfs")?;
        Ok(Some(partition))
    }

    /// An ext4 file system in an image of so many megabytes; `None` without root or the tools.
    pub fn on_disk(megabytes: u64, options: &str) -> Result<Option<Self>> {
        let has_tools = Command::new("mkfs.ext4").arg("-V").output().is_ok();
        if !rustix::process::geteuid().is_root() || !has_tools {
            eprintln!("skipped: a partition on disk needs root and mkfs.ext4");
            return Ok(None);
        }
        let directory = ScratchDir::new("partition")?;
        std::fs::create_dir(directory.path().join("mount"))?;
        let image = directory.path().join("image");
        std::fs::File::create(&image)?.set_len(megabytes << 20)?;
        let mut format = Command::new("mkfs.ext4");
        format.args(["-q", "-F"]).arg(&image);
        process::run(format, Duration::from_secs(60))?.success()?;
        let partition = Self { directory, image: Some(image) };
        partition.mount(options)?;
        Ok(Some(partition))
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("mount")
    }

    /// The image of a partition on disk.
    pub fn image(&self) -> &Path {
        self.image.as_deref().unwrap_or(Path::new(""))
    }

    /// Mounts the image (again).
    pub fn mount(&self, options: &str) -> Result<()> {
        let mut command = Command::new("mount");
        command.args(["-o", &format!("loop,{options}")]).arg(self.image()).arg(self.path());
        process::run(command, Duration::from_secs(60))?.success().map(drop)
    }

    /// Unmounts the partition and forgets what the kernel has cached of it.
    pub fn unmount(&self) -> Result<()> {
        let mut command = Command::new("umount");
        command.arg(self.path());
        process::run(command, Duration::from_secs(60))?.success().map(drop)
    }

    /// The partition as it would be found after a power cut now: what the file system has written so far, and nothing
    /// that only the kernel's memory holds.
    pub fn after_power_cut(&self, options: &str) -> Result<Self> {
        let directory = ScratchDir::new("power-cut")?;
        std::fs::create_dir(directory.path().join("mount"))?;
        let image = directory.path().join("image");
        std::fs::copy(self.image(), &image)?;
        let partition = Self { directory, image: Some(image) };
        partition.mount(options)?;
        Ok(partition)
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}
