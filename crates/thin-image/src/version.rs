//! Versions of the descriptor format.

use std::fmt;
use std::str::FromStr;

/// A version of the descriptor format, `MAJOR.MINOR`. Further numbers are read over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Readers refuse a newer one.
    pub major: u32,
    /// Additions that an older reader may ignore.
    pub minor: u32,
}

impl Version {
    /// The version written, and the newest one understood.
    pub const SUPPORTED: Version = Version { major: 1, minor: 0 };
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut numbers = text.split('.').map(number);
        let major = numbers.next().ok_or(())??;
        let minor = numbers.next().unwrap_or(Ok(0))?;
        numbers.try_for_each(|rest| rest.map(drop))?;
        Ok(Self { major, minor })
    }
}

/// Digits only: `u32::from_str` alone would take a plus sign.
fn number(text: &str) -> Result<u32, ()> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().map_err(drop) } else { Err(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_separated_by_dots() {
        let parsed = |text: &str| text.parse::<Version>().map(|v| (v.major, v.minor));
        assert_eq!(parsed("1.0"), Ok((1, 0)));
        assert_eq!(parsed("0.1"), Ok((0, 1)));
        assert_eq!(parsed("2"), Ok((2, 0)));
        assert_eq!(parsed("1.2.3"), Ok((1, 2)));
        for wrong in ["", ".", "1.", "v1", "+1.0", "1.x", "1.0.", "99999999999.0", " 1.0"] {
            assert_eq!(parsed(wrong), Err(()), "{wrong:?}");
        }
    }
}
