//! Which revision of a repository is wanted (client behaviour §2.2).

use std::fmt;

use cvmfs_format::hash::ContentHash;
use time::PrimitiveDateTime;
use time::macros::format_description;

use super::{Config, ConfigError, Setting};

/// The revision that a mount shall show.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Selection {
    /// The newest one; newer ones are followed.
    #[default]
    Newest,
    /// The one with this root catalog (`CVMFS_ROOT_HASH`).
    Root(ContentHash),
    /// The one with this name in the history (`CVMFS_REPOSITORY_TAG`).
    Tag(String),
    /// The newest named one of the main line that is not younger than a Unix time (`CVMFS_REPOSITORY_DATE`).
    Date(i64),
}

impl Selection {
    /// Whether the revision stays what it is for as long as the repository is mounted.
    pub fn is_fixed(&self) -> bool {
        *self != Self::Newest
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => formatter.write_str("the newest revision"),
            Self::Root(hash) => write!(formatter, "the revision with root catalog {hash}"),
            Self::Tag(name) => write!(formatter, "the revision tagged '{}'", name.escape_debug()),
            Self::Date(unix) => match time::OffsetDateTime::from_unix_timestamp(*unix) {
                Ok(date) => write!(formatter, "the newest tagged revision of {date} or before"),
                Err(_) => write!(formatter, "the newest tagged revision of time {unix} or before"),
            },
        }
    }
}

/// The root catalog's hash wins over the tag, the tag over the date.
pub(super) fn selection(config: &Config) -> Result<Selection, ConfigError> {
    let set = |name| config.get(name).filter(|setting| !setting.value.is_empty());
    if let Some(setting) = set("CVMFS_ROOT_HASH") {
        return match ContentHash::parse(setting.value.as_bytes()) {
            Ok(hash) => Ok(Selection::Root(hash)),
            Err(error) => {
                Err(config.invalid("CVMFS_ROOT_HASH", setting, &format!("expected a content hash: {error}")))
            }
        };
    }
    if let Some(setting) = set("CVMFS_REPOSITORY_TAG") {
        return Ok(Selection::Tag(setting.value.clone()));
    }
    match set("CVMFS_REPOSITORY_DATE") {
        Some(setting) => date(config, setting).map(Selection::Date),
        None => Ok(Selection::Newest),
    }
}

fn date(config: &Config, setting: &Setting) -> Result<i64, ConfigError> {
    let form = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    PrimitiveDateTime::parse(&setting.value, form)
        .map(|date| date.assume_utc().unix_timestamp())
        .map_err(|_| config.invalid("CVMFS_REPOSITORY_DATE", setting, "expected YYYY-MM-DDTHH:MM:SSZ"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigSources;

    fn select(options: &[(&str, &str)]) -> Result<Selection, ConfigError> {
        let overrides = options.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let sources = ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() };
        selection(&Config::load("a.example.org", &sources).unwrap())
    }

    #[test]
    fn the_root_hash_wins_over_the_tag_and_the_tag_over_the_date() {
        let (root, tag, date) = (
            ("CVMFS_ROOT_HASH", "e7d3a1bd1f3f7a3bf0b65cbe1dbeaf9b25b0d2d5"),
            ("CVMFS_REPOSITORY_TAG", "v1"),
            ("CVMFS_REPOSITORY_DATE", "2024-02-29T12:00:00Z"),
        );
        assert!(matches!(select(&[root, tag, date]).unwrap(), Selection::Root(_)));
        assert_eq!(select(&[date, tag]).unwrap(), Selection::Tag("v1".into()));
        assert_eq!(select(&[date]).unwrap(), Selection::Date(1_709_208_000));
        assert_eq!(select(&[]).unwrap(), Selection::Newest);
        assert_eq!(select(&[("CVMFS_ROOT_HASH", "")]).unwrap(), Selection::Newest);
    }

    #[test]
    fn a_wrong_hash_or_date_is_refused_with_its_place() {
        for (name, value) in [
            ("CVMFS_ROOT_HASH", "newest"),
            ("CVMFS_REPOSITORY_DATE", "yesterday"),
            ("CVMFS_REPOSITORY_DATE", "2023-02-29T12:00:00Z"),
        ] {
            let error = select(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains("command line") && error.contains(name), "{error}");
        }
    }
}
