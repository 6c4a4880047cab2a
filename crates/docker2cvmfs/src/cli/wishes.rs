//! The verb `loop`.

use std::path::Path;

use cvmfs_publish::http_server::Token;

use super::arguments::{Arguments, LoopArguments};
use super::signals;
use crate::bounded::read_text;
use crate::failure::ConvertError;
use crate::progress::Progress;
use crate::wishes::{self, Bell, LoopRequest};

/// A token is a line.
const MAX_TOKEN_BYTES: u64 = 4 << 10;

/// What goes to stdout, and whether all went well.
pub(super) fn run(arguments: &Arguments, loop_: &LoopArguments) -> Result<(String, bool), ConvertError> {
    if arguments.has_registry() {
        return Err(ConvertError::Usage("--registry: a wish list names the registries itself".to_owned()));
    }
    let request = LoopRequest {
        recipe: loop_.recipe.clone(),
        storage: loop_.storage.clone(),
        keys: loop_.keys.clone(),
        mirrors: arguments.mirrors(),
        platform: loop_.platform.clone().unwrap_or_default(),
        layout: loop_.layout.layout(),
        thin_images: !loop_.skip_thin_image,
        state: loop_.state.clone(),
        spool: loop_.layout.spool.clone(),
        policy: loop_.layout.policy.clone(),
        spool_limit: loop_.spool_limit << 30,
        parallel: usize::from(loop_.parallel),
        grace: loop_.grace,
        collect: !loop_.no_gc,
        dry_run: loop_.dry_run,
        interval: (!loop_.once && !loop_.dry_run).then_some(loop_.interval),
        listen: loop_.listen,
        token: loop_.token_file.as_deref().map(read_token).transpose()?,
    };
    let bell = Bell::default();
    signals::stop_on_signal(&bell);
    // Lines of single layers are too much for thousands of images.
    let is_quiet = arguments.json || request.interval.is_some();
    let progress = if is_quiet { Progress::silent() } else { Progress::on_stderr() };
    let is_daemon = request.interval.is_some();
    let report = match wishes::run(&request, &bell, &progress) {
        // A daemon that was told to end does what it was told.
        Err(error) if is_daemon && error.is_interruption() => return Ok((String::new(), true)),
        result => result?,
    };
    if is_daemon {
        return Ok((String::new(), true));
    }
    let text = if arguments.json {
        let text =
            serde_json::to_string(&report).expect("strings, numbers and lists always have a JSON form");
        format!("{text}\n")
    } else {
        report.to_text()
    };
    Ok((text, report.is_good()))
}

fn read_token(file: &Path) -> Result<Token, ConvertError> {
    let failed = |reason: String| ConvertError::Usage(format!("--token-file {}: {reason}", file.display()));
    let text = read_text(file, MAX_TOKEN_BYTES).map_err(failed)?;
    let token = text.trim();
    if token.is_empty() {
        return Err(failed("is empty".to_owned()));
    }
    Ok(Token::new(token))
}
