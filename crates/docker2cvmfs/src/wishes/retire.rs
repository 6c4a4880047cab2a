//! What left the list: kept for the grace, then removed from the repository.

use std::collections::{BTreeSet, HashSet};

use cvmfs_publish::collect::CollectOptions;
use registry::Reference;

use super::expand::Expanded;
use super::records::RetiredRecord;
use super::report::{ImageState, RoundReport};
use super::round::Round;
use crate::convert::{Ingest, METADATA, PodmanStore};
use crate::failure::ConvertError;

/// Retires images that nobody wishes for, removes layers whose grace is over, and
/// collects what only they referred to.
pub(super) fn unwished(
    round: &Round<'_>,
    expanded: &Expanded<'_>,
    report: &mut RoundReport,
) -> Result<(), ConvertError> {
    let now = cvmfs_publish::system_clock();
    let wished: HashSet<String> = expanded.images.iter().map(|image| image.reference.to_string()).collect();
    let mut kept = HashSet::new();
    let (images, mut retired) = round.records.everything()?;
    let known: HashSet<String> = images.iter().map(|record| record.image.clone()).collect();
    for record in images {
        if wished.contains(&record.image) || may_be_wished(&record.image, expanded) {
            kept.extend(record.paths().map(str::to_owned));
            continue;
        }
        report.retired += 1;
        tracing::info!(image = record.image, grace_days = round.request.grace.as_secs() / 86_400, "retired");
        if round.request.dry_run {
            retired.push(RetiredRecord { record, since: now });
        } else {
            round.records.take_off(&record, now)?;
        }
    }
    if !round.request.dry_run {
        round.records.keep_unfit(&wished)?;
        (_, retired) = round.records.everything()?;
    }
    // The layers of a wished image without a record are not known, if it failed in this round.
    let is_unknown = |image: &super::report::ImageOutcome| {
        image.state == ImageState::Failed && wished.contains(&image.image) && !known.contains(&image.image)
    };
    if report.images.iter().any(is_unknown) && retired.iter().any(|retired| is_over(retired, now, round)) {
        tracing::warn!(
            "nothing is removed in this round: images without a record failed, which may share layers"
        );
        return Ok(());
    }
    let (over, waiting): (Vec<_>, Vec<_>) =
        retired.into_iter().partition(|retired| is_over(retired, now, round));
    for retired in &waiting {
        kept.extend(retired.record.paths().map(str::to_owned));
    }
    if over.is_empty() {
        return Ok(());
    }
    let is_unused = |path: &&str| !kept.contains(*path);
    let layers: BTreeSet<&str> = over
        .iter()
        .flat_map(|retired| &retired.record.layers)
        .map(|layer| layer.path.as_str())
        .filter(is_unused)
        .collect();
    let others: BTreeSet<&str> = over
        .iter()
        .flat_map(|retired| &retired.record.others)
        .map(String::as_str)
        .filter(is_unused)
        .collect();
    if round.request.dry_run {
        report.layers_removed = layers.len() as u64;
        return Ok(());
    }
    remove(round, &layers, &others, report)?;
    for retired in &over {
        round.records.forget(retired)?;
    }
    Ok(())
}

fn is_over(retired: &RetiredRecord, now: i64, round: &Round<'_>) -> bool {
    let grace = i64::try_from(round.request.grace.as_secs()).unwrap_or(i64::MAX);
    now.saturating_sub(retired.since) >= grace
}

fn remove(
    round: &Round<'_>,
    layers: &BTreeSet<&str>,
    others: &BTreeSet<&str>,
    report: &mut RoundReport,
) -> Result<(), ConvertError> {
    if layers.is_empty() && others.is_empty() {
        return Ok(());
    }
    let mut publisher = round.publisher()?;
    let is_collectable = publisher.head().manifest.garbage_collectable;
    let mut ingest = Ingest::begin(&mut publisher, round.progress)?;
    for path in others {
        ingest.remove(path)?;
    }
    let ids: HashSet<String> = others.iter().filter_map(|path| digest_in("/.flat/", path)).collect();
    let names: BTreeSet<&str> = others.iter().filter_map(|path| path.strip_prefix(METADATA)).collect();
    let blobs: HashSet<String> =
        layers.iter().filter_map(|path| digest_in("/.layers/", whole_layer(path))).collect();
    if !(ids.is_empty() && names.is_empty() && blobs.is_empty())
        && let Some(mut podman) = PodmanStore::read(&mut round.published()?)?
    {
        podman.remove(&names, &ids, &blobs, &mut ingest)?;
        podman.write(&mut ingest)?;
    }
    for path in layers {
        if ingest.remove(whole_layer(path))? {
            report.layers_removed += 1;
        }
    }
    report.revision = ingest.commit()?.revision;
    if round.request.collect && is_collectable {
        report.objects_collected = publisher.collect(&CollectOptions::default())?.objects_removed;
    }
    Ok(())
}

/// The digest by which `path` is named if it lies in `directory`, below a directory with its first two digits.
fn digest_in(directory: &str, path: &str) -> Option<String> {
    let (_, hex) = path.strip_prefix(directory)?.split_once('/')?;
    Some(hex.to_owned())
}

/// The directory of a layer with its metadata.
fn whole_layer(path: &str) -> &str {
    path.strip_suffix("/layerfs").unwrap_or(path)
}

/// Whether an image belongs to a wish whose images are not known in this round.
fn may_be_wished(image: &str, expanded: &Expanded<'_>) -> bool {
    let Ok(image) = image.parse::<Reference>() else { return false };
    expanded.unresolved.iter().any(|unresolved| {
        let wish = &unresolved.wish.reference;
        wish.registry == image.registry && wish.repository == image.repository
    })
}
