//! The comma separated options of `-o`.

use std::path::{Path, PathBuf};

use cvmfs_client::config::ConfigSources;

use crate::cli::Usage;

/// Options of fstab and mount(8) that mean nothing here and must not be refused.
const IGNORED: [&str; 31] = [
    "_netdev",
    "async",
    "auto",
    "atime",
    "defaults",
    "dev",
    "exec",
    "group",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "nofail",
    "nosuid",
    "nouser",
    "owner",
    "relatime",
    "ro",
    "system_mount",
    "user",
    "users",
    "allow_root",
    "debug",
    "default_permissions",
    "disable_watchdog",
    "foreground",
    "fuse_debug",
    "nonempty",
    "rw",
    "simple_options_parsing",
    "grab_mountpoint",
];

/// Parsed mount options.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    pub(crate) files: Option<Vec<PathBuf>>,
    pub(crate) overrides: Vec<(String, String)>,
    pub(crate) layer_view: bool,
    pub(crate) allow_other: bool,
    pub(crate) suid: bool,
    pub(crate) remount: bool,
}

impl MountOptions {
    /// Parses the values of all `-o`. A comma inside a value is written `\,`.
    pub(crate) fn parse(given: &[String]) -> Result<MountOptions, Usage> {
        let mut options = MountOptions::default();
        for option in given.iter().flat_map(|list| split(list)).filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("config", files)) => {
                    let files = files.split(':').filter(|file| !file.is_empty()).map(PathBuf::from);
                    options.files = Some(files.collect());
                }
                Some((key, value)) if key.starts_with("CVMFS_") => {
                    options.overrides.push((key.to_owned(), value.to_owned()));
                }
                Some((key, _)) if ["fsname", "uid", "gid", "libfuse", "comment"].contains(&key) => {}
                Some((key, _)) if key.starts_with("x-") => {}
                None if option == "remount" => options.remount = true,
                None if option == "layer_view" => options.layer_view = true,
                None if option == "allow_other" => options.allow_other = true,
                None if option == "cvmfs_suid" || option == "suid" => options.suid = true,
                None if IGNORED.contains(&option.as_str()) || option.starts_with("x-") => {}
                _ => {
                    return Err(Usage(format!(
                        "unknown mount option '{option}'; see `cvmfs-client mount --help`"
                    )));
                }
            }
        }
        Ok(options)
    }

    /// Where the configuration comes from.
    pub(crate) fn sources(&self, directory: &Path) -> ConfigSources {
        ConfigSources {
            directory: directory.to_owned(),
            // The process that holds the mount works in another directory.
            files: self.files.as_ref().map(|files| files.iter().map(|file| absolute(file)).collect()),
            overrides: self.overrides.clone(),
        }
    }
}

fn absolute(file: &Path) -> PathBuf {
    std::path::absolute(file).unwrap_or_else(|_| file.to_owned())
}

fn split(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = list.chars().peekable();
    while let Some(character) = characters.next() {
        match (character, parts.last_mut()) {
            ('\\', Some(part)) if characters.peek() == Some(&',') => {
                part.push(',');
                characters.next();
            }
            (',', _) => parts.push(String::new()),
            (other, Some(part)) => part.push(other),
            (_, None) => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MountOptions, Usage> {
        MountOptions::parse(&[text.to_owned()])
    }

    #[test]
    fn options_of_fstab_configuration_and_parameters_are_told_apart() {
        let options =
            parse("ro,_netdev,config=/a:/b,layer_view,CVMFS_TIMEOUT=3,x-systemd.automount").unwrap();
        assert_eq!(options.files, Some(vec!["/a".into(), "/b".into()]));
        assert_eq!(options.overrides, [("CVMFS_TIMEOUT".to_owned(), "3".to_owned())]);
        assert!(options.layer_view && !options.suid);
    }

    #[test]
    fn a_comma_can_be_part_of_a_value() {
        let options = parse("CVMFS_X=a\\,b,ro").unwrap();
        assert_eq!(options.overrides, [("CVMFS_X".to_owned(), "a,b".to_owned())]);
    }

    #[test]
    fn a_misspelt_option_is_named() {
        assert!(parse("layerview").unwrap_err().to_string().contains("layerview"));
    }
}
