//! Keeping the memory of large publishes small.
//!
//! Chunks of many megabytes are allocated and freed all the time. After the first of them the C library's allocator
//! would take such sizes from its heaps, which fragment: 130 MB instead of 60 for a publish of 512 MiB, at the
//! same speed. A fixed threshold returns each to the system.
#![allow(unsafe_code)]

/// In bytes: above the states of compressors and small files, below chunks.
const THRESHOLD: libc::c_int = 1 << 20;

/// Fixes the size from which allocations are mappings of their own. Called before any thread starts.
pub fn return_large_buffers() {
    // SAFETY: mallopt takes two integers, touches nothing but the allocator's settings, and no other thread runs yet.
    // A failure (it returns 0) leaves the default, which costs memory only.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD) };
}
