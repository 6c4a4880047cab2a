//! The parameters of the kernel side: what a mount shows and how the kernel may use it (client behaviour §2.1, §2.2).

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use super::files::read_file;
use super::{Config, ConfigError, Setting};

/// What the kernel adapter needs to know about one mount, with types and defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSettings {
    /// Time for which the kernel may keep names and attributes, also names that do not exist.
    pub entry_lifetime: Duration,
    /// Time for which the numbers of `statfs` are kept; zero: they are always fresh.
    pub statfs_lifetime: Duration,
    /// Whether the kernel may keep link targets. On unless switched off: a link that changes is another inode here.
    pub cache_symlinks: bool,
    /// Which reads the mount uses.
    pub profile: ProfileChoice,
    /// How long a reader waits for content before it gets an error; less waits, at most this, for names and attributes.
    pub deadline: Duration,
    /// Small files that are fetched ahead of a program that reads a directory's files in their order; 0: none.
    pub files_ahead: usize,
    /// Owners and modes as they are shown.
    pub ownership: Ownership,
    /// Whether the kernel checks permissions.
    pub check_permissions: bool,
    /// Whether the mount may be mapped to other owners by who mounts it again (id-mapped mounts, Linux 6.12). The kernel
    /// does not tell who calls then, so it is off where that is asked.
    pub id_mapped: bool,
    /// Whether set-uid bits are honoured.
    pub suid: bool,
    /// Whether the mount is writable by its flags; writes fail nevertheless.
    pub writable: bool,
    /// Whether the kernel enforces the POSIX access control lists that are stored as attributes.
    pub enforce_acls: bool,
    /// Which magic extended attributes are listed.
    pub magic_xattrs: XattrVisibility,
    /// Magic attributes that only processes with a privileged group may read, by full name.
    pub protected_xattrs: BTreeSet<String>,
    /// Primary groups that may read protected attributes; 0 is always among them.
    pub privileged_gids: BTreeSet<u32>,
    /// Whether the latency of each call is recorded.
    pub instrument: bool,
}

/// How reads shall be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProfileChoice {
    /// The best that works.
    Auto,
    /// The kernel reads cache files itself.
    Passthrough,
    /// The kernel opens files without asking; reads come to the client.
    NoOpen,
    /// Opens and reads come to the client.
    Plain,
}

/// Which magic extended attributes are listed (repository format §13.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XattrVisibility {
    /// On the root directory of the mount.
    RootOnly,
    /// On no entry.
    Never,
    /// On every entry.
    Always,
}

/// Owners and modes as they are shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ownership {
    /// All entries belong to the user and group of the client process.
    pub claim: bool,
    /// Users of the repository as users of the machine.
    pub uids: IdMap,
    /// Groups of the repository as groups of the machine.
    pub gids: IdMap,
    /// All may read files, and search directories.
    pub world_readable: bool,
}

/// Rules from ids of the repository to ids of the machine. Ids without a rule stay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    rules: HashMap<u32, u32>,
    /// First and last id, and what the first becomes; the others follow.
    ranges: Vec<(u32, u32, u32)>,
    others: Option<u32>,
}

impl IdMap {
    /// The id to show.
    pub fn map(&self, id: u32) -> u32 {
        let in_range = || {
            let (first, _, to) =
                self.ranges.iter().find(|(first, last, _)| (*first..=*last).contains(&id))?;
            to.checked_add(id - first)
        };
        self.rules.get(&id).copied().or_else(in_range).or(self.others).unwrap_or(id)
    }

    /// Parses a map file: lines `<repository id> <local id>`, `* <id>` for all others, comments after `#`; and, beyond
    /// what the C++ client knows, `<first>-<last> <local id of the first>`. Single ids go before ranges.
    ///
    /// # Errors
    /// The number of the first line of another form.
    pub fn parse(text: &str) -> Result<IdMap, usize> {
        let mut map = IdMap::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut fields = line.split(' ').filter(|field| !field.is_empty());
            let (Some(from), Some(Ok(to)), None) =
                (fields.next(), fields.next().map(str::parse), fields.next())
            else {
                return Err(index + 1);
            };
            match from.parse() {
                Ok(from) => {
                    map.rules.insert(from, to);
                }
                Err(_) if from == "*" => map.others = Some(to),
                Err(_) => {
                    let range = from.split_once('-').and_then(|(first, last)| {
                        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
                        (first <= last && to.checked_add(last - first).is_some()).then_some((first, last, to))
                    });
                    map.ranges.push(range.ok_or(index + 1)?);
                }
            }
        }
        Ok(map)
    }
}

