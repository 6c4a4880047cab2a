//! The commands a mount understands, parsed.
//!
//! Names, arguments and usage lines are those of `cvmfs_talk` (client behaviour §12). One difference: a number that
//! is none gets the usage line, where the C++ client reads 0 and, for `cleanup`, empties the cache.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use cvmfs_format::ContentHash;

/// Longest command in bytes: a long list of proxies. The C++ client takes 512.
pub const MAX_COMMAND: usize = 4096;

/// Which entries `cache list` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listed {
    /// All.
    All,
    /// The pinned ones.
    Pinned,
    /// Catalogs.
    Catalogs,
}

/// Whose hosts or proxies a command is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The repository's own servers.
    Regular,
    /// The servers of external files.
    External,
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Ours: `ping`.
    Ping,
    /// Ours: the state as one JSON document.
    StatusJson,
    /// Ours: look for a newer revision, answer with the revision in use or the error.
    Refresh,
    /// `tracebuffer flush`.
    TracebufferFlush,
    /// `cache size`.
    CacheSize,
    /// `cache instance`.
    CacheInstance,
    /// `cache list`, `cache list pinned`, `cache list catalogs`.
    CacheList(Listed),
    /// `cache limit get`.
    CacheLimitGet,
    /// `cache limit set <MB>`.
    CacheLimitSet(u64),
    /// `cleanup <MB>`.
    Cleanup(u64),
    /// `cleanup rate <minutes>`.
    CleanupRate(u64),
    /// `evict <path>`.
    Evict(Vec<u8>),
    /// `pin <path>`.
    Pin(Vec<u8>),
    /// `mountpoint`.
    Mountpoint,
    /// `device id`.
    DeviceId,
    /// `pid`.
    Pid,
    /// `pid cachemgr`.
    PidCacheManager,
    /// `pid watchdog`.
    PidWatchdog,
    /// `remount`, `remount sync`.
    Remount,
    /// `chroot <hash>`.
    Chroot(ContentHash),
    /// `detach nested catalogs`.
    DetachNestedCatalogs,
    /// `revision`.
    Revision,
    /// `max ttl info`.
    MaxTtlInfo,
    /// `max ttl set <minutes>`.
    MaxTtlSet(u64),
    /// `nameserver get`.
    NameserverGet,
    /// `nameserver set <ip>`.
    NameserverSet(IpAddr),
    /// `host info`, `external host info`.
    HostInfo(Side),
    /// `host switch`, `external host switch`.
    HostSwitch(Side),
    /// `host set <list>`, `external host set <list>`.
    HostSet(Side, String),
    /// `host probe`.
    HostProbe,
    /// `host probe geo`.
    HostProbeGeo,
    /// `proxy info`, `external proxy info`.
    ProxyInfo(Side),
    /// `proxy set <list>`, `external proxy set <list>`.
    ProxySet(Side, String),
    /// `proxy rebalance`.
    ProxyRebalance,
    /// `proxy group switch`.
    ProxyGroupSwitch,
    /// `proxy fallback <list>`.
    ProxyFallback(String),
    /// `timeout info`.
    TimeoutInfo,
    /// `timeout set <proxy s> <direct s>`.
    TimeoutSet(Duration, Duration),
    /// `open catalogs`.
    OpenCatalogs,
    /// `internal affairs`.
    InternalAffairs,
    /// `reset error counters`.
    ResetErrorCounters,
    /// `parameters`.
    Parameters,
    /// `hotpatch history`.
    HotpatchHistory,
    /// `vfs inodes`.
    VfsInodes,
    /// `vfs entries`.
    VfsEntries,
    /// `version`.
    Version,
    /// `version patchlevel`.
    VersionPatchlevel,
    /// `tear down to read-only`.
    TearDownToReadOnly,
    /// `latency`.
    Latency,
    /// `send mount fd <socket>`.
    SendMountFd(PathBuf),
}

