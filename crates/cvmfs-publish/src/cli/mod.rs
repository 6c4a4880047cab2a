//! The command line, declared.

mod inputs;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use cvmfs_format::chunking::ChunkSizes;
use cvmfs_format::{Compression, Deflate, HashAlgorithm};
use cvmfs_publish::{Owner, SpecialFiles, Whiteouts, XdirHardLinks};

use inputs::Inputs;
pub(crate) use inputs::{Input, Source};

/// Publishes CernVM-FS repositories: makes them, fills them from tar archives and directories, checks and serves them.
///
/// Exit codes: 0 done, 1 failed, 2 wrong usage, 3 trust (key, signature, whitelist), 4 network, 5 not found,
/// 6 out of space, 130 interrupted (nothing was published).
#[derive(Debug, Parser)]
#[command(name = "cvmfs-publish", version)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Options of all verbs.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Least severe messages to log: error, warn, info, debug, trace, or a filter such as cvmfs_publish=debug
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL", value_parser = parse_log_level)]
    pub(crate) log_level: String,
    /// Form of the log on standard error
    #[arg(long, global = true, default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// Print the result as one JSON document on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Make a new, empty repository
    Mkfs(Mkfs),
    /// Publish tar archives, directories and deletions as one new revision
    Ingest(Ingest),
    /// List, add, annotate and remove names of revisions
    #[command(subcommand)]
    Tag(TagVerb),
    /// Publish an older revision anew
    Rollback(Rollback),
    /// Show what differs between two revisions
    Diff(Diff),
    /// Delete old revisions that nobody needs any more, with what only they refer to
    Gc(Gc),
    /// Renew the whitelist, and the manifest's signature after a change of the release key
    Resign(Resign),
    /// Show revision, sizes, settings, tags and the expiry of the whitelist
    Info(Reading),
    /// Verify a whole repository: signatures, every catalog, every object
    Check(Check),
    /// Make a copy of a repository in another storage, or bring it up to date (stratum 1)
    Replicate(Replicate),
    /// Serve a directory over HTTP for trials (no TLS; first line on standard output: its address; access log as JSON lines on standard error)
    Serve(Serve),
    /// Publish the layers that container engines leave in a bucket, and tell them when that is done (first line on standard output: its address)
    LayerService(LayerService),
}

/// A repository and its place.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Fully qualified repository name, such as example.cern.ch
    pub(crate) fqrn: String,
    /// Storage: a directory, or s3://BUCKET/PREFIX with endpoint and keys from AWS_* variables; to read, also a web server's URL
    #[arg(long, value_name = "STORAGE")]
    pub(crate) storage: String,
}