impl KernelSettings {
    /// Gives the values of `config` their types.
    ///
    /// # Errors
    /// A parameter with a wrong value, or a map file that cannot be used, with the place to mend it.
    pub fn from(config: &Config) -> Result<Self, ConfigError> {
        let seconds = |name, default| -> Result<Duration, ConfigError> {
            let seconds = config.number(name, default)?.clamp(0, i64::from(u32::MAX));
            Ok(Duration::from_secs(seconds.unsigned_abs()))
        };
        let check_permissions = config.switch("CVMFS_CHECK_PERMISSIONS", true)?;
        let protected_xattrs: BTreeSet<String> =
            words(config, "CVMFS_XATTR_PROTECTED_XATTRS").map(str::to_owned).collect();
        // The kernel itself has to check permissions.
        let id_mapped = config.switch("CVMFS_FUSE_IDMAP", true)?
            && check_permissions
            && protected_xattrs.is_empty()
            && !config.switch("CVMFS_SEND_INFO_HEADER", false)?;
        Ok(Self {
            entry_lifetime: seconds("CVMFS_KCACHE_TIMEOUT", 60)?,
            statfs_lifetime: seconds("CVMFS_STATFS_CACHE_TIMEOUT", 0)?,
            cache_symlinks: config.switch("CVMFS_CACHE_SYMLINKS", true)?,
            profile: profile(config)?,
            deadline: deadline(config)?,
            files_ahead: files_ahead(config)?,
            ownership: Ownership {
                claim: config.switch("CVMFS_CLAIM_OWNERSHIP", false)?,
                uids: id_map(config, "CVMFS_UID_MAP")?,
                gids: id_map(config, "CVMFS_GID_MAP")?,
                world_readable: config.switch("CVMFS_WORLD_READABLE", false)?,
            },
            check_permissions,
            id_mapped,
            suid: config.switch("CVMFS_SUID", false)?,
            writable: config.switch("CVMFS_MOUNT_RW", false)?,
            enforce_acls: config.switch("CVMFS_ENFORCE_ACLS", false)?,
            magic_xattrs: magic_xattrs(config)?,
            protected_xattrs,
            privileged_gids: privileged_gids(config)?,
            instrument: config.switch("CVMFS_INSTRUMENT_FUSE", false)?,
        })
    }
}

fn set<'a>(config: &'a Config, name: &str) -> Option<&'a Setting> {
    config.get(name).filter(|setting| !setting.value.is_empty())
}

fn words<'a>(config: &'a Config, name: &str) -> impl Iterator<Item = &'a str> {
    let value = set(config, name).map_or("", |setting| setting.value.as_str());
    value.split(',').map(str::trim).filter(|word| !word.is_empty())
}

fn profile(config: &Config) -> Result<ProfileChoice, ConfigError> {
    const NAME: &str = "CVMFS_FUSE_PROFILE";
    let Some(setting) = set(config, NAME) else { return Ok(ProfileChoice::Auto) };
    match setting.value.as_str() {
        "auto" => Ok(ProfileChoice::Auto),
        "passthrough" => Ok(ProfileChoice::Passthrough),
        "no_open" => Ok(ProfileChoice::NoOpen),
        "plain" => Ok(ProfileChoice::Plain),
        _ => Err(config.invalid(NAME, setting, "expected auto, passthrough, no_open or plain")),
    }
}

/// `CVMFS_DEADLINE`.
fn deadline(config: &Config) -> Result<Duration, ConfigError> {
    const NAME: &str = "CVMFS_DEADLINE";
    /// Longer than two time-outs and the way to another server; the watchdog counts on it.
    const MOST: i64 = 30;
    match (config.number(NAME, MOST)?, config.get(NAME)) {
        (seconds @ 1..=MOST, _) => Ok(Duration::from_secs(seconds.unsigned_abs())),
        (_, Some(setting)) => Err(config.invalid(NAME, setting, "expected seconds from 1 to 30")),
        (_, None) => Ok(Duration::from_secs(MOST.unsigned_abs())),
    }
}

/// `CVMFS_FILES_AHEAD`.
fn files_ahead(config: &Config) -> Result<usize, ConfigError> {
    const NAME: &str = "CVMFS_FILES_AHEAD";
    /// What a reader gets ahead unless said otherwise; several times the requests that one waits for on a long link.
    const USUAL: i64 = 32;
    const MOST: i64 = 256;
    match (config.number(NAME, USUAL)?, config.get(NAME)) {
        (number @ 0..=MOST, _) => Ok(usize::try_from(number).unwrap_or_default()),
        (_, Some(setting)) => Err(config.invalid(NAME, setting, "expected a number from 0 (none) to 256")),
        (_, None) => Ok(0),
    }
}

fn id_map(config: &Config, name: &str) -> Result<IdMap, ConfigError> {
    let Some(setting) = set(config, name) else { return Ok(IdMap::default()) };
    let path = config.resolve_path(&setting.value);
    IdMap::parse(&read_file(&path)?).map_err(|line| {
        let rule = format!(
            "line {line} of {} is not of the form '<repository id> <local id>', separated by blanks",
            path.display()
        );
        config.invalid(name, setting, &rule)
    })
}

