//! INIT, the first request of a connection: what the kernel offers and what is agreed upon.
//!
//! It happens once in the life of a mount. The supervisor reads it, the first worker answers
//! it, and later workers compute the same answer again to learn what was agreed upon.

use super::{Fields, REPLY_HEADER, REQUEST_HEADER, request::opcode};

/// The version of the protocol that this implementation knows.
const MAJOR: u32 = 7;
const MINOR: u32 = 45;
/// The first version with everything that is used without asking (Linux 3.9).
const OLDEST_MINOR: u32 = 21;
/// From this version on the answer has 64 bytes; before 24.
const LONG_ANSWER_MINOR: u32 = 23;

/// The smallest value the kernel accepts. Nothing is ever written.
const MAX_WRITE: u32 = 4096;
/// Pages of the largest READ: 1 MiB.
const MAX_PAGES: u16 = 256;
/// Requests without a waiting process (read-ahead, RELEASE) that the kernel keeps under way.
const MAX_BACKGROUND: u16 = 64;
/// Beyond this many the kernel throttles read-ahead.
const CONGESTED: u16 = 48;

/// Capabilities, as bits of `flags` and (from 32 on) `flags2`.
pub(crate) mod capability {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const HAS_EXPIRE_ONLY: u64 = 1 << 35;
    pub(crate) const PASSTHROUGH: u64 = 1 << 37;
    pub(crate) const HAS_RESEND: u64 = 1 << 39;
    /// Wants the mount option `default_permissions`; the ids of callers are not told any more.
    pub(crate) const ALLOW_IDMAP: u64 = 1 << 40;
}

/// What the kernel offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    unique: u64,
    minor: u32,
    max_readahead: u32,
    capabilities: u64,
}

/// What is agreed upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agreement {
    /// Minor version of the kernel's protocol.
    pub(crate) kernel_minor: u32,
    /// Capabilities in use.
    pub(crate) capabilities: u64,
}

impl Agreement {
    /// Whether a capability is in use.
    pub(crate) fn has(&self, capability: u64) -> bool {
        self.capabilities & capability == capability
    }
}

/// Why a connection cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The kernel began with something else.
    #[error("the kernel did not begin with INIT")]
    NotInit,
    /// Versions do not fit.
    #[error("the kernel speaks FUSE {major}.{minor}; {MAJOR}.{OLDEST_MINOR} or newer is needed (Linux 3.9)")]
    Version {
        /// The kernel's version.
        major: u32,
        /// The kernel's version.
        minor: u32,
    },
}

impl Offer {
    /// Parses the kernel's INIT. `newest` lowers the version that is believed, for tests
    /// of what older kernels lack.
    pub(crate) fn parse(message: &[u8], newest: Option<u32>) -> Result<Offer, HandshakeError> {
        let mut header = Fields(message);
        let read = |fields: &mut Fields<'_>| -> Option<(u32, u64)> {
            fields.u32()?;
            Some((fields.u32()?, fields.u64()?))
        };
        let (number, unique) = read(&mut header).ok_or(HandshakeError::NotInit)?;
        if number != opcode::INIT {
            return Err(HandshakeError::NotInit);
        }
        let mut fields = Fields(message.get(REQUEST_HEADER..).unwrap_or_default());
        let version = (fields.u32(), fields.u32());
        let (Some(major), Some(minor)) = version else { return Err(HandshakeError::NotInit) };
        if major != MAJOR || minor < OLDEST_MINOR {
            return Err(HandshakeError::Version { major, minor });
        }
        let (max_readahead, flags) = (fields.u32().unwrap_or(0), fields.u32().unwrap_or(0));
        let mut capabilities = u64::from(flags);
        if capabilities & capability::INIT_EXT != 0 {
            capabilities |= u64::from(fields.u32().unwrap_or(0)) << 32;
        }
        let minor = newest.map_or(minor, |newest| minor.min(newest));
        Ok(Offer { unique, minor, max_readahead, capabilities: capabilities & known_to(minor) })
    }

    /// The answer to INIT and what it agrees upon. The same offer and wishes give the same
    /// bytes in every worker. Capabilities that the kernel does not offer are done without.
    pub(crate) fn answer(&self, wanted: u64) -> (Vec<u8>, Agreement) {
        use capability::{INIT_EXT, MAX_PAGES as MORE_PAGES, PASSTHROUGH};
        let capabilities = self.capabilities & (wanted | MORE_PAGES | INIT_EXT);
        // An overlay must fit on top: the kernel allows two file systems above each other.
        let stack_depth = u32::from(capabilities & PASSTHROUGH != 0);
        let mut body = Vec::with_capacity(64);
        body.extend(MAJOR.to_ne_bytes());
        body.extend(self.minor.min(MINOR).to_ne_bytes());
        body.extend(self.max_readahead.to_ne_bytes());
        body.extend((capabilities as u32).to_ne_bytes());
        body.extend(MAX_BACKGROUND.to_ne_bytes());
        body.extend(CONGESTED.to_ne_bytes());
        body.extend(MAX_WRITE.to_ne_bytes());
        if self.minor >= LONG_ANSWER_MINOR {
            body.extend(1_u32.to_ne_bytes());
            body.extend(MAX_PAGES.to_ne_bytes());
            body.extend(0_u16.to_ne_bytes());
            body.extend(((capabilities >> 32) as u32).to_ne_bytes());
            body.extend(stack_depth.to_ne_bytes());
            body.resize(64, 0);
        }
        let mut message = Vec::with_capacity(REPLY_HEADER + body.len());
        message.extend(((REPLY_HEADER + body.len()) as u32).to_ne_bytes());
        message.extend(0_i32.to_ne_bytes());
        message.extend(self.unique.to_ne_bytes());
        message.extend(body);
        (message, Agreement { kernel_minor: self.minor, capabilities })
    }
}

