//! A thin image as file for `docker load`.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use layer_tar::{AbsoluteNames, LayerEntryMeta, LayerPath, LayerWriter, WriteError};
use registry::{Digest, Reference};
use serde_json::json;
use tempfile::NamedTempFile;

use super::ThinImageBlobs;

/// Writes the docker-archive `file`, which loads the image under `name`. The file
/// appears whole or not at all.
///
/// # Errors
/// Those of the file system.
pub fn write_docker_archive(image: &ThinImageBlobs, name: &Reference, file: &Path) -> io::Result<()> {
    let mut temporary = NamedTempFile::new_in(directory_of(file))?;
    write(image, name, temporary.as_file_mut()).map_err(io::Error::other)?;
    temporary.as_file().sync_all()?;
    // The file is for others too, as if it had been created in place.
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    temporary.as_file().set_permissions(permissions)?;
    temporary.persist(file).map_err(|error| error.error)?;
    Ok(())
}

/// The directory that a file is to appear in.
pub(crate) fn directory_of(file: &Path) -> PathBuf {
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.map_or_else(|| PathBuf::from("."), Path::to_owned)
}

fn write(image: &ThinImageBlobs, name: &Reference, output: &mut File) -> Result<(), WriteError> {
    let config_name = format!("{}.json", Digest::sha256_of(&image.config).hex());
    let layer_name = format!("{}.tar", Digest::sha256_of(&image.layer_tar).hex());
    let tag = name.tag.as_deref().unwrap_or("latest");
    let tag = format!("{}/{}:{tag}", name.registry, name.repository);
    let manifest = json!([{"Config": config_name, "RepoTags": [tag], "Layers": [layer_name]}]);
    let mut archive = LayerWriter::new(BufWriter::new(output));
    for (name, content) in [
        (config_name.as_str(), image.config.as_slice()),
        (layer_name.as_str(), image.layer_tar.as_slice()),
        ("manifest.json", manifest.to_string().as_bytes()),
    ] {
        let path = LayerPath::parse(name.as_bytes(), AbsoluteNames::default());
        let path = path.expect("names of hexadecimal digits and a suffix are valid paths");
        let meta = LayerEntryMeta { path, mode: 0o644, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        archive.append_file(&meta, content.len() as u64, content)?;
    }
    let mut buffer = archive.finish()?;
    buffer.flush().map_err(|source| WriteError::Output { entry: "manifest.json".to_owned(), source })
}