/// `CVMFS_MAGIC_XATTRS_VISIBILITY`, or the switch that it replaced.
fn magic_xattrs(config: &Config) -> Result<XattrVisibility, ConfigError> {
    const NAME: &str = "CVMFS_MAGIC_XATTRS_VISIBILITY";
    match set(config, NAME) {
        Some(setting) => match setting.value.to_ascii_lowercase().as_str() {
            "rootonly" => Ok(XattrVisibility::RootOnly),
            "never" => Ok(XattrVisibility::Never),
            "always" => Ok(XattrVisibility::Always),
            _ => Err(config.invalid(NAME, setting, "expected rootonly, never or always")),
        },
        None if set(config, "CVMFS_HIDE_MAGIC_XATTRS").is_none() => Ok(XattrVisibility::RootOnly),
        None if config.switch("CVMFS_HIDE_MAGIC_XATTRS", false)? => Ok(XattrVisibility::Never),
        None => Ok(XattrVisibility::Always),
    }
}

fn privileged_gids(config: &Config) -> Result<BTreeSet<u32>, ConfigError> {
    const NAME: &str = "CVMFS_XATTR_PRIVILEGED_GIDS";
    let mut gids = BTreeSet::from([0]);
    for word in words(config, NAME) {
        match (word.parse(), config.get(NAME)) {
            (Ok(gid), _) => {
                gids.insert(gid);
            }
            (Err(_), Some(setting)) => {
                return Err(config.invalid(NAME, setting, "expected numbers of groups separated by commas"));
            }
            (Err(_), None) => {}
        }
    }
    Ok(gids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigSources;

    fn settings(overrides: &[(&str, &str)]) -> Result<KernelSettings, ConfigError> {
        let overrides =
            overrides.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let sources = ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() };
        KernelSettings::from(&Config::load("example.org", &sources).unwrap())
    }

    #[test]
    fn a_map_of_ids_has_rules_a_default_and_comments() {
        let map = IdMap::parse("# of the site\n\n1000 500\n  0   0 \n* 65534\n").unwrap();
        assert_eq!([1000, 0, 7].map(|id| map.map(id)), [500, 0, 65534]);
        assert_eq!(IdMap::parse("1 2\n").unwrap().map(9), 9, "ids without a rule stay");
        let map = IdMap::parse("0-65535 100000\n7 1\n70000-70000 5\n* 65534\n").unwrap();
        let mapped = [0, 65535, 65536, 7, 70_000].map(|id| map.map(id));
        assert_eq!(mapped, [100_000, 165_535, 65_534, 1, 5]);
        for text in ["5-4 1\n", "0-4294967295 1\n", "-5 1\n", "1- 1\n", "a-b 1\n"] {
            assert_eq!(IdMap::parse(text), Err(1), "{text:?}");
        }
        for (text, line) in [("1 2\n3\n", 2), ("1\t2\n", 1), ("1 2 3\n", 1), ("a 2\n", 1), ("1 -2\n", 1)] {
            assert_eq!(IdMap::parse(text), Err(line), "{text:?}");
        }
    }

    #[test]
    fn the_deadline_has_bounds() {
        let deadline = |value: &str| settings(&[("CVMFS_DEADLINE", value)]).map(|settings| settings.deadline);
        assert_eq!(settings(&[]).unwrap().deadline, Duration::from_secs(30));
        assert_eq!(deadline("5").unwrap(), Duration::from_secs(5));
        for wrong in ["0", "31", "-1", "soon"] {
            assert!(deadline(wrong).unwrap_err().to_string().contains("CVMFS_DEADLINE"), "{wrong}");
        }
    }

    #[test]
    fn a_map_that_cannot_be_used_fails_with_file_and_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "1000 500\nall 0\n").unwrap();
        let error = settings(&[("CVMFS_UID_MAP", file.path().to_str().unwrap())]).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("CVMFS_UID_MAP"), "{error}");
        assert!(settings(&[("CVMFS_GID_MAP", "/no/such/map")]).is_err());
    }

    #[test]
    fn attributes_are_hidden_by_the_new_name_the_old_name_or_not_at_all() {
        let visible = |overrides: &[(&str, &str)]| settings(overrides).unwrap().magic_xattrs;
        assert_eq!(visible(&[]), XattrVisibility::RootOnly);
        assert_eq!(visible(&[("CVMFS_HIDE_MAGIC_XATTRS", "yes")]), XattrVisibility::Never);
        assert_eq!(visible(&[("CVMFS_HIDE_MAGIC_XATTRS", "no")]), XattrVisibility::Always);
        let both = [("CVMFS_HIDE_MAGIC_XATTRS", "yes"), ("CVMFS_MAGIC_XATTRS_VISIBILITY", "always")];
        assert_eq!(visible(&both), XattrVisibility::Always);
        assert!(settings(&[("CVMFS_MAGIC_XATTRS_VISIBILITY", "sometimes")]).is_err());
    }

    #[test]
    fn group_0_is_always_privileged() {
        let settings = settings(&[("CVMFS_XATTR_PRIVILEGED_GIDS", "100, 200")]).unwrap();
        assert_eq!(settings.privileged_gids, BTreeSet::from([0, 100, 200]));
    }
}
