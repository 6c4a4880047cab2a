//! How the client's processes shall live on the machine (client behaviour §2.1).

use serde::{Deserialize, Serialize};

use super::{Config, ConfigError};

/// Descriptors to ask for if nothing is configured: what the distributed configuration has.
const OPEN_FILES: i64 = 131_072;
/// Descriptors for the client itself, beyond those for opened files.
const RESERVED: i64 = 512;
/// CPUs are numbered below this.
const MAX_CPUS: usize = 1024;

/// What the processes of a mount do to themselves before they start to work. Crosses process boundaries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSettings {
    /// Open files to ask for (`CVMFS_NFILES` and a reserve).
    pub open_files: u64,
    /// CPUs to run on; all if there are none (`CVMFS_CPU_AFFINITY`).
    pub cpus: Vec<usize>,
    /// What the kernel is told of how dispensable they are (`CVMFS_OOM_SCORE_ADJ`).
    pub oom_score_adj: Option<i32>,
    /// Whether an init system that shuts down spares them (`CVMFS_SYSTEMD_NOKILL`).
    pub spared_at_shutdown: bool,
}

impl Default for ProcessSettings {
    fn default() -> Self {
        let open_files = (OPEN_FILES + RESERVED).unsigned_abs();
        Self { open_files, cpus: Vec::new(), oom_score_adj: None, spared_at_shutdown: false }
    }
}

impl ProcessSettings {
    /// Gives the values of `config` their types.
    ///
    /// # Errors
    /// A wrong value, with the place to mend it.
    pub fn from(config: &Config) -> Result<Self, ConfigError> {
        let open_files = config.number("CVMFS_NFILES", OPEN_FILES)?.clamp(1, i64::from(u32::MAX));
        Ok(Self {
            open_files: (open_files + RESERVED).unsigned_abs(),
            cpus: cpus(config)?,
            oom_score_adj: oom_score_adj(config)?,
            spared_at_shutdown: config.switch("CVMFS_SYSTEMD_NOKILL", false)?,
        })
    }
}

fn cpus(config: &Config) -> Result<Vec<usize>, ConfigError> {
    const NAME: &str = "CVMFS_CPU_AFFINITY";
    let Some(setting) = config.get(NAME).filter(|setting| !setting.value.is_empty()) else {
        return Ok(Vec::new());
    };
    let numbers = setting.value.split(',').map(|number| number.trim().parse().ok());
    let cpus: Option<Vec<usize>> = numbers.map(|cpu| cpu.filter(|cpu| *cpu < MAX_CPUS)).collect();
    cpus.ok_or_else(|| config.invalid(NAME, setting, "expected numbers of CPUs separated by ','"))
}

fn oom_score_adj(config: &Config) -> Result<Option<i32>, ConfigError> {
    const NAME: &str = "CVMFS_OOM_SCORE_ADJ";
    match config.get(NAME).filter(|setting| !setting.value.is_empty()) {
        Some(setting) => match setting.value.parse() {
            Ok(score @ -1000..=1000) => Ok(Some(score)),
            _ => Err(config.invalid(NAME, setting, "expected a number from -1000 to 1000")),
        },
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigSources;

    fn settings(options: &[(&str, &str)]) -> Result<ProcessSettings, ConfigError> {
        let overrides = options.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let sources = ConfigSources { files: Some(Vec::new()), overrides, ..ConfigSources::default() };
        ProcessSettings::from(&Config::load("a.example.org", &sources).unwrap())
    }

    #[test]
    fn limits_and_placement_of_the_processes_are_read() {
        assert_eq!(settings(&[]).unwrap(), ProcessSettings::default());
        let options = [
            ("CVMFS_NFILES", "65536"),
            ("CVMFS_CPU_AFFINITY", "0, 3"),
            ("CVMFS_OOM_SCORE_ADJ", "-500"),
            ("CVMFS_SYSTEMD_NOKILL", "yes"),
        ];
        let expected = ProcessSettings {
            open_files: 66_048,
            cpus: vec![0, 3],
            oom_score_adj: Some(-500),
            spared_at_shutdown: true,
        };
        assert_eq!(settings(&options).unwrap(), expected);
        for bad in
            [("CVMFS_CPU_AFFINITY", "0-3"), ("CVMFS_CPU_AFFINITY", "5000"), ("CVMFS_OOM_SCORE_ADJ", "1001")]
        {
            assert!(settings(&[bad]).unwrap_err().to_string().contains(bad.0));
        }
    }
}
