//! Requests of the kernel as types.

pub(crate) use cvmfs_client::authz::Caller;

use super::{Fields, REPEAT_BIT, REQUEST_HEADER};

/// A request as it was read from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    /// The kernel's number of the request, under which it is answered.
    pub(crate) unique: u64,
    /// The node it is about.
    pub(crate) node: u64,
    /// Who asks. 0 for requests that no process waits for.
    pub(crate) caller: Caller,
    /// What is asked.
    pub(crate) operation: Operation<'a>,
    /// Whether a worker before had it.
    pub(crate) is_repeated: bool,
    /// The whole message.
    pub(crate) raw: &'a [u8],
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation<'a> {
    Lookup {
        name: &'a [u8],
    },
    Getattr,
    Readlink,
    Open {
        flags: i32,
    },
    Read {
        offset: u64,
        size: u32,
    },
    Flush,
    Release {
        handle: u64,
    },
    Opendir,
    Readdir {
        offset: u64,
        size: u32,
        plus: bool,
    },
    Releasedir,
    Statfs,
    Getxattr {
        name: &'a [u8],
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    /// The caller of the request with this number was signalled.
    Interrupt {
        unique: u64,
    },
    /// One or many nodes are forgotten; there is no answer.
    Forget,
    /// The mount is gone.
    Destroy,
    /// Something that would change the file system.
    Change,
    /// Anything else that this file system does not offer.
    Other,
}

/// A message that is no request. The number is known if at least the header was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed {
    /// The request to answer with an error.
    pub(crate) unique: Option<u64>,
    /// What it claimed to be.
    pub(crate) opcode: u32,
}

/// Numbers of the operations.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const TMPFILE: u32 = 51;
}

/// Names of the operations by number, for logs and counters.
pub(crate) const NAMES: [&str; 32] = [
    "other",
    "lookup",
    "forget",
    "getattr",
    "change",
    "readlink",
    "change",
    "other",
    "change",
    "change",
    "change",
    "change",
    "change",
    "change",
    "open",
    "read",
    "change",
    "statfs",
    "release",
    "other",
    "other",
    "change",
    "getxattr",
    "listxattr",
    "change",
    "flush",
    "init",
    "opendir",
    "readdir",
    "releasedir",
    "other",
    "other",
];

/// The name of an operation.
pub(crate) fn name(number: u32) -> &'static str {
    match number {
        opcode::INTERRUPT => "interrupt",
        opcode::DESTROY => "destroy",
        opcode::BATCH_FORGET => "forget",
        opcode::READDIRPLUS => "readdirplus",
        opcode::CREATE | opcode::FALLOCATE | opcode::RENAME2 | opcode::TMPFILE => "change",
        _ => NAMES.get(number as usize).copied().unwrap_or("other"),
    }
}

/// The operation's number in a message; 0 if it is too short to have one.
pub(crate) fn opcode_of(message: &[u8]) -> u32 {
    message.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Parses what was read from the device: one whole request.
///
/// # Errors
/// If the message is shorter than it claims or than its operation needs.
pub(crate) fn parse(message: &[u8]) -> Result<Request<'_>, Malformed> {
    let mut fields = Fields(message);
    let header = || -> Option<(u32, u32, u64, u64, Caller, u16)> {
        let (length, number) = (fields.u32()?, fields.u32()?);
        let (unique, node) = (fields.u64()?, fields.u64()?);
        let caller = Caller { uid: fields.u32()?, gid: fields.u32()?, pid: fields.u32()? };
        let extensions = fields.u16()?;
        fields.u16()?;
        Some((length, number, unique, node, caller, extensions))
    };
    let mut header = header;
    let Some((length, number, unique, node, caller, extensions)) = header() else {
        return Err(Malformed { unique: None, opcode: opcode_of(message) });
    };
    let malformed = Malformed { unique: Some(unique), opcode: number };
    // Extensions (in units of 8 bytes) stand at the end and mean nothing to this file system.
    let end = (length as usize).checked_sub(usize::from(extensions) * 8).ok_or(malformed)?;
    let body = message.get(REQUEST_HEADER..end).ok_or(malformed)?;
    let operation = operation(number, Fields(body)).ok_or(malformed)?;
    let is_repeated = unique & REPEAT_BIT != 0;
    Ok(Request { unique, node, caller, operation, is_repeated, raw: message })
}

