//! Whether the kernel lets us mount, and how fast the mount will be.

use std::fs::{self, File};

use super::Findings;

/// Reads go past the client, and requests of a worker that died are sent again.
const PASSTHROUGH: (u32, u32) = (6, 9);
/// All entries that the kernel remembers can be looked up again at once.
const EPOCHS: (u32, u32) = (6, 16);

pub(super) fn check(findings: &mut Findings) {
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => findings.ok("fuse", "/dev/fuse can be opened"),
        Err(error) => {
            let advice = match error.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => "run as root, or give this user access to the device",
                _ if !kernel_knows_fuse() => "load the kernel module: `modprobe fuse`",
                _ => "give the device to this container: `--device /dev/fuse`",
            };
            findings.fail("fuse", format!("cannot open /dev/fuse: {error}"), Some(advice.into()), 1);
        }
    }
    if !may_mount() {
        findings.fail(
            "fuse",
            "this process may not mount",
            Some("run as root; a container needs CAP_SYS_ADMIN".into()),
            1,
        );
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    match version(&release) {
        Some(version) if version < PASSTHROUGH => findings.warn(
            "kernel",
            format!("Linux {release}: reads go through the client, and requests of a worker that died are lost"),
            "Linux 6.9 or newer reads cached files at the speed of the cache's file system",
        ),
        Some(version) if version < EPOCHS => findings.ok(
            "kernel",
            format!("Linux {release}: passthrough; a new revision is seen when entries time out (at once from 6.16 on)"),
        ),
        _ => findings.ok("kernel", format!("Linux {release}: passthrough, new revisions are seen at once")),
    }
}

fn kernel_knows_fuse() -> bool {
    fs::read_to_string("/proc/filesystems")
        .is_ok_and(|text| text.lines().any(|line| line.split_whitespace().last() == Some("fuse")))
}

/// CAP_SYS_ADMIN is capability 21.
fn may_mount() -> bool {
    let Ok(text) = fs::read_to_string("/proc/self/status") else { return true };
    let effective = text.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.is_none_or(|bits| bits & (1 << 21) != 0)
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_compared_by_their_first_two_numbers() {
        assert_eq!(version("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(version("5.14.0-503.el9.x86_64"), Some((5, 14)));
        assert!(version("6.9-rc1").unwrap() >= PASSTHROUGH);
        assert_eq!(version("unknown"), None);
    }
}
