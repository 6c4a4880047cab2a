//! The verbs: from parsed arguments to the library and its results to the terminal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bucket::{LayerBucket, LayerServiceConfig};
use cvmfs_format::signature::MasterKeys;
use cvmfs_publish::check::{CheckOptions, CheckReport};
use cvmfs_publish::collect::CollectOptions;
use cvmfs_publish::diff::{self, Change, ChangeKind};
use cvmfs_publish::head::Head;
use cvmfs_publish::keys::{KeyFiles, read_public};
use cvmfs_publish::layer_service::{LayerService, LayerServiceOptions};
use cvmfs_publish::replicate::ReplicateOptions;
use cvmfs_publish::revisions::{self, Info, TagInfo};
use cvmfs_publish::serve::Server;
use cvmfs_publish::server_conf::ServerConf;
use cvmfs_publish::{
    CatalogLimits, Counters, IngestOptions, Interrupt, NewRepository, OpenOptions, PublishError, Publisher,
    RepositoryPath, SpecialFiles, XdirHardLinks, create_repository, decompress, storage,
};
use serde::Serialize;

use crate::cli::{
    Check, Cli, Diff, Gc, Ingest, Input, LayerService as LayerServiceArguments, Mkfs, Reading, Replicate,
    Resign, Serve, Since, Source, TagVerb, Verb, Writing,
};
use crate::progress::Progress;
use crate::signals;

/// Runs one command; false if it found what it was asked to look for: problems.
pub(crate) fn run(cli: Cli) -> Result<bool, PublishError> {
    let json = cli.common.json;
    match cli.verb {
        Verb::Mkfs(arguments) => mkfs(arguments, json)?,
        Verb::Ingest(arguments) => ingest(arguments, json)?,
        Verb::Tag(TagVerb::List(arguments)) => list_tags(&arguments, json)?,
        Verb::Tag(TagVerb::Add { repository, name, description }) => {
            change(&repository, json, |publisher| publisher.add_tag(&name, &description))?;
        }
        Verb::Tag(TagVerb::Annotate { repository, name, description }) => {
            change(&repository, json, |publisher| publisher.annotate_tag(&name, &description))?;
        }
        Verb::Tag(TagVerb::Remove { repository, name }) => {
            change(&repository, json, |publisher| publisher.remove_tag(&name))?;
        }
        Verb::Rollback(arguments) => {
            change(&arguments.repository, json, |publisher| publisher.rollback(arguments.tag.as_deref()))?;
        }
        Verb::Diff(arguments) => diff(&arguments, json)?,
        Verb::Gc(arguments) => gc(arguments, json)?,
        Verb::Resign(arguments) => resign(&arguments, json)?,
        Verb::Info(arguments) => info(&arguments, json)?,
        Verb::Check(arguments) => return check(arguments, json),
        Verb::Replicate(arguments) => replicate(&arguments, json)?,
        Verb::Serve(arguments) => serve(&arguments)?,
        Verb::LayerService(arguments) => layer_service(arguments)?,
    }
    Ok(true)
}

fn mkfs(arguments: Mkfs, json: bool) -> Result<(), PublishError> {
    let report = create_repository(&NewRepository {
        hash: arguments.hash,
        compression: arguments.compression,
        garbage_collectable: arguments.garbage_collectable,
        ttl: arguments.ttl,
        whitelist_days: arguments.whitelist_days,
        ..NewRepository::new(&arguments.place.fqrn, &arguments.place.storage, &arguments.keys)
    })?;
    print(json, &report, || {
        format!(
            "{}: revision {}, root catalog {}\nclients need the public key {}\nthe whitelist is valid for {} days",
            report.fqrn,
            report.revision,
            report.root_hash,
            report.public_key.display(),
            arguments.whitelist_days
        )
    })
}

