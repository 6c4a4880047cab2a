//! How authorisation helpers are found and started (client behaviour §2.5, §13).

use super::{Config, ConfigError};
use crate::authz::AuthorizationSettings;

/// Prefix of the parameters that become the helper's environment.
const PREFIX: &str = "CVMFS_AUTHZ_";

pub(super) fn authorization(config: &Config) -> Result<AuthorizationSettings, ConfigError> {
    let path = |name| {
        config
            .get(name)
            .filter(|setting| !setting.value.is_empty())
            .map(|setting| config.resolve_path(&setting.value))
    };
    let environment = config.iter().filter_map(|(name, setting)| {
        let name = name.strip_prefix(PREFIX).filter(|name| !name.is_empty())?;
        Some((name.to_owned(), setting.value.clone()))
    });
    Ok(AuthorizationSettings {
        helper: path("CVMFS_AUTHZ_HELPER"),
        search_path: path("CVMFS_AUTHZ_SEARCH_PATH").unwrap_or_else(|| "/usr/libexec/cvmfs/authz".into()),
        environment: environment.collect(),
        syslog_facility: config.number("CVMFS_SYSLOG_FACILITY", -1)?,
        syslog_level: config.number("CVMFS_SYSLOG_LEVEL", 0)?,
        debug_log: path("CVMFS_DEBUGLOG"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigSources;

    #[test]
    fn parameters_of_helpers_become_their_environment() {
        let overrides = [
            ("CVMFS_AUTHZ_HELPER", "/opt/helper"),
            ("CVMFS_AUTHZ_X509_CERT_DIR", "/certs"),
            ("CVMFS_TIMEOUT", "5"),
        ];
        let overrides = overrides.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let sources = ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() };
        let config = Config::load("a.example.org", &sources).unwrap();
        assert_eq!(config.notices(), [], "they are known");
        let settings = authorization(&config).unwrap();
        assert_eq!(settings.helper.unwrap(), std::path::Path::new("/opt/helper"));
        assert_eq!(settings.search_path, std::path::Path::new("/usr/libexec/cvmfs/authz"));
        let expected = [("HELPER", "/opt/helper"), ("X509_CERT_DIR", "/certs")];
        assert_eq!(settings.environment, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}
