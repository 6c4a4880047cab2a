//! The identity of the running system.

use std::sync::LazyLock;

/// An id that is the same until the machine is started again, and in all containers on it; `None` if the kernel
/// does not tell. Data that was written but never flushed to the disk is whole only while this id stays.
pub(crate) fn id() -> Option<[u8; 16]> {
    static ID: LazyLock<Option<[u8; 16]>> = LazyLock::new(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        hex::decode(text.trim().replace('-', "")).ok()?.try_into().ok()
    });
    *ID
}