fn ingest(arguments: Ingest, json: bool) -> Result<(), PublishError> {
    let counters = Arc::new(Counters::default());
    let interrupt = Interrupt::default();
    signals::interrupt_on_signal(interrupt.clone())?;
    let conf = server_conf(&arguments)?;
    let catalog_limits = match arguments.catalog_entries {
        Some(max) => CatalogLimits { max, min: CatalogLimits::default().min.min(max / 4) },
        None => conf.catalog_limits.unwrap_or_default(),
    };
    let options = OpenOptions {
        interrupt,
        counters: counters.clone(),
        catalog_limits,
        nanoseconds: conf.nanoseconds,
        ttl: conf.ttl,
        ..OpenOptions::default()
    };
    let mut publisher = open(&arguments.repository, options)?;
    if let Some(tag) = &arguments.tag {
        publisher.require_new_tag(tag)?;
    }
    let progress = Progress::start(counters);
    let has_own_settings = publisher.settings().is_recorded;
    let mut transaction = publisher.begin()?;
    for path in &arguments.delete {
        transaction.delete(path.as_bytes())?;
    }
    let as_server_conf =
        |ignores: Option<bool>| if ignores == Some(true) { SpecialFiles::Skip } else { SpecialFiles::Keep };
    let ingest_options = IngestOptions {
        catalog: arguments.catalog,
        whiteouts: arguments.whiteouts.into(),
        owner: arguments.owner,
        xattrs: arguments.xattrs || conf.include_xattrs == Some(true),
        special_files: arguments.special_files.map_or(as_server_conf(conf.ignore_special_files), Into::into),
        xdir_hard_links: match (arguments.xdir_hardlinks, conf.ignore_xdir_hard_links) {
            (Some(argument), _) => argument.into(),
            (None, Some(false)) => XdirHardLinks::Refuse,
            (None, _) => XdirHardLinks::Split,
        },
        // what a repository of ours remembers of itself is newer than any server.conf
        chunk_sizes: arguments.chunk_size.or(conf.chunk_sizes.filter(|_| !has_own_settings)),
        compression: conf.compression.filter(|_| !has_own_settings),
        deflate: arguments.deflate,
        ..IngestOptions::default()
    };
    let mut warnings = 0;
    for Input { base, source } in &arguments.inputs.0 {
        let base = base.as_bytes();
        let ingested = match source {
            Source::Tar(archive) => {
                let input: Box<dyn io::Read + Send> = if archive.as_os_str() == "-" {
                    Box::new(io::stdin())
                } else {
                    Box::new(File::open(archive).map_err(|source| PublishError::Local {
                        action: "open",
                        path: archive.clone(),
                        source,
                    })?)
                };
                let plain = decompress::decompressed(input).map_err(PublishError::Input)?;
                transaction.ingest_tar(base, plain, &ingest_options)?
            }
            Source::Tree(tree) => transaction.ingest_tree(base, tree, &ingest_options)?,
        };
        warnings += ingested.warning_count;
    }
    let report = transaction.commit(arguments.tag.as_deref())?;
    drop(progress);
    print(json, &report, || {
        let mut text = format!(
            "{}: revision {}, root catalog {}\n{} entries with {} bytes read; {} new objects with {} bytes stored in {:.1} s",
            report.fqrn,
            report.revision,
            report.root_hash,
            report.entries,
            report.bytes_in,
            report.new_objects,
            report.bytes_stored,
            report.seconds
        );
        if warnings > 0 {
            text.push_str(&format!("\n{warnings} warnings, see the log"));
        }
        text
    })
}

fn server_conf(arguments: &Ingest) -> Result<ServerConf, PublishError> {
    match &arguments.server_conf {
        Some(file) => ServerConf::read(file),
        None => {
            let usual = ServerConf::usual_place(&arguments.repository.place.fqrn);
            if usual.exists() { ServerConf::read(&usual) } else { Ok(ServerConf::default()) }
        }
    }
}

