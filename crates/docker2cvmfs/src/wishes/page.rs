//! The status as JSON, as HTML and as metrics.

use std::fmt::Write as _;

use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::report::{ImageState, RoundReport};
use super::rfc3339;
use super::server::{Phase, State};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;\
color:#222;background:#fff}table{border-collapse:collapse;width:100%;margin:.5rem 0 2rem}\
th,td{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #ddd;vertical-align:top;\
overflow-wrap:anywhere}td.n,th.n{text-align:right;white-space:nowrap}.bad{color:#b00020}\
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}th,td{border-color:#444}.bad{color:#ff7a85}}";

/// What is wrong with the loop itself; failures of single images are not.
pub(super) fn trouble(state: &State) -> Option<String> {
    let round = state.history.rounds.first()?;
    round.errors.first().cloned()
}

pub(super) fn json(state: &State) -> Value {
    let (phase, time) = phase(state);
    let image = |record: &super::records::ImageRecord| {
        json!({
            "image": record.image,
            "digest": record.digest,
            "platform": record.platform,
            "output": record.output.as_ref().map(|output| &output.reference),
            "revision": record.revision,
            "converted": rfc3339(record.converted),
            "layers": record.layers.len(),
            "bytes": record.bytes(),
            "bytes_downloaded": record.bytes_downloaded,
            "bytes_shared": record.bytes().saturating_sub(record.bytes_downloaded),
        })
    };
    json!({
        "fqrn": state.fqrn,
        "recipe": state.recipe.display().to_string(),
        "state": phase,
        "since_or_until": time,
        "trouble": trouble(state),
        "images": state.images.iter().map(image).collect::<Vec<_>>(),
        "rounds": state.history.rounds,
        "totals": state.history.totals,
    })
}

pub(super) fn metrics(state: &State) -> String {
    let mut page = String::new();
    let mut add = |name: &str, kind: &str, help: &str, value: f64| {
        let name = format!("docker2cvmfs_{name}");
        // Writing to a text cannot fail.
        let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    };
    // Counters up to 2^53 are exact.
    let count = |value: u64| value as f64;
    let last = state.history.rounds.first();
    let of_last = |get: fn(&RoundReport) -> u64| last.map_or(0.0, |round| count(get(round)));
    let totals = &state.history.totals;
    add("up", "gauge", "1 unless the last round did not end", f64::from(u8::from(trouble(state).is_none())));
    add(
        "round_running",
        "gauge",
        "Whether a round runs",
        f64::from(u8::from(matches!(state.phase, Phase::Running(_)))),
    );
    add("images", "gauge", "Images that are in the repository", count(state.images.len() as u64));
    add("images_wished", "gauge", "Images wished for in the last round", of_last(|round| round.wished));
    add("images_failed", "gauge", "Images that failed in the last round", of_last(|round| round.failed));
    add("round_seconds", "gauge", "How long the last round took", last.map_or(0.0, |round| round.seconds));
    add(
        "revision",
        "gauge",
        "Revision of the repository after the last round",
        of_last(|round| round.revision),
    );
    add("rounds_total", "counter", "Rounds", count(totals.rounds));
    add("converted_total", "counter", "Images converted", count(totals.converted));
    add("failed_total", "counter", "Conversions that failed", count(totals.failed));
    add("layers_removed_total", "counter", "Layers removed after their grace", count(totals.layers_removed));
    add(
        "objects_collected_total",
        "counter",
        "Objects deleted by collections",
        count(totals.objects_collected),
    );
    add("downloaded_bytes_total", "counter", "Bytes of layers fetched", count(totals.bytes_downloaded));
    add("stored_bytes_total", "counter", "Stored bytes of new objects", count(totals.bytes_stored));
    add("notifications_total", "counter", "Notifications since the start", count(state.notifications));
    page
}

pub(super) fn html(state: &State) -> String {
    let (phase, time) = phase(state);
    let mut page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>{fqrn}</title><style>{STYLE}</style><h1>{fqrn}</h1><p>{} images from {}; {} {time}.</p>",
        state.images.len(),
        escaped(&state.recipe.display().to_string()),
        if phase == "running" { "a round runs since" } else { "next round at" },
        fqrn = escaped(&state.fqrn),
    );
    if let Some(trouble) = trouble(state) {
        let _ = write!(page, "<p class=bad>The last round did not end: {}</p>", escaped(&trouble));
    }
    page.push_str(
        "<h2>Rounds</h2><table><tr><th>Begin<th>Cause<th class=n>Wished<th class=n>Unchanged<th class=n>Converted\
         <th class=n>Failed<th class=n>Fetched<th class=n>Stored<th class=n>Revision<th class=n>Time</tr>",
    );
    for round in &state.history.rounds {
        let _ = write!(
            page,
            "<tr><td>{}<td>{}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}\
             <td class=n>{}<td class=n>{:.1} s</tr>",
            escaped(&round.started),
            escaped(&round.cause),
            round.wished,
            round.unchanged,
            round.converted,
            round.failed,
            HumanBytes(round.bytes_downloaded),
            HumanBytes(round.bytes_stored),
            round.revision,
            round.seconds
        );
    }
    page.push_str("</table>");
    let failures = |round: &RoundReport| {
        let failed = round.images.iter().filter(|image| image.state == ImageState::Failed);
        failed.map(|image| (image.image.clone(), image.error.clone().unwrap_or_default())).collect::<Vec<_>>()
    };
    let failures = state.history.rounds.first().map(failures).unwrap_or_default();
    if !failures.is_empty() {
        page.push_str("<h2>Failed in the last round</h2><table><tr><th>Image<th>Reason</tr>");
        for (image, error) in failures {
            let _ = write!(page, "<tr><td>{}<td class=bad>{}</tr>", escaped(&image), escaped(&error));
        }
        page.push_str("</table>");
    }
    page.push_str(
        "<h2>Images</h2><table><tr><th>Image<th>Thin image<th>Converted<th class=n>Layers<th class=n>Size\
         <th class=n>Shared<th class=n>Revision</tr>",
    );
    for record in state.images.iter() {
        let bytes = record.bytes();
        let _ = write!(
            page,
            "<tr><td>{}<td>{}<td>{}<td class=n>{}<td class=n>{}<td class=n>{}<td class=n>{}</tr>",
            escaped(&record.image),
            escaped(record.output.as_ref().map_or("", |output| &output.reference)),
            rfc3339(record.converted),
            record.layers.len(),
            HumanBytes(bytes),
            HumanBytes(bytes.saturating_sub(record.bytes_downloaded)),
            record.revision
        );
    }
    page.push_str("</table></html>\n");
    page
}

fn phase(state: &State) -> (&'static str, String) {
    match state.phase {
        Phase::Running(since) => ("running", rfc3339(since)),
        Phase::Waiting(until) => ("waiting", rfc3339(until)),
    }
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}
