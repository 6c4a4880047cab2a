//! The whitelist `.cvmfswhitelist`: which certificates may sign (repository format §6.1, §6.3).
//!
//! The whitelist is a [`Letter`](crate::letter::Letter) signed with the master key. Its expiry is compared at the
//! granularity of hours and strictly: during the hour of expiry it is already invalid.

use std::fmt;

use time::{Date, Month, OffsetDateTime};

use crate::hash::{ContentHash, shown};
use crate::letter::MAX_LETTER;
use crate::signature::{Authorities, Certificate, ChainError};

/// An hour in UTC, the granularity at which whitelists expire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UtcHour {
    year: u16,
    month: u8,
    day: u8,
    hour: u8,
}

impl UtcHour {
    /// The hour that contains a Unix time; none outside the years 0 to 9999.
    pub fn from_unix(seconds: i64) -> Option<Self> {
        let time = OffsetDateTime::from_unix_timestamp(seconds).ok()?;
        Some(Self {
            year: u16::try_from(time.year()).ok()?,
            month: time.month().into(),
            day: time.day(),
            hour: time.hour(),
        })
    }

    /// Unix time at which the hour begins.
    pub fn to_unix(self) -> i64 {
        self.date().map_or(0, |date| date.midnight().assume_utc().unix_timestamp())
            + i64::from(self.hour) * 3600
    }

    /// Parses `YYYYMMDDhhmmss`; minutes and seconds must be digits but have no meaning.
    fn parse(text: &[u8]) -> Option<Self> {
        if text.len() != 14 || !text.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let number =
            |range: std::ops::Range<usize>| std::str::from_utf8(&text[range]).ok()?.parse::<u16>().ok();
        let hour = Self {
            year: number(0..4)?,
            month: u8::try_from(number(4..6)?).ok()?,
            day: u8::try_from(number(6..8)?).ok()?,
            hour: u8::try_from(number(8..10)?).ok()?,
        };
        (hour.hour < 24 && hour.date().is_some()).then_some(hour)
    }

    fn date(self) -> Option<Date> {
        Date::from_calendar_date(i32::from(self.year), Month::try_from(self.month).ok()?, self.day).ok()
    }
}

impl fmt::Display for UtcHour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02} {:02}:00 UTC", self.year, self.month, self.day, self.hour)
    }
}

/// Content of a whitelist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whitelist {
    /// First hour in which the list is no longer valid.
    pub expires: UtcHour,
    /// Repository name.
    pub fqrn: String,
    /// Fingerprints of the certificates that may sign; unparsable lines are left out.
    pub fingerprints: Vec<ContentHash>,
    /// The list asks to be verified by PKCS#7 (`Vpkcs7`).
    pub pkcs7: bool,
    /// The list asks for verification of the certificate's chain (`Wcachain`).
    pub ca_chain: bool,
}

/// Why a whitelist is malformed or does not let a certificate pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WhitelistError {
    /// More bytes than any whitelist has.
    #[error("whitelist has {0} bytes, more than the {MAX_LETTER} allowed")]
    TooLarge(usize),
    /// One of the three fixed lines is not as it must be.
    #[error("malformed whitelist: line {line} is {found:?}, expected {expected}")]
    Malformed {
        /// Line number from 1.
        line: usize,
        /// The line, cut for display.
        found: String,
        /// What would be right.
        expected: &'static str,
    },
    /// The list belongs to another repository.
    #[error("whitelist: repository name does not match (found {found}, expected {expected})")]
    WrongName {
        /// Name in the whitelist.
        found: String,
        /// Name asked for.
        expected: String,
    },
    /// The list is no longer valid.
    #[error("whitelist expired on {0}")]
    Expired(UtcHour),
    /// The list can be verified by PKCS#7 only.
    #[error("whitelist asks for PKCS#7 verification, which is not supported")]
    Pkcs7,
    /// The list demands a certificate chain, and the caller has no authorities to verify it.
    #[error("whitelist asks for verification of the certificate chain, which is not supported here")]
    CaChain,
    /// The list demands a certificate chain, and it does not hold.
    #[error("whitelist asks for a certificate of a trusted authority: {0}")]
    Chain(#[from] ChainError),
    /// The certificate is not listed.
    #[error("certificate not on whitelist (fingerprint {0})")]
    NotListed(String),
}