fn open(repository: &Writing, options: OpenOptions) -> Result<Publisher, PublishError> {
    let options = OpenOptions { lock_wait: Duration::from_secs(repository.lock_wait), ..options };
    Publisher::open_with(&repository.place.fqrn, &repository.place.storage, &repository.keys, options)
}

fn masters(repository: &Reading) -> Result<MasterKeys, PublishError> {
    match (&repository.public_key, &repository.keys) {
        (Some(file), _) => read_public(file),
        (None, keys) => {
            KeyFiles::new(keys.as_deref().unwrap_or(Path::new(".")), &repository.place.fqrn).public()
        }
    }
}

/// Makes a change without content, and shows the revision that is published then.
fn change(
    repository: &Writing,
    json: bool,
    change: impl FnOnce(&mut Publisher) -> Result<(), PublishError>,
) -> Result<(), PublishError> {
    let mut publisher = open(repository, OpenOptions::default())?;
    change(&mut publisher)?;
    let manifest = &publisher.head().manifest;
    let report = serde_json::json!({
        "fqrn": manifest.fqrn,
        "revision": manifest.revision,
        "root_hash": manifest.root_catalog.to_string(),
    });
    print(json, &report, || {
        format!("{}: revision {}, root catalog {}", manifest.fqrn, manifest.revision, manifest.root_catalog)
    })
}

fn list_tags(repository: &Reading, json: bool) -> Result<(), PublishError> {
    let info = read_info(repository)?;
    print(json, &info.tags, || describe_tags(&info.tags))
}

