//! The system call that needs `unsafe`: reading a file through a mapping.
#![allow(unsafe_code)]

use std::fs::File;

use anyhow::Result;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Maps the whole file anew and reads one word of each cache line; their sum, so that nothing is left out.
pub fn sum_mapped(file: &File) -> Result<u64> {
    let size = usize::try_from(file.metadata()?.len())?;
    // SAFETY: a new private mapping at an address of the kernel's choice; no memory of ours is touched.
    let address = unsafe { mmap(std::ptr::null_mut(), size, ProtFlags::READ, MapFlags::PRIVATE, file, 0)? }
        .cast::<u64>();
    let mut sum = 0_u64;
    for word in (0..size / 8).step_by(8) {
        // SAFETY: the word lies inside the mapping of `size` bytes, page aligned, which lives until the
        // unmapping below. Nobody truncates the file of a benchmark, so no page of it can vanish.
        sum = sum.wrapping_add(unsafe { address.add(word).read_volatile() });
    }
    // SAFETY: exactly the mapping made above; no reference into it is left.
    unsafe { munmap(address.cast(), size)? };
    Ok(sum)
}