impl Whitelist {
    /// Parses the text of a whitelist, with or without its signature part: reading stops at the line `--`.
    pub fn parse(text: &[u8]) -> Result<Self, WhitelistError> {
        if text.len() > MAX_LETTER {
            return Err(WhitelistError::TooLarge(text.len()));
        }
        let mut lines = text.split(|byte| *byte == b'\n').take_while(|line| *line != b"--").peekable();
        let mut fixed = |line, expected, is_good: &dyn Fn(&[u8]) -> bool| {
            let found: &[u8] = lines.next().unwrap_or_default();
            if is_good(found) {
                return Ok(found);
            }
            Err(WhitelistError::Malformed { line, found: shown(found), expected })
        };
        fixed(1, "14 digits of the creation time", &|line| line.len() == 14)?;
        let is_expiry = |line: &[u8]| line.strip_prefix(b"E").and_then(UtcHour::parse).is_some();
        let expiry = fixed(2, "E and 14 digits of the expiry time", &is_expiry)?;
        let is_name = |line: &[u8]| line.starts_with(b"N") && std::str::from_utf8(line).is_ok();
        let name = fixed(3, "N and the repository name", &is_name)?;
        let pkcs7 = lines.next_if(|line| *line == b"Vpkcs7").is_some();
        let ca_chain = lines.next_if(|line| *line == b"Wcachain").is_some();
        Ok(Self {
            expires: UtcHour::parse(&expiry[1..]).expect("checked by is_expiry"),
            fqrn: String::from_utf8_lossy(&name[1..]).into_owned(),
            fingerprints: lines.filter_map(ContentHash::parse_fingerprint).collect(),
            pkcs7,
            ca_chain,
        })
    }

    /// Whether the list is no longer valid at a Unix time; also true for times no calendar has.
    pub fn is_expired(&self, unix_now: i64) -> bool {
        UtcHour::from_unix(unix_now).is_none_or(|now| now >= self.expires)
    }

    /// Unix time from which the list is invalid.
    pub fn expires_unix(&self) -> i64 {
        self.expires.to_unix()
    }

    /// Whether a certificate's fingerprint is on the list.
    pub fn lists(&self, certificate: &Certificate) -> bool {
        self.fingerprints.iter().any(|listed| certificate.fingerprint(listed.algorithm) == *listed)
    }

    /// Applies all checks but the signature's: name, expiry, unsupported demands, certificate. A list that demands
    /// a certificate of a trusted authority is refused, see [`Whitelist::check_with`].
    pub fn check(&self, fqrn: &str, unix_now: i64, certificate: &Certificate) -> Result<(), WhitelistError> {
        if self.ca_chain {
            return Err(WhitelistError::CaChain);
        }
        self.check_with(fqrn, unix_now, certificate, &Authorities::new)
    }

    /// As [`Whitelist::check`]; where the list demands it, the certificate must also be issued by one of the
    /// authorities, which are asked for only then.
    pub fn check_with(
        &self,
        fqrn: &str,
        unix_now: i64,
        certificate: &Certificate,
        authorities: &dyn Fn() -> Authorities,
    ) -> Result<(), WhitelistError> {
        if self.fqrn != fqrn {
            return Err(WhitelistError::WrongName {
                found: shown(self.fqrn.as_bytes()),
                expected: fqrn.to_owned(),
            });
        }
        if self.is_expired(unix_now) {
            return Err(WhitelistError::Expired(self.expires));
        }
        if self.pkcs7 {
            return Err(WhitelistError::Pkcs7);
        }
        if !self.lists(certificate) {
            let algorithm = self.fingerprints.first().map(|listed| listed.algorithm).unwrap_or_default();
            return Err(WhitelistError::NotListed(certificate.fingerprint(algorithm).to_fingerprint()));
        }
        if self.ca_chain {
            authorities().verify(certificate, unix_now)?;
        }
        Ok(())
    }

    /// The text part of a new whitelist; sign it with [`seal`](crate::letter::seal) and the master key. Both times
    /// are Unix times.
    pub fn compose(created: i64, expires: i64, fqrn: &str, fingerprints: &[ContentHash]) -> Vec<u8> {
        let mut text = format!("{}\nE{}\nN{fqrn}\n", stamp(created), stamp(expires));
        for fingerprint in fingerprints {
            text.push_str(&fingerprint.to_fingerprint());
            text.push('\n');
        }
        text.into_bytes()
    }
}

