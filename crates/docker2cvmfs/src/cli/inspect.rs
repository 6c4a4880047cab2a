//! The verbs that only look: `manifest`, `config`, `thin`.

use registry::{Descriptor, Image, Platform, Source};
use serde::Serialize;
use thin_image::{Location, ThinImage, ThinLayer};

use super::arguments::{Arguments, ImageArguments, ThinArguments};
use super::signals;
use crate::failure::ConvertError;
use crate::spool;

/// The manifest in the form of the original: the names of Go's fields, one blank of
/// indentation.
pub(super) fn manifest(arguments: &Arguments, image: &ImageArguments) -> Result<String, ConvertError> {
    let (_, image) = fetch(arguments, image)?;
    let blob = |blob: &Descriptor| PrintedBlob {
        media_type: blob.media_type.clone(),
        size: blob.size,
        digest: blob.digest.to_string(),
    };
    let printed = PrintedManifest {
        schema_version: 2,
        media_type: image.manifest.media_type.clone(),
        config: blob(&image.manifest.config),
        layers: image.manifest.layers.iter().map(blob).collect(),
    };
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    printed.serialize(&mut serializer).expect("strings, numbers and lists always have a JSON form");
    text.push(b'\n');
    Ok(String::from_utf8(text).expect("JSON is UTF-8"))
}

/// The configuration blob as it is.
pub(super) fn config(arguments: &Arguments, image: &ImageArguments) -> Result<String, ConvertError> {
    let (source, image) = fetch(arguments, image)?;
    let (bytes, _) = source.config(&image.manifest)?;
    // A parsed JSON document is UTF-8.
    Ok(format!("{}\n", String::from_utf8_lossy(&bytes)))
}

/// The descriptor of an image whose layers are below `place`.
pub(super) fn thin(arguments: &Arguments, thin: &ThinArguments) -> Result<String, ConvertError> {
    let (fqrn, prefix) = split_place(&thin.place)?;
    let origin = arguments.original_origin(&thin.image.image)?;
    let (_, image) = fetch(arguments, &thin.image)?;
    let layer = |blob: &Descriptor| {
        let path =
            [prefix, blob.digest.hex()].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>();
        let location = Location::new(fqrn, &path.join("/"))
            .map_err(|rule| ConvertError::Usage(format!("{} cannot hold layers: {rule}", thin.place)))?;
        Ok(ThinLayer::new(blob.digest.hex(), location).expect("digests of registries are hexadecimal"))
    };
    let layers = image.manifest.layers.iter().map(layer).collect::<Result<_, ConvertError>>()?;
    Ok(format!("{}\n", ThinImage::new(Some(origin), layers)?.to_json()))
}

/// Where an image comes from.
pub(super) fn open(arguments: &Arguments, image: &ImageArguments) -> Result<Source, ConvertError> {
    let client = arguments.source_client()?;
    signals::cancel_on_signal(&[client.canceller()], None);
    Ok(Source::open(&arguments.image(&image.image)?, &client, &spool::directory(None))?)
}

/// The platform that was asked for, else this machine's.
pub(super) fn platform(image: &ImageArguments) -> Platform {
    image.platform.platform.clone().unwrap_or_else(Platform::host)
}

fn fetch(arguments: &Arguments, image: &ImageArguments) -> Result<(Source, Image), ConvertError> {
    let source = open(arguments, image)?;
    let found = source.image(&platform(image))?;
    Ok((source, found))
}

fn split_place(place: &str) -> Result<(&str, &str), ConvertError> {
    let place = place.trim_end_matches('/');
    let (fqrn, prefix) = place.split_once('/').unwrap_or((place, ""));
    Location::new(fqrn, "layers").map_err(|rule| {
        ConvertError::Usage(format!("{place} is not of the form REPOSITORY/DIRECTORY: {rule}"))
    })?;
    Ok((fqrn, prefix))
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct PrintedManifest {
    schema_version: u32,
    media_type: String,
    config: PrintedBlob,
    layers: Vec<PrintedBlob>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct PrintedBlob {
    media_type: String,
    size: u64,
    digest: String,
}
