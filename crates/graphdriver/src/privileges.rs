//! What the plugin's processes may do (least privilege).
//!
//! Engines give a plugin more than it asks for. What is not needed is dropped before anything is read, by all processes
//! that follow, too: the server, the clients of the repositories, authorisation helpers. None of them gains privileges
//! by running a program.

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// Mounts and the attributes of overlays; layers with any owner, mode, device and file capability; ending clients;
/// the mapping of owners into the engine's user namespace; limits of open files.
const NEEDED: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SYS_RESOURCE);

/// Drops what is not needed. Call it before there are threads.
///
/// # Errors
/// The kernel refuses.
pub fn drop_unneeded() -> io::Result<()> {
    let mut kept = CapabilitySet::empty();
    // The kernel knows some that this program does not; those are asked for by their bits.
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match capability_is_in_bounding_set(capability) {
            Ok(true) if NEEDED.contains(capability) => kept |= capability,
            Ok(true) => remove_capability_from_bounding_set(capability)?,
            Ok(false) => {}
            // Beyond the last one that the kernel has.
            Err(_) => break,
        }
    }
    // Of those kept, what this process has now.
    let permitted = rustix::thread::capabilities(None)?.permitted & kept;
    set_capabilities(
        None,
        CapabilitySets { effective: permitted, permitted, inheritable: CapabilitySet::empty() },
    )?;
    Ok(set_no_new_privs(true)?)
}