/// What an earlier answer to the offer agreed upon.
pub(crate) fn agreed_in(offer: &Offer, reply: &[u8]) -> Agreement {
    let word = |at: usize| {
        let bytes = reply.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_ne_bytes)
    };
    let capabilities = u64::from(word(REPLY_HEADER + 12)) | u64::from(word(REPLY_HEADER + 32)) << 32;
    Agreement { kernel_minor: offer.minor, capabilities }
}

/// The capabilities that kernels of a version can have; those of later ones are masked out.
fn known_to(minor: u32) -> u64 {
    use capability::{
        ALLOW_IDMAP, CACHE_SYMLINKS, EXPLICIT_INVAL_DATA, HAS_EXPIRE_ONLY, HAS_RESEND, NO_OPEN_SUPPORT,
        PASSTHROUGH,
    };
    let since = [
        (23, NO_OPEN_SUPPORT),
        (28, CACHE_SYMLINKS),
        (30, EXPLICIT_INVAL_DATA),
        (38, HAS_EXPIRE_ONLY),
        (40, PASSTHROUGH | HAS_RESEND),
        (41, ALLOW_IDMAP),
    ];
    since.iter().filter(|(first, _)| minor < *first).fold(u64::MAX, |known, (_, missing)| known & !missing)
}

#[cfg(test)]
mod tests {
    use super::capability::*;
    use super::*;
    use crate::protocol::request::tests::message;

    fn init(major: u32, minor: u32, flags: u32, flags2: u32) -> Vec<u8> {
        let words = [major, minor, 131_072, flags, flags2];
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        body.resize(64, 0);
        message(opcode::INIT, 2, 0, &body)
    }

    #[test]
    fn only_what_both_sides_know_is_agreed_upon() {
        let offered = (ASYNC_READ | DO_READDIRPLUS | INIT_EXT) as u32;
        let offer = Offer::parse(&init(7, 45, offered, (PASSTHROUGH >> 32) as u32), None).unwrap();
        let (reply, agreement) = offer.answer(PASSTHROUGH | DO_READDIRPLUS | CACHE_SYMLINKS);
        assert!(agreement.has(PASSTHROUGH) && agreement.has(DO_READDIRPLUS));
        assert!(!agreement.has(CACHE_SYMLINKS) && !agreement.has(ASYNC_READ));
        assert_eq!(reply.len(), 80);
        assert_eq!(u32::from_ne_bytes(reply[52..56].try_into().unwrap()), 1, "stack depth");
        assert_eq!(agreed_in(&offer, &reply), agreement, "a successor learns it from the record");
    }

    #[test]
    fn row_68_kernels_of_every_version_are_answered_in_their_own_length_or_refused_by_name() {
        for minor in OLDEST_MINOR..60 {
            let offer = Offer::parse(&init(7, minor, u32::MAX, u32::MAX), None).unwrap();
            let (reply, agreement) = offer.answer(PASSTHROUGH | HAS_RESEND | NO_OPEN_SUPPORT);
            assert_eq!(reply.len(), if minor < 23 { 40 } else { 80 }, "7.{minor}");
            assert_eq!(agreement.has(PASSTHROUGH), minor >= 40, "7.{minor}");
            assert!(u32::from_ne_bytes(reply[20..24].try_into().unwrap()) <= minor);
        }
        for (major, minor) in [(6, 40), (8, 0), (7, 20), (7, 0)] {
            let error = Offer::parse(&init(major, minor, 0, 0), None).unwrap_err().to_string();
            assert!(error.contains(&format!("{major}.{minor}")), "{error}");
        }
    }

    #[test]
    fn row_68_anything_but_init_is_refused() {
        assert!(Offer::parse(&[], None).is_err());
        assert!(Offer::parse(&[0; 39], None).is_err());
        assert!(Offer::parse(&message(opcode::LOOKUP, 1, 1, b"x\0"), None).is_err());
        assert!(Offer::parse(&message(opcode::INIT, 1, 1, &[7, 0, 0, 0]), None).is_err());
    }
}
