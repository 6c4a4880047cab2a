//! `cvmfs-client config`: the effective value and the origin of each parameter.

use std::path::Path;
use std::process::ExitCode;

use cvmfs_client::config::{ClientSettings, Config, ConfigError, ConfigSources};
use cvmfs_client::error::ClientError;

use super::{CONFIGURATION, Usage};
use crate::control::ControlSettings;
use crate::logging;
use crate::logging::redaction::redacted;
use crate::mount_options::MountOptions;

/// Where the options of a command line say that the configuration comes from.
pub(super) fn sources_of(options: &[String]) -> Result<ConfigSources, Usage> {
    Ok(MountOptions::parse(options)?.sources(Path::new(CONFIGURATION)))
}

/// What prevents a mount with this configuration, one error per part of it.
pub(super) fn errors_of(config: &Config) -> Vec<ConfigError> {
    let parts = [
        ClientSettings::from(config).map(drop),
        ControlSettings::from(config).map(drop),
        logging::check_settings(config),
    ];
    parts.into_iter().filter_map(Result::err).collect()
}

/// Shows the configuration; fails if a mount would.
pub(super) fn config(json: bool, fqrn: &str, options: &[String]) -> anyhow::Result<ExitCode> {
    let config = Config::load(fqrn, &sources_of(options)?).map_err(ClientError::from)?;
    let errors: Vec<String> = errors_of(&config).iter().map(|error| redacted(&error.to_string())).collect();
    if json {
        let parameters: serde_json::Map<_, _> = config
            .iter()
            .map(|(key, setting)| {
                let value = redacted(&setting.value);
                (key.to_owned(), serde_json::json!({"value": value, "origin": setting.origin.to_string()}))
            })
            .collect();
        let problems: Vec<String> =
            config.notices().iter().map(|notice| redacted(&notice.to_string())).collect();
        let document = serde_json::json!({"fqrn": fqrn, "parameters": parameters, "problems": problems, "errors": errors});
        println!("{document}");
    } else {
        for (key, setting) in config.iter() {
            println!("{key}={}    # from {}", redacted(&setting.value), setting.origin);
        }
        for problem in config.notices() {
            eprintln!("cvmfs-client: {}", redacted(&problem.to_string()));
        }
        for error in &errors {
            eprintln!("cvmfs-client: {error}");
        }
    }
    Ok(if errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