/// Commands without arguments.
static PLAIN: &[(&str, Command)] = &[
    ("ping", Command::Ping),
    ("status json", Command::StatusJson),
    ("refresh", Command::Refresh),
    ("tracebuffer flush", Command::TracebufferFlush),
    ("cache size", Command::CacheSize),
    ("cache instance", Command::CacheInstance),
    ("cache list", Command::CacheList(Listed::All)),
    ("cache list pinned", Command::CacheList(Listed::Pinned)),
    ("cache list catalogs", Command::CacheList(Listed::Catalogs)),
    ("cache limit get", Command::CacheLimitGet),
    ("mountpoint", Command::Mountpoint),
    ("device id", Command::DeviceId),
    ("pid", Command::Pid),
    ("pid cachemgr", Command::PidCacheManager),
    ("pid watchdog", Command::PidWatchdog),
    ("remount", Command::Remount),
    ("remount sync", Command::Remount),
    ("detach nested catalogs", Command::DetachNestedCatalogs),
    ("revision", Command::Revision),
    ("max ttl info", Command::MaxTtlInfo),
    ("nameserver get", Command::NameserverGet),
    ("host info", Command::HostInfo(Side::Regular)),
    ("host switch", Command::HostSwitch(Side::Regular)),
    ("host probe", Command::HostProbe),
    ("host probe geo", Command::HostProbeGeo),
    ("external host info", Command::HostInfo(Side::External)),
    ("external host switch", Command::HostSwitch(Side::External)),
    ("proxy info", Command::ProxyInfo(Side::Regular)),
    ("proxy rebalance", Command::ProxyRebalance),
    ("proxy group switch", Command::ProxyGroupSwitch),
    ("external proxy info", Command::ProxyInfo(Side::External)),
    ("timeout info", Command::TimeoutInfo),
    ("open catalogs", Command::OpenCatalogs),
    ("internal affairs", Command::InternalAffairs),
    ("reset error counters", Command::ResetErrorCounters),
    ("parameters", Command::Parameters),
    ("hotpatch history", Command::HotpatchHistory),
    ("vfs inodes", Command::VfsInodes),
    ("vfs entries", Command::VfsEntries),
    ("version", Command::Version),
    ("version patchlevel", Command::VersionPatchlevel),
    ("tear down to read-only", Command::TearDownToReadOnly),
    ("latency", Command::Latency),
];

/// A command with an argument: its words, the usage line, and how the argument is read.
struct WithArgument {
    words: &'static str,
    usage: &'static str,
    parse: fn(&str) -> Option<Command>,
}

