//! Lets SQLite open a file by its descriptor's name in `/proc/self/fd`.
//!
//! SQLite's own layer resolves every symbolic link of a name by reading it, and then opens what it found without
//! following links. For `/proc/self/fd/N` that gives the name the file *had*: a file that has lost its name (evicted
//! from the cache a moment ago) or never had one (there was no room in the cache) could not be opened, although the
//! kernel leads to it.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};
use std::sync::{LazyLock, OnceLock};

use rusqlite::ffi::{SQLITE_CANTOPEN, SQLITE_OK, sqlite3_vfs, sqlite3_vfs_find, sqlite3_vfs_register};
use rustix::fs::OFlags;

const NAME: &CStr = c"cvmfs-descriptor";
/// Names below are links that the kernel itself follows to the open file.
const DESCRIPTORS: &[u8] = b"/proc/self/fd/";

/// SQLite's way to call `open(2)`: name, flags, mode.
type Open = unsafe extern "C" fn(*const c_char, c_int, c_int) -> c_int;

/// What SQLite called before [`open`].
static ORIGINAL_OPEN: OnceLock<Open> = OnceLock::new();

/// Name of the layer to open with; registered with the first call. None if SQLite does not have the expected parts:
/// then only files that have their name can be opened.
pub(crate) fn name() -> Option<&'static CStr> {
    static REGISTERED: LazyLock<bool> = LazyLock::new(|| register().is_some());
    REGISTERED.then_some(NAME)
}

/// Registers a copy of the default layer that leaves names alone and follows the links of descriptors.
fn register() -> Option<()> {
    // SAFETY: may be called at any time (it initialises SQLite); a null name asks for the default.
    let default = unsafe { sqlite3_vfs_find(std::ptr::null()) };
    if default.is_null() {
        return None;
    }
    // SAFETY: not null, so it is a registered layer; those of SQLite itself live as long as the process, and of their
    // fields only `pNext` ever changes, which is overwritten below.
    let mut layer: sqlite3_vfs = unsafe { *default };
    let (get, set) = (layer.xGetSystemCall?, layer.xSetSystemCall?);
    // SAFETY: the default layer's own method, called with this layer and a terminated name.
    let original = unsafe { get(default, c"open".as_ptr()) }?;
    // SAFETY: SQLite's table says "open" has this signature (`os_unix.c`, `osOpen`).
    let original = unsafe { std::mem::transmute::<unsafe extern "C" fn(), Open>(original) };
    // Set before SQLite can call `open` below.
    ORIGINAL_OPEN.set(original).ok()?;
    // SAFETY: a function pointer of the same size, which SQLite casts back to the signature it has.
    let replacement = unsafe { std::mem::transmute::<Open, unsafe extern "C" fn()>(open) };
    // SAFETY: as for `get`. Other threads that open a file meanwhile call the old or the new function, and the new
    // one does the same for all names but those of descriptors.
    if unsafe { set(default, c"open".as_ptr(), Some(replacement)) } != SQLITE_OK {
        return None;
    }
    layer.pNext = std::ptr::null_mut();
    layer.zName = NAME.as_ptr();
    layer.xFullPathname = Some(leave_alone);
    // SQLite keeps it for the life of the process.
    let layer = Box::leak(Box::new(layer));
    // SAFETY: the structure is complete (the default's methods take what they need from the layer they are called
    // with, and this one has the default's `pAppData`), and is neither moved nor freed.
    (unsafe { sqlite3_vfs_register(layer, 0) } == SQLITE_OK).then_some(())
}

/// `open(2)`, but links of descriptors are followed even if SQLite says otherwise.
unsafe extern "C" fn open(name: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: SQLite passes a terminated name.
    let is_descriptor = unsafe { CStr::from_ptr(name) }.to_bytes().starts_with(DESCRIPTORS);
    let flags = if is_descriptor { flags & !(OFlags::NOFOLLOW.bits() as c_int) } else { flags };
    match ORIGINAL_OPEN.get() {
        // SAFETY: the arguments are those that the function was about to be called with.
        Some(original) => unsafe { original(name, flags, mode) },
        None => -1,
    }
}

/// `xFullPathname`: copies `name` to `out`, which has room for `room` bytes.
unsafe extern "C" fn leave_alone(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    room: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: SQLite passes a terminated name.
    let name = unsafe { CStr::from_ptr(name) }.to_bytes_with_nul();
    if usize::try_from(room).is_ok_and(|room| name.len() <= room) {
        // SAFETY: `out` has `room` bytes, `name` has no more, and they are different buffers of SQLite.
        unsafe { std::ptr::copy_nonoverlapping(name.as_ptr().cast(), out, name.len()) };
        return SQLITE_OK;
    }
    SQLITE_CANTOPEN
}