/// The operation in the body of a request; `None` if the body is too short.
fn operation(number: u32, mut fields: Fields<'_>) -> Option<Operation<'_>> {
    Some(match number {
        opcode::LOOKUP => Operation::Lookup { name: fields.text()? },
        opcode::GETATTR => Operation::Getattr,
        opcode::READLINK => Operation::Readlink,
        opcode::OPEN => Operation::Open { flags: fields.u32()?.cast_signed() },
        opcode::READ => {
            let _handle = fields.u64()?;
            Operation::Read { offset: fields.u64()?, size: fields.u32()? }
        }
        opcode::FLUSH => Operation::Flush,
        opcode::RELEASE => Operation::Release { handle: fields.u64()? },
        opcode::OPENDIR => Operation::Opendir,
        opcode::READDIR | opcode::READDIRPLUS => {
            let _handle = fields.u64()?;
            let plus = number == opcode::READDIRPLUS;
            Operation::Readdir { offset: fields.u64()?, size: fields.u32()?, plus }
        }
        opcode::RELEASEDIR => Operation::Releasedir,
        opcode::STATFS => Operation::Statfs,
        opcode::GETXATTR => {
            let size = fields.u32()?;
            fields.u32()?;
            Operation::Getxattr { size, name: fields.text()? }
        }
        opcode::LISTXATTR => Operation::Listxattr { size: fields.u32()? },
        opcode::INTERRUPT => Operation::Interrupt { unique: fields.u64()? },
        opcode::FORGET | opcode::BATCH_FORGET => Operation::Forget,
        opcode::DESTROY => Operation::Destroy,
        opcode::SETATTR
        | opcode::SYMLINK
        | opcode::MKNOD..=opcode::LINK
        | opcode::WRITE
        | opcode::SETXATTR
        | opcode::REMOVEXATTR
        | opcode::CREATE
        | opcode::FALLOCATE
        | opcode::RENAME2
        | opcode::TMPFILE => Operation::Change,
        _ => Operation::Other,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A request as the kernel writes it.
    pub(crate) fn message(number: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
        let mut message = Vec::new();
        message.extend(((REQUEST_HEADER + body.len()) as u32).to_ne_bytes());
        message.extend(number.to_ne_bytes());
        message.extend(unique.to_ne_bytes());
        message.extend(node.to_ne_bytes());
        for word in [1000_u32, 100, 4242, 0] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(body);
        message
    }

    #[test]
    fn requests_are_told_apart() {
        let lookup = message(opcode::LOOKUP, 7, 1, b"bin\0");
        let parsed = parse(&lookup).unwrap();
        assert_eq!(parsed.operation, Operation::Lookup { name: b"bin" });
        assert_eq!((parsed.unique, parsed.node, parsed.caller.gid), (7, 1, 100));
        let read =
            message(opcode::READ, 8, 5, &[[0; 8], 4096_u64.to_ne_bytes(), 512_u64.to_ne_bytes()].concat());
        assert_eq!(parse(&read).unwrap().operation, Operation::Read { offset: 4096, size: 512 });
        for number in [opcode::SETATTR, opcode::WRITE, opcode::CREATE, opcode::RENAME2, 9, 10, 11, 12, 13] {
            assert_eq!(parse(&message(number, 1, 1, &[])).unwrap().operation, Operation::Change, "{number}");
        }
        for number in [0, 7, 19, 20, 31, 39, 46, 54, 4096, u32::MAX] {
            assert_eq!(parse(&message(number, 1, 1, &[])).unwrap().operation, Operation::Other, "{number}");
        }
    }

    #[test]
    fn a_short_request_is_malformed_and_its_number_is_known() {
        let whole = message(opcode::LOOKUP, 7, 1, b"bin\0");
        assert_eq!(parse(&whole[..39]).unwrap_err().unique, None);
        assert_eq!(parse(&whole[..42]).unwrap_err().unique, Some(7), "shorter than it claims");
        assert!(parse(&message(opcode::LOOKUP, 7, 1, b"bin")).is_err(), "no end of the name");
        assert!(parse(&message(opcode::READ, 7, 1, &[0; 15])).is_err());
        let mut extensions = whole;
        extensions[36..38].copy_from_slice(&u16::MAX.to_ne_bytes());
        assert!(parse(&extensions).is_err(), "more extensions than bytes");
    }

    proptest::proptest! {
        #[test]
        fn no_message_makes_the_parser_panic(number in 0_u32..60, body in proptest::collection::vec(0_u8.., 0..200)) {
            let _ = parse(&body);
            let _ = parse(&message(number, 1, 1, &body));
        }
    }
}