/// Longer words first: `cleanup rate` is not `cleanup` of `rate`.
const WITH_ARGUMENT: [WithArgument; 15] = [
    WithArgument {
        words: "cleanup rate",
        usage: "Usage: cleanup rate <period in mn>",
        parse: |text| number(text).map(Command::CleanupRate),
    },
    WithArgument {
        words: "cleanup",
        usage: "Usage: cleanup <MB>",
        parse: |text| number(text).map(Command::Cleanup),
    },
    WithArgument {
        words: "cache limit set",
        usage: "Usage: cache limit set <MB>",
        parse: |text| number(text).map(Command::CacheLimitSet),
    },
    WithArgument {
        words: "evict",
        usage: "Usage: evict <path>",
        parse: |text| Some(Command::Evict(text.into())),
    },
    WithArgument { words: "pin", usage: "Usage: pin <path>", parse: |text| Some(Command::Pin(text.into())) },
    WithArgument {
        words: "chroot",
        usage: "Usage: chroot <hash>",
        parse: |text| text.parse().ok().map(Command::Chroot),
    },
    WithArgument {
        words: "max ttl set",
        usage: "Usage: max ttl set <minutes>",
        parse: |text| number(text).map(Command::MaxTtlSet),
    },
    WithArgument {
        words: "nameserver set",
        usage: "Usage: nameserver set <host>",
        parse: |text| text.parse().ok().map(Command::NameserverSet),
    },
    WithArgument {
        words: "external host set",
        usage: "Usage: external host set <URL>",
        parse: |text| Some(Command::HostSet(Side::External, text.into())),
    },
    WithArgument {
        words: "host set",
        usage: "Usage: host set <host list>",
        parse: |text| Some(Command::HostSet(Side::Regular, text.into())),
    },
    WithArgument {
        words: "external proxy set",
        usage: "Usage: external proxy set <proxy list>",
        parse: |text| Some(Command::ProxySet(Side::External, text.into())),
    },
    WithArgument {
        words: "proxy set",
        usage: "Usage: proxy set <proxy list>",
        parse: |text| Some(Command::ProxySet(Side::Regular, text.into())),
    },
    WithArgument {
        words: "proxy fallback",
        usage: "Usage: proxy fallback <proxy list>",
        parse: |text| Some(Command::ProxyFallback(text.into())),
    },
    WithArgument {
        words: "timeout set",
        usage: "Usage: timeout set <proxy> <direct>",
        parse: |text| {
            let (proxied, direct) = text.split_once(' ')?;
            // 0 is "for ever" in the C++ client; here every wait has an end.
            let seconds = |text: &str| number(text).filter(|n| *n > 0).map(Duration::from_secs);
            Some(Command::TimeoutSet(seconds(proxied)?, seconds(direct.trim())?))
        },
    },
    WithArgument {
        words: "send mount fd",
        usage: "EINVAL",
        parse: |text| Some(Command::SendMountFd(PathBuf::from(text))),
    },
];

/// What is answered to something that is no command.
pub(super) const UNKNOWN: &str = "unknown command";

