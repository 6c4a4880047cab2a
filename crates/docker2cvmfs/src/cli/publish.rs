//! The verbs that publish: `convert` and `make-thin`.

use cvmfs_publish::Interrupt;
use registry::{Client, ClientSettings, ImageSource, Reference};

use super::arguments::{Arguments, ConvertArguments, MakeThinArguments, PlatformArgument};
use super::signals;
use crate::convert::{Conversion, ConvertRequest, Output, PlatformChoice};
use crate::failure::ConvertError;
use crate::progress::Progress;

pub(super) fn convert(arguments: &Arguments, convert: &ConvertArguments) -> Result<String, ConvertError> {
    let image = arguments.image(&convert.image)?;
    let output = match (&convert.output, &convert.output_archive) {
        (Some(reference), _) => Some(Output::Registry(reference.clone())),
        (None, Some(file)) => {
            let name = match &convert.name {
                Some(name) => name.clone(),
                None => thin_name(&image)?,
            };
            Some(Output::DockerArchive { file: file.clone(), name })
        }
        (None, None) => None,
    };
    let request = ConvertRequest {
        image,
        origin: None,
        platform: convert.platform.clone().unwrap_or_default(),
        fqrn: convert.repository.clone(),
        storage: convert.storage.clone(),
        keys: convert.keys.clone(),
        layout: convert.layout.layout(),
        output,
        spool: convert.layout.spool.clone(),
        policy: convert.layout.policy.clone(),
        dry_run: convert.dry_run,
    };
    run(arguments, &request)
}

pub(super) fn make_thin(
    arguments: &Arguments,
    make_thin: &MakeThinArguments,
) -> Result<String, ConvertError> {
    let fqrn = make_thin.repository.clone();
    let request = ConvertRequest {
        image: arguments.image(&make_thin.input_reference)?,
        origin: Some(arguments.original_origin(&make_thin.input_reference)?),
        platform: choice(&make_thin.platform),
        storage: make_thin.storage.clone().unwrap_or_else(|| format!("/srv/cvmfs/{fqrn}")),
        fqrn,
        keys: make_thin.keys.clone(),
        layout: make_thin.layout.layout(),
        output: Some(Output::Docker { name: make_thin.output_reference.clone() }),
        spool: make_thin.layout.spool.clone(),
        policy: make_thin.layout.policy.clone(),
        dry_run: false,
    };
    run(arguments, &request)
}

pub(super) fn run(arguments: &Arguments, request: &ConvertRequest) -> Result<String, ConvertError> {
    let source = arguments.source_client()?;
    let target = Client::new(ClientSettings::default())?;
    let interrupt = Interrupt::default();
    signals::cancel_on_signal(&[source.canceller(), target.canceller()], Some(&interrupt));
    let progress = if arguments.json { Progress::silent() } else { Progress::on_stderr() };
    let conversion =
        Conversion { source: &source, target: &target, progress: &progress, interrupt: &interrupt };
    let report = conversion.run(request)?;
    if arguments.json {
        let text =
            serde_json::to_string(&report).expect("strings, numbers and lists always have a JSON form");
        return Ok(format!("{text}\n"));
    }
    Ok(report.to_text())
}

pub(super) fn choice(platform: &PlatformArgument) -> PlatformChoice {
    platform.platform.clone().map_or(PlatformChoice::Host, PlatformChoice::One)
}

/// The conventional name of a thin image: `_thin` behind the repository.
fn thin_name(image: &ImageSource) -> Result<Reference, ConvertError> {
    let reference = match image {
        ImageSource::Registry(reference) => Some(reference.clone()),
        ImageSource::DockerArchive { name, .. } | ImageSource::OciDirectory { name, .. } => {
            name.as_deref().and_then(|name| name.parse().ok())
        }
    };
    let Some(reference) = reference else {
        return Err(ConvertError::Usage(format!(
            "{image} has no name to derive one from: give --name NAME:TAG"
        )));
    };
    Ok(Reference { repository: format!("{}_thin", reference.repository), digest: None, ..reference })
}