/// `YYYYMMDDhhmmss` in UTC; times outside the years 0 to 9999 are moved to the nearest end.
fn stamp(unix: i64) -> String {
    const FIRST: i64 = -62_167_219_200;
    const LAST: i64 = 253_402_300_799;
    let time =
        OffsetDateTime::from_unix_timestamp(unix.clamp(FIRST, LAST)).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    format!(
        "{:04}{:02}{:02}{:02}{:02}{:02}",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::HashAlgorithm;

    const EXAMPLE: &str = "20240101120000\nE20240131120000\nNexample.cern.ch\n\
        4B:1F:3C:7A:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF # release manager\n";

    /// 2024-01-31 12:00:00 UTC
    const NOON: i64 = 1_706_702_400;

    #[test]
    fn the_worked_example_has_its_hash_and_fields() {
        assert_eq!(EXAMPLE.len(), 126);
        let hash = ContentHash::of(HashAlgorithm::Sha1, EXAMPLE.as_bytes());
        assert_eq!(hash.to_string(), "80820a8cb5a126e5a6aae8872f5dd9103fbb615f");
        let whitelist = Whitelist::parse(EXAMPLE.as_bytes()).unwrap();
        assert_eq!(whitelist.fqrn, "example.cern.ch");
        assert_eq!(whitelist.fingerprints.len(), 1);
        assert_eq!(whitelist.expires.to_string(), "2024-01-31 12:00 UTC");
        assert_eq!(whitelist.expires_unix(), NOON);
        assert!(!whitelist.pkcs7 && !whitelist.ca_chain);
    }

    #[test]
    fn the_list_is_valid_to_the_last_second_before_its_hour() {
        let whitelist =
            Whitelist::parse(EXAMPLE.replace("E20240131120000", "E20240131123045").as_bytes()).unwrap();
        assert!(!whitelist.is_expired(NOON - 1));
        assert!(whitelist.is_expired(NOON));
        assert!(whitelist.is_expired(NOON + 30 * 60));
        assert!(whitelist.is_expired(i64::MAX));
        assert!(!whitelist.is_expired(0));
    }

    #[test]
    fn demands_are_recognised_only_on_their_lines() {
        let with = |lines: &str| {
            Whitelist::parse(EXAMPLE.replace("cern.ch\n", &format!("cern.ch\n{lines}")).as_bytes()).unwrap()
        };
        assert!(with("Vpkcs7\n").pkcs7);
        assert!(with("Vpkcs7\nWcachain\n").ca_chain);
        assert!(with("Wcachain\n").ca_chain);
        let late = Whitelist::parse(format!("{EXAMPLE}Vpkcs7\n").as_bytes()).unwrap();
        assert!(!late.pkcs7);
    }

    #[test]
    fn fingerprints_after_the_separator_and_unparsable_lines_do_not_count() {
        let text =
            format!("{EXAMPLE}junk\n\n--\n00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33\n");
        assert_eq!(Whitelist::parse(text.as_bytes()).unwrap().fingerprints.len(), 1);
    }

    #[test]
    fn a_malformed_line_is_named() {
        for (from, to, line) in [
            ("20240101120000\n", "2024010112000\n", 1),
            ("E20240131", "E2024013", 2),
            ("E20240131", "E20240231", 2),
            ("E20240131", "x20240131", 2),
            ("E2024013112", "E2024013124", 2),
            ("Nexample", "example", 3),
        ] {
            let error = Whitelist::parse(EXAMPLE.replace(from, to).as_bytes()).unwrap_err();
            assert!(
                matches!(error, WhitelistError::Malformed { line: found, .. } if found == line),
                "{to}: {error}"
            );
        }
        assert!(Whitelist::parse(b"").is_err());
        assert_eq!(
            Whitelist::parse(&vec![b'a'; MAX_LETTER + 1]),
            Err(WhitelistError::TooLarge(MAX_LETTER + 1))
        );
    }

    #[test]
    fn a_composed_list_comes_back() {
        let prints: Vec<_> =
            HashAlgorithm::ALL.iter().map(|algorithm| ContentHash::of(*algorithm, b"certificate")).collect();
        let text = Whitelist::compose(NOON - 1, NOON + 3 * 3600 + 59, "a.example.org", &prints);
        assert!(text.starts_with(b"20240131115959\nE20240131150059\nNa.example.org\n"));
        let whitelist = Whitelist::parse(&text).unwrap();
        assert_eq!(whitelist.fingerprints, prints);
        assert_eq!(whitelist.expires_unix(), NOON + 3 * 3600);
        assert_eq!(stamp(i64::MAX), "99991231235959");
        assert_eq!(stamp(i64::MIN), "00000101000000");
    }
}