fn describe_tags(tags: &[TagInfo]) -> String {
    let line = |tag: &TagInfo| {
        let time = readable(tag.timestamp);
        format!(
            "{:<24} revision {:>6}  {time}  {}  {}",
            tag.name, tag.revision, tag.root_hash, tag.description
        )
    };
    tags.iter().map(|tag| line(tag).trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Changes are written as they are found: there may be millions.
fn diff(arguments: &Diff, json: bool) -> Result<(), PublishError> {
    let place = &arguments.repository.place;
    let storage = storage::open(&place.storage)?;
    let head = Head::load_ignoring_expiry(&*storage, &place.fqrn, &masters(&arguments.repository)?)?;
    let from = diff::root_of(&*storage, &head.manifest, &arguments.from)?;
    let to = diff::root_of(&*storage, &head.manifest, &arguments.to)?;
    let failed = |source| PublishError::Local { action: "write to", path: "standard output".into(), source };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut count = 0_u64;
    if json {
        write!(out, r#"{{"fqrn":"{}","from":"{from}","to":"{to}","changes":["#, place.fqrn)
            .map_err(failed)?;
    }
    diff::diff(&*storage, from, to, &mut |change: Change| {
        let line = if json {
            let separator = if count == 0 { "" } else { "," };
            format!("{separator}{}", serde_json::to_string(&change).expect("changes have string keys only"))
        } else {
            let letter = match change.change {
                ChangeKind::Added => 'A',
                ChangeKind::Removed => 'R',
                ChangeKind::Modified => 'M',
            };
            let what =
                if change.what.is_empty() { String::new() } else { format!(" ({})", change.what.join(", ")) };
            format!("{letter} {}{what}\n", change.path)
        };
        count += 1;
        out.write_all(line.as_bytes()).map_err(failed)
    })?;
    if json {
        writeln!(out, r#"],"count":{count}}}"#).map_err(failed)?;
    }
    out.flush().map_err(failed)
}

fn gc(arguments: Gc, json: bool) -> Result<(), PublishError> {
    let interrupt = Interrupt::default();
    signals::interrupt_on_signal(interrupt.clone())?;
    let counters = Arc::new(Counters::default());
    let settings = OpenOptions {
        lock_wait: Duration::from_secs(arguments.lock_wait),
        interrupt,
        counters: counters.clone(),
        ..OpenOptions::default()
    };
    let place = &arguments.repository.place;
    let storage = storage::open(&place.storage)?;
    let masters = masters(&arguments.repository)?;
    let progress = Progress::start(counters);
    let options = CollectOptions {
        keep_revisions: arguments.keep,
        keep_since: arguments.keep_since.map(|since| match since {
            Since::Time(unix) => unix,
            Since::Ago(age) => {
                cvmfs_publish::system_clock().saturating_sub(i64::try_from(age.as_secs()).unwrap_or(i64::MAX))
            }
        }),
        grace: arguments.grace,
        unreferenced: arguments.unreferenced,
        dry_run: arguments.dry_run,
        deletion_log: arguments.deletion_log,
    };
    let report = cvmfs_publish::collect::collect(&place.fqrn, &*storage, &masters, &settings, &options)?;
    drop(progress);
    print(json, &report, || {
        let would = if report.dry_run { "would be " } else { "" };
        format!(
            "{}: {} revisions kept, {} {would}removed; {} objects with {} bytes {would}deleted, {} of them not referred to by any revision, in {:.1} s",
            report.fqrn,
            report.revisions_kept,
            report.revisions_removed,
            report.objects_removed,
            report.bytes_removed,
            report.unreferenced_removed,
            report.seconds
        )
    })
}

fn resign(arguments: &Resign, json: bool) -> Result<(), PublishError> {
    if !arguments.daemon {
        return renew(arguments, arguments.when_left, json);
    }
    let when_left =
        arguments.when_left.unwrap_or(Duration::from_secs(u64::from(arguments.days) * 24 * 3600 / 3));
    let failed = |source| PublishError::Local { action: "watch", path: "signals".into(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    // a mistake in the command is told at once, a failure later is tried again
    renew(arguments, Some(when_left), json)?;
    runtime.block_on(async {
        let mut stopped = std::pin::pin!(signals::stopped().map_err(failed)?);
        loop {
            tokio::select! {
                () = &mut stopped => return Ok(()),
                () = tokio::time::sleep(arguments.interval.max(Duration::from_secs(1))) => {}
            }
            if let Err(error) = renew(arguments, Some(when_left), json) {
                tracing::error!("the whitelist was not renewed: {}", error.full_message());
            }
        }
    })
}

/// Renews the whitelist, if less than `when_left` is left of it.
fn renew(arguments: &Resign, when_left: Option<Duration>, json: bool) -> Result<(), PublishError> {
    let repository = &arguments.repository;
    let wait = Duration::from_secs(repository.lock_wait);
    let place = &repository.place;
    if let Some(when_left) = when_left
        && let Some(expires) = revisions::whitelist_expiry(&place.fqrn, &place.storage, &repository.keys)?
    {
        let left = expires.saturating_sub(cvmfs_publish::system_clock());
        if u64::try_from(left).is_ok_and(|left| left >= when_left.as_secs()) {
            return if arguments.daemon { Ok(()) } else { print_expiry(&place.fqrn, expires, false, json) };
        }
    }
    let clock = cvmfs_publish::system_clock;
    let expires =
        revisions::resign(&place.fqrn, &place.storage, &repository.keys, arguments.days, wait, clock)?;
    print_expiry(&place.fqrn, expires, true, json)
}

fn print_expiry(fqrn: &str, expires: i64, renewed: bool, json: bool) -> Result<(), PublishError> {
    let report = serde_json::json!({ "fqrn": fqrn, "whitelist_expires": expires, "renewed": renewed });
    let still = if renewed { "" } else { "still " };
    print(json, &report, || format!("{fqrn}: the whitelist is {still}valid until {}", readable(expires)))
}

fn read_info(repository: &Reading) -> Result<Info, PublishError> {
    let storage = storage::open(&repository.place.storage)?;
    revisions::info(&repository.place.fqrn, &*storage, &masters(repository)?, cvmfs_publish::system_clock())
}

fn info(repository: &Reading, json: bool) -> Result<(), PublishError> {
    let info = read_info(repository)?;
    print(json, &info, || {
        let validity = if info.whitelist_valid { "valid until" } else { "EXPIRED on" };
        format!(
            "{}: revision {}, published {}\nroot catalog {}\n{} entries in {} catalogs, {} bytes of files\n\
             hash {}, compression {}, deflate {}, TTL {} s, garbage collection {}\nwhitelist {validity} {}\n{}",
            info.fqrn,
            info.revision,
            readable(i64::try_from(info.published).unwrap_or(i64::MAX)),
            info.root_hash,
            info.entries,
            info.catalogs,
            info.file_bytes,
            info.hash,
            info.compression,
            info.deflate,
            info.ttl,
            if info.garbage_collectable { "allowed" } else { "not allowed" },
            readable(info.whitelist_expires),
            describe_tags(&info.tags)
        )
    })
}

/// A Unix time for people.
fn readable(unix: i64) -> String {
    let text = time::OffsetDateTime::from_unix_timestamp(unix)
        .ok()
        .and_then(|time| time.format(&time::format_description::well_known::Rfc3339).ok());
    text.unwrap_or_else(|| unix.to_string())
}

fn check(arguments: Check, json: bool) -> Result<bool, PublishError> {
    let place = &arguments.repository.place;
    let storage = storage::open(&place.storage)?;
    let masters = masters(&arguments.repository)?;
    let since = match &arguments.since {
        Some(revision) => {
            let head = Head::load_ignoring_expiry(&*storage, &place.fqrn, &masters)?;
            Some(diff::root_of(&*storage, &head.manifest, revision)?)
        }
        None => None,
    };
    let options = CheckOptions {
        tags: arguments.tags,
        path: arguments.path.as_deref().map(|path| RepositoryPath::parse(path.as_bytes())).transpose()?,
        since,
        contents: !arguments.no_contents,
        unreferenced: !arguments.no_unreferenced,
        ..CheckOptions::new(&place.fqrn, storage, masters)
    };
    let progress = Progress::start(options.counters.clone());
    let report = cvmfs_publish::check::check(&options)?;
    drop(progress);
    print(json, &report, || describe(&report))?;
    Ok(report.ok)
}

fn describe(report: &CheckReport) -> String {
    let mut lines = Vec::new();
    for problem in &report.problems {
        let object = problem.object.as_deref().map(|object| format!(" ({object})")).unwrap_or_default();
        lines.push(format!("problem: {}: {}{object}", problem.path, problem.message));
    }
    lines.extend(report.notes.iter().map(|note| format!("note: {note}")));
    for object in &report.unreferenced {
        lines.push(format!("unreferenced: {} ({} bytes)", object.object, object.bytes));
    }
    lines.push(format!(
        "{}: revision {}: {} catalogs, {} entries, {} objects with {} bytes checked in {:.1} s",
        report.fqrn,
        report.revision,
        report.catalogs,
        report.entries,
        report.objects,
        report.bytes,
        report.seconds
    ));
    if report.unreferenced_count > 0 {
        lines.push(format!(
            "{} objects with {} bytes are not referred to by any revision",
            report.unreferenced_count, report.unreferenced_bytes
        ));
    }
    lines.push(match report.problem_count {
        0 => "no problems found".to_owned(),
        1 => "1 problem found".to_owned(),
        count => format!("{count} problems found"),
    });
    lines.join("\n")
}

fn replicate(arguments: &Replicate, json: bool) -> Result<(), PublishError> {
    let place = &arguments.repository.place;
    let interrupt = Interrupt::default();
    signals::interrupt_on_signal(interrupt.clone())?;
    let source = storage::open(&arguments.from)?;
    let options = ReplicateOptions {
        history: arguments.history,
        complete: arguments.complete,
        parallel: arguments.parallel,
        lock_wait: Duration::from_secs(arguments.lock_wait),
        interrupt,
        ..ReplicateOptions::new(
            &place.fqrn,
            source,
            storage::create(&place.storage)?,
            masters(&arguments.repository)?,
        )
    };
    let progress = Progress::start(options.counters.clone());
    let report = cvmfs_publish::replicate::replicate(&options)?;
    drop(progress);
    print(json, &report, || {
        format!(
            "{}: revision {}, root catalog {}\n{} revisions copied; {} new objects with {} bytes in {:.1} s",
            report.fqrn,
            report.revision,
            report.root_hash,
            report.revisions,
            report.new_objects,
            report.bytes_stored,
            report.seconds
        )
    })
}

fn serve(arguments: &Serve) -> Result<(), PublishError> {
    let local = |source| PublishError::Local { action: "serve", path: arguments.directory.clone(), source };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(local)?;
    runtime.block_on(async {
        let server = Server::bind(&arguments.listen, &arguments.directory).await?;
        write_out(&format!("listening on http://{}", server.local_addr()?))?;
        let stopped = signals::stopped().map_err(local)?;
        tokio::select! {
            () = server.run(io::stderr()) => {}
            () = stopped => {}
        }
        Ok(())
    })
}

fn layer_service(arguments: LayerServiceArguments) -> Result<(), PublishError> {
    let invalid = |error: bucket::connection::InvalidLocation| PublishError::Usage(error.to_string());
    let bucket = match (&arguments.bucket, &arguments.bucket_config) {
        (_, Some(file)) => {
            let config =
                LayerServiceConfig::read(file).map_err(|error| PublishError::Usage(error.to_string()))?;
            let fqrn = &arguments.repository.place.fqrn;
            if config.repository != *fqrn {
                return Err(PublishError::Usage(format!(
                    "{}: CvmfsRepo is {}, but the layers shall go into {fqrn}",
                    file.display(),
                    config.repository
                )));
            }
            LayerBucket::of_config(&config).map_err(invalid)?
        }
        (location, None) => LayerBucket::open(location.as_deref().unwrap_or_default()).map_err(invalid)?,
    };
    let token = match &arguments.token_file {
        Some(file) => Some(read_token(file)?),
        None => None,
    };
    let Writing { place, keys, lock_wait } = arguments.repository;
    let options = LayerServiceOptions {
        fqrn: place.fqrn,
        storage: place.storage,
        keys,
        bucket,
        base: arguments.base,
        watch: (!arguments.watch.is_zero()).then_some(arguments.watch.max(Duration::from_secs(1))),
        lock_wait: Duration::from_secs(lock_wait),
        max_layer: arguments.max_layer,
        token,
        clock: cvmfs_publish::system_clock,
    };
    let failed = |source| PublishError::Local { action: "watch", path: "signals".into(), source };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let stopped = signals::stopped().map_err(failed)?;
        let service = LayerService::start(&arguments.listen, options).await?;
        write_out(&format!("listening on http://{}", service.local_addr()?))?;
        service.run(stopped).await;
        Ok::<(), PublishError>(())
    })?;
    // A thread that waits for a silent bucket must not keep the process alive.
    runtime.shutdown_background();
    Ok(())
}

/// The first line of a small file.
fn read_token(file: &Path) -> Result<String, PublishError> {
    const MAX_TOKEN: u64 = 4096;
    let failed = |source| PublishError::Local { action: "read", path: file.to_owned(), source };
    let mut text = String::new();
    File::open(file).map_err(failed)?.take(MAX_TOKEN).read_to_string(&mut text).map_err(failed)?;
    let token = text.lines().next().unwrap_or_default().trim();
    if token.is_empty() {
        return Err(PublishError::Usage(format!("{}: the token is empty", file.display())));
    }
    Ok(token.to_owned())
}

fn print(json: bool, report: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), PublishError> {
    if json {
        let document = serde_json::to_string(report).expect("reports have string keys only");
        write_out(&document)
    } else {
        write_out(&text())
    }
}

fn write_out(line: &str) -> Result<(), PublishError> {
    let mut out = io::stdout().lock();
    let failed = |source| PublishError::Local { action: "write to", path: "standard output".into(), source };
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(failed)
}
