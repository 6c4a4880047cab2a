//! The verbs: from parsed arguments to the library and its results to the terminal.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cvmfs_publish::check::{CheckOptions, CheckReport};
use cvmfs_publish::keys::{KeyFiles, read_public};
use cvmfs_publish::serve::Server;
use cvmfs_publish::{
    Counters, IngestOptions, IngestReport, Interrupt, NewRepository, OpenOptions, PublishError, Publisher,
    create_repository, decompress, storage,
};
use serde::Serialize;

use crate::cli::{Check, Cli, Ingest, Mkfs, Serve, Verb};
use crate::progress::Progress;
use crate::signals;

/// Runs one command; false if it found what it was asked to look for: problems.
pub(crate) fn run(cli: Cli) -> Result<bool, PublishError> {
    let json = cli.common.json;
    match cli.verb {
        Verb::Mkfs(arguments) => mkfs(arguments, json)?,
        Verb::Ingest(arguments) => ingest(arguments, json)?,
        Verb::Check(arguments) => return check(arguments, json),
        Verb::Serve(arguments) => serve(&arguments)?,
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
    let options = OpenOptions {
        lock_wait: Duration::from_secs(arguments.lock_wait),
        interrupt,
        counters: counters.clone(),
        ..OpenOptions::default()
    };
    let mut publisher =
        Publisher::open_with(&arguments.place.fqrn, &arguments.place.storage, &arguments.keys, options)?;
    let progress = Progress::start(counters);
    let mut transaction = publisher.begin()?;
    for path in &arguments.delete {
        transaction.delete(path.as_bytes())?;
    }
    let ingest_options = IngestOptions {
        catalog: arguments.catalog,
        whiteouts: arguments.whiteouts.into(),
        owner: arguments.owner,
        xattrs: arguments.xattrs,
        special_files: arguments.special_files.into(),
        chunk_sizes: arguments.chunk_size,
        deflate: arguments.deflate,
        ..IngestOptions::default()
    };
    let mut ingested = IngestReport::default();
    let base = arguments.base.as_deref().unwrap_or_default().as_bytes();
    if let Some(archive) = &arguments.tar {
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
        ingested = transaction.ingest_tar(base, plain, &ingest_options)?;
    } else if let Some(tree) = &arguments.tree {
        ingested = transaction.ingest_tree(base, tree, &ingest_options)?;
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
        if ingested.warning_count > 0 {
            text.push_str(&format!("\n{} warnings, see the log", ingested.warning_count));
        }
        text
    })
}

fn check(arguments: Check, json: bool) -> Result<bool, PublishError> {
    let fqrn = &arguments.place.fqrn;
    let masters = match (&arguments.public_key, &arguments.keys) {
        (Some(file), _) => read_public(file)?,
        (None, keys) => KeyFiles::new(keys.as_deref().unwrap_or(Path::new(".")), fqrn).public()?,
    };
    let options = CheckOptions {
        tags: arguments.tags,
        contents: !arguments.no_contents,
        unreferenced: !arguments.no_unreferenced,
        ..CheckOptions::new(fqrn, storage::open(&arguments.place.storage)?, masters)
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
