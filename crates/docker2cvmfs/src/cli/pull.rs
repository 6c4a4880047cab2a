//! `pull`: layers as files in a directory, or published in a repository.

use std::fs;
use std::io;
use std::path::Path;

use registry::RegistryError;
use tempfile::NamedTempFile;

use super::arguments::{Arguments, PullArguments};
use super::{inspect, publish};
use crate::convert::{ConvertRequest, resolve};
use crate::failure::ConvertError;
use crate::policy::Policy;
use crate::progress::Progress;

pub(super) fn pull(arguments: &Arguments, pull: &PullArguments) -> Result<String, ConvertError> {
    match (&pull.directory, &pull.repository, &pull.storage, &pull.keys) {
        (Some(directory), ..) => into_directory(arguments, pull, directory),
        (None, Some(fqrn), Some(storage), Some(keys)) => publish::run(
            arguments,
            &ConvertRequest {
                image: arguments.image(&pull.image.image)?,
                origin: None,
                platform: publish::choice(&pull.image.platform),
                fqrn: fqrn.clone(),
                storage: storage.clone(),
                keys: keys.clone(),
                layout: pull.layout.layout(),
                output: None,
                spool: pull.layout.spool.clone(),
                policy: pull.layout.policy.clone(),
                dry_run: false,
            },
        ),
        _ => {
            Err(ConvertError::Usage("give a directory, or --repository with --storage and --keys".to_owned()))
        }
    }
}

/// One file per layer, `<digest>.tar.gz` whatever the compression: scripts cut that
/// suffix off to get the digest, and tar finds out about the compression by itself.
fn into_directory(
    arguments: &Arguments,
    pull: &PullArguments,
    directory: &Path,
) -> Result<String, ConvertError> {
    let policy = pull.layout.policy.as_deref().map(Policy::read).transpose()?;
    let source = inspect::open(arguments, &pull.image)?;
    let image = match policy {
        None => source.image(&inspect::platform(&pull.image))?,
        // What was checked is what is fetched: the name is asked for once.
        Some(policy) => {
            let resolved = resolve(&source, &publish::choice(&pull.image.platform))?;
            policy.check(&resolved)?;
            resolved.only_image().image.clone()
        }
    };
    let progress = if arguments.json { Progress::silent() } else { Progress::on_stderr() };
    fs::create_dir_all(directory)
        .map_err(|cause| ConvertError::Output { file: directory.to_owned(), cause })?;
    let mut files = Vec::new();
    for blob in &image.manifest.layers {
        let file = directory.join(format!("{}.tar.gz", blob.digest.hex()));
        let failed = |cause| ConvertError::Output { file: file.clone(), cause };
        // A file appears under its name only when it is whole and verified.
        if !fs::metadata(&file).is_ok_and(|found| found.is_file() && found.len() == blob.size) {
            let meter = progress.layer(blob);
            let mut temporary = NamedTempFile::new_in(directory).map_err(failed)?;
            let mut reader = source.layer(blob)?;
            copy(&mut reader, temporary.as_file_mut()).map_err(|fault| match fault {
                Fault::Registry(error) => error.into(),
                Fault::Local(cause) => failed(cause),
            })?;
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            temporary.as_file().set_permissions(permissions).map_err(failed)?;
            temporary.persist(&file).map_err(|error| failed(error.error))?;
            meter.finish();
        }
        files.push(file.display().to_string());
    }
    if arguments.json {
        let report = serde_json::json!({"image": source.name().to_string(), "digest": image.digest.to_string(), "files": files});
        return Ok(format!("{report}\n"));
    }
    Ok(files.iter().map(|file| format!("{file}\n")).collect())
}

enum Fault {
    Registry(RegistryError),
    Local(io::Error),
}

fn copy(reader: &mut dyn io::Read, file: &mut fs::File) -> Result<(), Fault> {
    io::copy(reader, file).map(drop).map_err(|error| match error.downcast::<RegistryError>() {
        Ok(error) => Fault::Registry(error),
        Err(error) => Fault::Local(error),
    })
}
