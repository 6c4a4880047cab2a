//! The verbs that publish: `convert` and `make-thin`.

use cvmfs_publish::Interrupt;
use registry::{Client, ClientSettings, Reference};

use super::arguments::{Arguments, ConvertArguments, LayoutArguments, MakeThinArguments};
use super::signals;
use crate::convert::{Conversion, ConvertRequest, Output};
use crate::failure::ConvertError;
use crate::progress::Progress;

pub(super) fn convert(arguments: &Arguments, convert: &ConvertArguments) -> Result<String, ConvertError> {
    let image = arguments.image(&convert.image)?;
    let output = match (&convert.output, &convert.output_archive) {
        (Some(reference), _) => Some(Output::Registry(reference.clone())),
        (None, Some(file)) => {
            let name = convert.name.clone().unwrap_or_else(|| thin_name(&image));
            Some(Output::DockerArchive { file: file.clone(), name })
        }
        (None, None) => None,
    };
    let request = ConvertRequest {
        image,
        origin: None,
        platform: convert.platform.platform.clone(),
        fqrn: convert.repository.clone(),
        storage: convert.storage.clone(),
        keys: convert.keys.clone(),
        subdirectory: subdirectory(&convert.layout),
        output,
        spool: convert.layout.spool.clone(),
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
        platform: make_thin.platform.platform.clone(),
        storage: make_thin.storage.clone().unwrap_or_else(|| format!("/srv/cvmfs/{fqrn}")),
        fqrn,
        keys: make_thin.keys.clone(),
        subdirectory: subdirectory(&make_thin.layout),
        output: Some(Output::Docker { name: make_thin.output_reference.clone() }),
        spool: make_thin.layout.spool.clone(),
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

/// Slashes at the ends do not matter: the original's default is `layers/`.
pub(super) fn subdirectory(layout: &LayoutArguments) -> String {
    layout.subdirectory.trim_matches('/').to_owned()
}

/// The conventional name of a thin image: `_thin` behind the repository.
fn thin_name(image: &Reference) -> Reference {
    Reference { repository: format!("{}_thin", image.repository), digest: None, ..image.clone() }
}