#[derive(Debug, Args)]
pub(crate) struct Mkfs {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Directory with FQRN.masterkey, .pub, .key and .crt; missing keys are made (0400, directory 0700)
    #[arg(long, value_name = "DIR")]
    pub(crate) keys: PathBuf,
    /// Hash algorithm of all objects: sha1, rmd160 or shake128
    #[arg(long, default_value = "sha1", value_name = "NAME")]
    pub(crate) hash: HashAlgorithm,
    /// Compression of file contents: zlib or none
    #[arg(long, default_value = "zlib", value_name = "NAME")]
    pub(crate) compression: Compression,
    /// Allow garbage collection
    #[arg(long)]
    pub(crate) garbage_collectable: bool,
    /// Seconds for which clients may rely on a revision
    #[arg(long, default_value_t = 240, value_name = "SECONDS")]
    pub(crate) ttl: u32,
    /// Days for which the whitelist is valid
    #[arg(long, default_value_t = cvmfs_publish::DEFAULT_WHITELIST_DAYS, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub(crate) whitelist_days: u32,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("work").args(["tar", "tree", "delete"]).required(true).multiple(true)))]
pub(crate) struct Ingest {
    #[command(flatten)]
    pub(crate) repository: Writing,
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    /// Make each base directory a nested catalog
    #[arg(long, requires = "base")]
    pub(crate) catalog: bool,
    /// Container whiteouts (.wh.NAME, .wh..wh..opq): overlay stores them as overlayfs reads them, keep as plain files
    #[arg(long, default_value = "keep", value_name = "overlay|keep")]
    pub(crate) whiteouts: WhiteoutsArg,
    /// Owner of everything: keep (numeric, as in the input) or UID:GID
    #[arg(long, default_value = "keep", value_name = "keep|UID:GID", value_parser = parse_owner)]
    pub(crate) owner: Owner,
    /// Publish extended attributes (names and values up to 255 bytes) [default: as server.conf says, else not]
    #[arg(long)]
    pub(crate) xattrs: bool,
    /// Devices, fifos and sockets: keep or skip [default: as server.conf says, else keep]
    #[arg(long, value_name = "keep|skip")]
    pub(crate) special_files: Option<SpecialFilesArg>,
    /// Hard links of files in different directories: split makes them independent, refuse ends the publish [default: as
    /// server.conf says, else split]
    #[arg(long, value_name = "split|refuse")]
    pub(crate) xdir_hardlinks: Option<XdirHardLinksArg>,
    /// Settings of the C++ server tools to follow [default: /etc/cvmfs/repositories.d/FQRN/server.conf if it is there]
    #[arg(long, value_name = "FILE")]
    pub(crate) server_conf: Option<PathBuf>,
    /// Chunk sizes of large files in bytes, K or M [default: the repository's, 4M:8M:16M]
    #[arg(long, value_name = "MIN:AVG:MAX", value_parser = parse_chunk_sizes)]
    pub(crate) chunk_size: Option<ChunkSizes>,
    /// Deflate: stock gives the object names of the C++ tools, fast is 3 times faster [default: the repository's]
    #[arg(long, value_name = "stock|fast")]
    pub(crate) deflate: Option<Deflate>,
    /// Divide catalogs with more entries than this along their directories; 0 never does [default: as server.conf says, else 100000]
    #[arg(long, value_name = "COUNT")]
    pub(crate) catalog_entries: Option<u64>,
    /// Name the new revision in the history
    #[arg(long, value_name = "NAME", value_parser = parse_tag)]
    pub(crate) tag: Option<String>,
    /// Remove these paths first; each must exist
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) delete: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum WhiteoutsArg {
    Overlay,
    Keep,
}

impl From<WhiteoutsArg> for Whiteouts {
    fn from(value: WhiteoutsArg) -> Whiteouts {
        match value {
            WhiteoutsArg::Overlay => Whiteouts::Overlay,
            WhiteoutsArg::Keep => Whiteouts::Keep,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum XdirHardLinksArg {
    Split,
    Refuse,
}

impl From<XdirHardLinksArg> for XdirHardLinks {
    fn from(value: XdirHardLinksArg) -> XdirHardLinks {
        match value {
            XdirHardLinksArg::Split => XdirHardLinks::Split,
            XdirHardLinksArg::Refuse => XdirHardLinks::Refuse,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum SpecialFilesArg {
    Keep,
    Skip,
}

impl From<SpecialFilesArg> for SpecialFiles {
    fn from(value: SpecialFilesArg) -> SpecialFiles {
        match value {
            SpecialFilesArg::Keep => SpecialFiles::Keep,
            SpecialFilesArg::Skip => SpecialFiles::Skip,
        }
    }
}

/// A repository to be read, and the key that it is trusted by.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("trust").args(["keys", "public_key"]).required(true)))]
pub(crate) struct Reading {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Directory with FQRN.pub
    #[arg(long, value_name = "DIR")]
    pub(crate) keys: Option<PathBuf>,
    /// File with the public master key
    #[arg(long, value_name = "FILE")]
    pub(crate) public_key: Option<PathBuf>,
}

/// A repository to be changed.
#[derive(Debug, Args)]
pub(crate) struct Writing {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Directory with FQRN.pub, .key and .crt
    #[arg(long, value_name = "DIR")]
    pub(crate) keys: PathBuf,
    /// Seconds to wait for another publisher to finish
    #[arg(long, default_value_t = cvmfs_publish::DEFAULT_LOCK_WAIT.as_secs(), value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86400))]
    pub(crate) lock_wait: u64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TagVerb {
    /// List all tags, the newest first
    List(Reading),
    /// Name the current revision
    Add {
        #[command(flatten)]
        repository: Writing,
        /// Name of the tag
        name: String,
        /// What it stands for
        #[arg(long, default_value = "", value_name = "TEXT")]
        description: String,
    },
    /// Change the description of a tag
    Annotate {
        #[command(flatten)]
        repository: Writing,
        /// Name of the tag
        name: String,
        /// What it stands for
        #[arg(long, value_name = "TEXT")]
        description: String,
    },
    /// Remove a tag; its revision goes with the next garbage collection
    Remove {
        #[command(flatten)]
        repository: Writing,
        /// Name of the tag
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Rollback {
    #[command(flatten)]
    pub(crate) repository: Writing,
    /// Tag of the revision to return to [default: the revision before the current one]
    #[arg(long, value_name = "NAME")]
    pub(crate) tag: Option<String>,
}

/// One line for each path: A added, R removed, M modified (and what of it). A revision is a tag, a number that a tag has, or the hash of a root catalog.
#[derive(Debug, Args)]
pub(crate) struct Diff {
    #[command(flatten)]
    pub(crate) repository: Reading,
    /// The older revision
    #[arg(long, value_name = "REVISION", default_value = cvmfs_format::history::TRUNK_PREVIOUS)]
    pub(crate) from: String,
    /// The newer revision
    #[arg(long, value_name = "REVISION", default_value = cvmfs_format::history::TRUNK)]
    pub(crate) to: String,
}

/// What stays: the current revision, all tagged ones, those that the rule names, and those replaced within the grace.
#[derive(Debug, Args)]
pub(crate) struct Gc {
    #[command(flatten)]
    pub(crate) repository: Reading,
    /// Seconds to wait for a publisher or a replication to finish
    #[arg(long, default_value_t = cvmfs_publish::DEFAULT_LOCK_WAIT.as_secs(), value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86400))]
    pub(crate) lock_wait: u64,
    /// Keep this many revisions before the current one
    #[arg(long, value_name = "COUNT")]
    pub(crate) keep: Option<u64>,
    /// Keep what was published since then, and the revision before: a Unix time, YYYY-MM-DDTHH:MM:SSZ, or an age such as 30d or 12h
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    pub(crate) keep_since: Option<Since>,
    /// Keep a replaced revision this long in any case: mounts and containers may still use it
    #[arg(long, default_value = "3d", value_name = "AGE", value_parser = parse_age)]
    pub(crate) grace: Duration,
    /// Also delete objects older than the grace that no revision refers to: remains of interrupted publishes
    #[arg(long)]
    pub(crate) unreferenced: bool,
    /// Only say what would go
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Append the names of what is deleted (or would be) to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) deletion_log: Option<PathBuf>,
}

/// A point in time, as a user gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Since {
    /// Unix time.
    Time(i64),
    /// So long ago.
    Ago(Duration),
}

#[derive(Debug, Args)]
pub(crate) struct Resign {
    /// The keys directory must have FQRN.masterkey, too
    #[command(flatten)]
    pub(crate) repository: Writing,
    /// Days for which the new whitelist is valid
    #[arg(long, default_value_t = cvmfs_publish::DEFAULT_WHITELIST_DAYS, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub(crate) days: u32,
    /// Only if less than this is left of the present one [default: renew in any case; with --daemon a third of --days]
    #[arg(long, value_name = "AGE", value_parser = parse_age)]
    pub(crate) when_left: Option<Duration>,
    /// Stay, and renew whenever it is time; ends with SIGTERM
    #[arg(long)]
    pub(crate) daemon: bool,
    /// How often the daemon looks
    #[arg(long, default_value = "1h", value_name = "AGE", value_parser = parse_age, requires = "daemon")]
    pub(crate) interval: Duration,
}

/// Copies the current revision, the tagged ones and, after the first time, those published in between. Verifies every
/// object. Goes on where it was interrupted; the replica keeps its old revision until the new one is complete.
#[derive(Debug, Args)]
pub(crate) struct Replicate {
    #[command(flatten)]
    pub(crate) repository: Reading,
    /// Where the repository is: the URL of a web server, a directory, or s3://BUCKET/PREFIX
    #[arg(long, value_name = "SOURCE")]
    pub(crate) from: String,
    /// Copy all revisions that the source still has
    #[arg(long)]
    pub(crate) history: bool,
    /// Look for every object, also below catalogs that the replica has already
    #[arg(long)]
    pub(crate) complete: bool,
    /// Objects fetched at the same time
    #[arg(long, value_name = "COUNT", default_value_t = cvmfs_publish::replicate::DEFAULT_PARALLEL, value_parser = parse_parallel)]
    pub(crate) parallel: usize,
    /// Seconds to wait for another replication or collection to finish
    #[arg(long, default_value_t = cvmfs_publish::DEFAULT_LOCK_WAIT.as_secs(), value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86400))]
    pub(crate) lock_wait: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) repository: Reading,
    /// Check all tagged revisions, too
    #[arg(long)]
    pub(crate) tags: bool,
    /// Check only this entry and what is below it
    #[arg(long, value_name = "PATH", conflicts_with = "tags")]
    pub(crate) path: Option<OsString>,
    /// Check only what changed since this revision: a tag, a number that a tag has, or the hash of a root catalog
    #[arg(long, value_name = "REVISION")]
    pub(crate) since: Option<String>,
    /// Only look whether objects are there, do not read them
    #[arg(long)]
    pub(crate) no_contents: bool,
    /// Do not look for stored objects that no revision refers to
    #[arg(long)]
    pub(crate) no_unreferenced: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Address and port; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: String,
    /// Directory to serve
    pub(crate) directory: PathBuf,
}

/// Engines with the graph driver plugin put what a container of a thin image changed into a bucket when it is committed,
/// and ask here until it is in the repository. Layers become known by event notifications of the store (POST /), by the
/// engines' questions (GET /status/KEY), and by looking into the bucket. GET /healthz and /metrics tell how it goes.
///
/// Ends with SIGTERM; what was not published is published after the next start.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("source").args(["bucket", "bucket_config"]).required(true)))]
#[command(after_help = "\
Example, with the bucket of a minio server on this machine and the keys of its user in AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY:
  AWS_ENDPOINT_URL=http://localhost:9000 cvmfs-publish layer-service repo.example.org \\
    --storage /srv/cvmfs/repo.example.org --keys /etc/cvmfs/keys --bucket s3://layers")]
pub(crate) struct LayerService {
    #[command(flatten)]
    pub(crate) repository: Writing,
    /// Where the layers are left: s3://BUCKET with endpoint and keys from AWS_* variables, or a directory
    #[arg(long, value_name = "BUCKET")]
    pub(crate) bucket: Option<String>,
    /// The same as a config.json of the plugin (minio_ext_config)
    #[arg(long, value_name = "FILE")]
    pub(crate) bucket_config: Option<PathBuf>,
    /// Address and port; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:3000")]
    pub(crate) listen: String,
    /// Directory of the repository in which each layer gets its own
    #[arg(long, value_name = "PATH", default_value = bucket::config::DEFAULT_BUCKET)]
    pub(crate) base: String,
    /// Look into the bucket this often; 0 only at the start
    #[arg(long, value_name = "AGE", default_value = "60s", value_parser = parse_age)]
    pub(crate) watch: Duration,
    /// Largest layer as it lies in the bucket, in bytes, K, M or G
    #[arg(long, value_name = "SIZE", default_value = "64G", value_parser = parse_size)]
    pub(crate) max_layer: u64,
    /// File with the token that event notifications must show (Authorization: Bearer TOKEN)
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

/// A level, or directives `TARGET=LEVEL` with commas between them. A bare word that is no level would be taken for
/// the name of a module, and everything else be silent.
fn parse_log_level(text: &str) -> Result<String, String> {
    let is_level = |level: &str| {
        ["off", "error", "warn", "info", "debug", "trace"].contains(&level.to_ascii_lowercase().as_str())
    };
    for directive in text.split(',') {
        let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level);
        if !is_level(level) {
            return Err(format!("{level:?} is none of error, warn, info, debug and trace"));
        }
    }
    Ok(text.to_owned())
}

fn parse_tag(text: &str) -> Result<String, String> {
    cvmfs_publish::check_tag_name(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

fn parse_owner(text: &str) -> Result<Owner, String> {
    if text == "keep" {
        return Ok(Owner::Keep);
    }
    // 4294967295 is no id for the kernel (errata 15)
    let id = |text: &str| text.parse::<u32>().ok().filter(|&id| id != u32::MAX);
    match text.split_once(':').map(|(uid, gid)| (id(uid), id(gid))) {
        Some((Some(uid), Some(gid))) => Ok(Owner::Fixed(uid, gid)),
        _ => Err("expected keep, or numbers such as 1000:1000".to_owned()),
    }
}

/// `90`, `90s`, `15m`, `12h`, `3d`, `2w`.
fn parse_age(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        "w" => 7 * 24 * 3600,
        _ => return Err("expected a number of s, m, h, d or w, such as 3d".to_owned()),
    };
    let count: u32 = digits.parse().map_err(|_| "expected a number with a unit, such as 3d".to_owned())?;
    Ok(Duration::from_secs(u64::from(count) * unit))
}

/// `4096`, `64K`, `5M`, `2G`.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err("expected a number of bytes, K, M or G, such as 2G".to_owned()),
    };
    let count: u32 = digits.parse().map_err(|_| "expected a number with a unit, such as 2G".to_owned())?;
    Ok(u64::from(count) << shift)
}

fn parse_since(text: &str) -> Result<Since, String> {
    if let Ok(unix) = text.parse() {
        return Ok(Since::Time(unix));
    }
    if let Ok(time) = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339) {
        return Ok(Since::Time(time.unix_timestamp()));
    }
    parse_age(text)
        .map(Since::Ago)
        .map_err(|_| "expected a Unix time, YYYY-MM-DDTHH:MM:SSZ, or an age such as 30d".to_owned())
}

fn parse_parallel(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| (1..=256).contains(count)).ok_or_else(|| "expected 1 to 256".to_owned())
}

fn parse_chunk_sizes(text: &str) -> Result<ChunkSizes, String> {
    cvmfs_publish::settings::parse_chunk_sizes(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_declaration_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_owner_is_two_numbers() {
        assert_eq!(parse_owner("0:4294967294"), Ok(Owner::Fixed(0, u32::MAX - 1)));
        for bad in ["root:root", "1", "1:", "4294967295:0", ""] {
            assert!(parse_owner(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_given_as_people_say_them() {
        assert_eq!(parse_age("3d"), Ok(Duration::from_secs(259_200)));
        assert_eq!(parse_age("0"), Ok(Duration::ZERO));
        assert_eq!(parse_since("2024-01-01T00:00:00Z"), Ok(Since::Time(1_704_067_200)));
        assert_eq!(parse_since("1704067200"), Ok(Since::Time(1_704_067_200)));
        assert_eq!(parse_since("12h"), Ok(Since::Ago(Duration::from_secs(43_200))));
        for bad in ["", "d", "3y", "-1d", "yesterday"] {
            assert!(parse_age(bad).is_err() && parse_since(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_log_level_is_one() {
        for good in ["warn", "DEBUG", "off", "cvmfs_publish=debug", "warn,cvmfs_publish::check=trace"] {
            assert_eq!(parse_log_level(good).as_deref(), Ok(good));
        }
        for bad in ["bogus", "", "warn,", "cvmfs_publish=loud"] {
            assert!(parse_log_level(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_ingest_needs_something_to_do() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("cvmfs-publish ingest f --storage s --keys k").is_err());
        assert!(parse("cvmfs-publish ingest f --storage s --keys k --tar -").is_err());
        assert!(parse("cvmfs-publish ingest f --storage s --keys k --base b").is_err());
        parse("cvmfs-publish ingest f --storage s --keys k --delete a b").unwrap();
        parse("cvmfs-publish ingest f --storage s --keys k --base b --tar - --catalog --json").unwrap();
    }
}