impl Command {
    /// Reads a command as it came from the socket. A trailing zero byte and line end do not count.
    ///
    /// # Errors
    /// The line to answer: `unknown command`, or the usage of the command that was meant.
    pub fn parse(received: &[u8]) -> Result<Command, &'static str> {
        if received.len() > MAX_COMMAND {
            return Err(UNKNOWN);
        }
        let text = std::str::from_utf8(received).map_err(|_| UNKNOWN)?;
        let text = text.trim_end_matches(['\0', '\n', '\r']).trim();
        if text.chars().any(char::is_control) {
            return Err(UNKNOWN);
        }
        if let Some((_, command)) = PLAIN.iter().find(|(words, _)| *words == text) {
            return Ok(command.clone());
        }
        for candidate in &WITH_ARGUMENT {
            if text == candidate.words {
                return Err(candidate.usage);
            }
            if let Some(argument) = text.strip_prefix(candidate.words).and_then(|rest| rest.strip_prefix(' '))
            {
                return (candidate.parse)(argument.trim()).ok_or(candidate.usage);
            }
        }
        Err(UNKNOWN)
    }

    /// Whether the answer needs neither the network nor long work. Such commands have threads of their own, so
    /// that `status` is answered while others wait for servers.
    pub(super) fn is_prompt(&self) -> bool {
        matches!(
            self,
            Command::Ping
                | Command::StatusJson
                | Command::Mountpoint
                | Command::DeviceId
                | Command::Pid
                | Command::PidCacheManager
                | Command::PidWatchdog
                | Command::Revision
                | Command::Version
                | Command::VersionPatchlevel
                | Command::HostInfo(_)
                | Command::ProxyInfo(_)
                | Command::TimeoutInfo
                | Command::Parameters
        )
    }

    /// Whether the command changes something, which is worth a log line.
    pub(super) fn changes_something(&self) -> bool {
        matches!(
            self,
            Command::CacheLimitSet(_)
                | Command::Cleanup(_)
                | Command::Evict(_)
                | Command::Pin(_)
                | Command::Chroot(_)
                | Command::DetachNestedCatalogs
                | Command::MaxTtlSet(_)
                | Command::NameserverSet(_)
                | Command::HostSwitch(_)
                | Command::HostSet(..)
                | Command::HostProbe
                | Command::HostProbeGeo
                | Command::ProxySet(..)
                | Command::ProxyRebalance
                | Command::ProxyGroupSwitch
                | Command::ProxyFallback(_)
                | Command::TimeoutSet(..)
                | Command::ResetErrorCounters
                | Command::TearDownToReadOnly
                | Command::SendMountFd(_)
        )
    }

    /// The words of the command without its argument, for logs.
    pub(super) fn words(&self) -> &'static str {
        match self {
            Command::CleanupRate(_) => "cleanup rate",
            Command::Cleanup(_) => "cleanup",
            Command::CacheLimitSet(_) => "cache limit set",
            Command::Evict(_) => "evict",
            Command::Pin(_) => "pin",
            Command::Chroot(_) => "chroot",
            Command::MaxTtlSet(_) => "max ttl set",
            Command::NameserverSet(_) => "nameserver set",
            Command::HostSet(Side::Regular, _) => "host set",
            Command::HostSet(Side::External, _) => "external host set",
            Command::ProxySet(Side::Regular, _) => "proxy set",
            Command::ProxySet(Side::External, _) => "external proxy set",
            Command::ProxyFallback(_) => "proxy fallback",
            Command::TimeoutSet(..) => "timeout set",
            Command::SendMountFd(_) => "send mount fd",
            plain => PLAIN.iter().find(|(_, known)| known == plain).map_or("", |(words, _)| words),
        }
    }
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_understood_with_and_without_line_end_and_zero_byte() {
        for text in ["cache size", "cache size\n", "cache size\0", " cache size \r\n"] {
            assert_eq!(Command::parse(text.as_bytes()), Ok(Command::CacheSize), "{text:?}");
        }
        assert_eq!(Command::parse(b"cleanup rate 60"), Ok(Command::CleanupRate(60)));
        assert_eq!(Command::parse(b"cleanup 1000"), Ok(Command::Cleanup(1000)));
        assert_eq!(
            Command::parse(b"evict /a file with blanks"),
            Ok(Command::Evict(b"/a file with blanks".to_vec()))
        );
        let seconds = Duration::from_secs;
        assert_eq!(Command::parse(b"timeout set 5 10"), Ok(Command::TimeoutSet(seconds(5), seconds(10))));
    }

    #[test]
    fn a_command_without_its_argument_or_with_a_wrong_one_gets_its_usage() {
        let wrong = [
            ("cleanup", "Usage: cleanup <MB>"),
            ("cleanup much", "Usage: cleanup <MB>"),
            ("cleanup -1", "Usage: cleanup <MB>"),
            ("cleanup rate", "Usage: cleanup rate <period in mn>"),
            ("timeout set 5", "Usage: timeout set <proxy> <direct>"),
            ("timeout set 0 0", "Usage: timeout set <proxy> <direct>"),
            ("chroot xyz", "Usage: chroot <hash>"),
            ("send mount fd", "EINVAL"),
        ];
        for (text, usage) in wrong {
            assert_eq!(Command::parse(text.as_bytes()), Err(usage), "{text}");
        }
    }

    #[test]
    fn what_is_no_command_is_unknown_and_says_nothing_of_what_was_sent() {
        let long = [b'x'; MAX_COMMAND + 1];
        for garbage in
            [&b""[..], b"\0", b"\xff\xfe", b"cleanups 5", b"pid\ncachemgr", b"evict \x1b[31m", &long]
        {
            assert_eq!(Command::parse(garbage), Err(UNKNOWN), "{garbage:?}");
        }
    }

    #[test]
    fn every_command_has_a_name_for_logs() {
        let given = [
            "evict /x",
            "cleanup 5",
            "host set a",
            "external proxy set b",
            "proxy fallback c",
            "chroot da39a3ee5e6b4b0d3255bfef95601890afd80709",
        ];
        for text in PLAIN.iter().map(|(words, _)| *words).chain(given) {
            let words = Command::parse(text.as_bytes()).unwrap().words();
            assert!(!words.is_empty() && text.starts_with(words), "{text}: {words}");
        }
    }
}
