//! The arguments, as the command-line contract has them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use registry::{
    Client, ClientSettings, Endpoint, ImageSource, Mirror, Platform, Reference, ReferenceTransport,
    RegistryError,
};

use crate::convert::{Layout, PlatformChoice};
use crate::failure::ConvertError;

/// The registry of the original if none is named.
const DEFAULT_REGISTRY: &str = "https://registry-1.docker.io/v2";

/// Convert images of a registry to CernVM-FS layers and thin images
#[derive(Debug, Parser)]
#[command(
    name = "docker2cvmfs",
    version,
    max_term_width = 100,
    after_help = "\
Credentials are taken from the files and helpers of docker login and podman login. Plain
HTTP is spoken to loopback addresses and to registries written with http:// in front.
Certificates of single registries are taken from /etc/docker/certs.d/HOST[:PORT].

Examples:
  docker2cvmfs convert debian:12 --repository images.example.org \\
      --storage /srv/cvmfs/images.example.org --keys /etc/cvmfs/keys \\
      --output registry.example.org/thin/debian:12
  docker2cvmfs convert docker-archive:saved.tar --repository images.example.org \\
      --storage /srv/cvmfs/images.example.org --keys /etc/cvmfs/keys \\
      --output-archive thin.tar
  docker2cvmfs loop wishes.yaml --interval 15m --listen 127.0.0.1:8081
  docker2cvmfs thin library/debian:12 images.example.org/layers > thin.json

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 trust, 4 network, 5 not found, 6 out of space."
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Option<Command>,
    /// The registry's API, the path /v2 included, for images named without a registry
    /// [default: https://registry-1.docker.io/v2]
    #[arg(long, global = true, value_name = "URL")]
    registry: Option<String>,
    /// Ask a mirror first, and the registry itself for what the mirror does not have; of
    /// Docker Hub if no registry is named. May be given several times
    #[arg(long, global = true, value_name = "[REGISTRY=]URL")]
    mirror: Vec<Mirror>,
    /// Print version and commit like docker2cvmfs 0.3
    #[arg(short = 'v')]
    pub(super) original_version: bool,
    /// Print one JSON document on stdout, and no progress
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Lowest level that is logged: error, warn, info, debug or trace
    /// [default: warn, of loop info]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<tracing::Level>,
    /// Form of the log on stderr
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Print an image's manifest
    Manifest(ImageArguments),
    /// Print an image's configuration
    Config(ImageArguments),
    /// Print the descriptor thin.json of an image whose layers are in a repository
    Thin(ThinArguments),
    /// Fetch an image's layers into a directory, or publish them in a repository
    Pull(PullArguments),
    /// Publish an image's layers and load the thin image into the local Docker engine
    MakeThin(MakeThinArguments),
    /// Publish an image's layers and make the thin image
    Convert(ConvertArguments),
    /// Keep the images of a wish list converted
    Loop(LoopArguments),
}

#[derive(Debug, Args)]
pub(super) struct ImageArguments {
    /// REPOSITORY[:TAG][@DIGEST]
    #[arg(value_name = "REPO:TAG")]
    pub(super) image: String,
    #[command(flatten)]
    pub(super) platform: PlatformArgument,
}

#[derive(Debug, Args)]
pub(super) struct PlatformArgument {
    /// Which image of an index to take: os/architecture[/variant] [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(super) platform: Option<Platform>,
}

#[derive(Debug, Args)]
pub(super) struct ThinArguments {
    #[command(flatten)]
    pub(super) image: ImageArguments,
    /// Repository and directory of the layers, for example images.example.org/layers
    #[arg(value_name = "CVMFS_REPO/PREFIX")]
    pub(super) place: String,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("target").args(["directory", "repository"]).required(true)))]
pub(super) struct PullArguments {
    #[command(flatten)]
    pub(super) image: ImageArguments,
    /// Directory for the layers, as <digest>.tar.gz
    #[arg(value_name = "DIRECTORY")]
    pub(super) directory: Option<PathBuf>,
    /// Publish the layers in this repository instead
    #[arg(long, short, value_name = "FQRN", requires_all = ["storage", "keys"])]
    pub(super) repository: Option<String>,
    /// Storage of the repository: a directory
    #[arg(long, value_name = "STORAGE", requires = "repository")]
    pub(super) storage: Option<String>,
    /// Directory with the keys of the repository: FQRN.pub, FQRN.crt, FQRN.key
    #[arg(long, value_name = "DIR", requires = "repository")]
    pub(super) keys: Option<PathBuf>,
    #[command(flatten)]
    pub(super) layout: LayoutArguments,
}

/// The form in which a repository holds images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LayoutName {
    /// SUBDIRECTORY/DIGEST for each layer
    Layers,
    /// As DUCC writes it: .layers, .flat, .metadata, and a link with each image's name
    Unpacked,
}

#[derive(Debug, Args)]
pub(super) struct LayoutArguments {
    /// Directory in the repository that holds the layers
    #[arg(long, short, value_name = "PATH", default_value = "layers")]
    subdirectory: String,
    /// Form in which the repository holds images; the containerd snapshotter and Apptainer
    /// read `unpacked`
    #[arg(long, value_name = "LAYOUT", default_value = "layers")]
    layout: LayoutName,
    /// Directory for downloads, needs room for the compressed layers [default: $TMPDIR, else /var/tmp]
    #[arg(long, value_name = "DIR")]
    pub(super) spool: Option<PathBuf>,
    /// File with the signatures and digests that images need, in the form of podman's
    /// policy.json; what it refuses is not published
    #[arg(long, value_name = "FILE")]
    pub(super) policy: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct MakeThinArguments {
    /// Image to convert
    #[arg(long, short, value_name = "REPO:TAG")]
    pub(super) input_reference: String,
    /// Name of the thin image in the local Docker engine
    #[arg(long, short, value_name = "NAME[:TAG]")]
    pub(super) output_reference: Reference,
    /// Repository for the layers
    #[arg(long, short, value_name = "FQRN")]
    pub(super) repository: String,
    /// Storage of the repository: a directory [default: /srv/cvmfs/FQRN]
    #[arg(long, value_name = "STORAGE")]
    pub(super) storage: Option<String>,
    /// Directory with the keys of the repository
    #[arg(long, value_name = "DIR", default_value = "/etc/cvmfs/keys")]
    pub(super) keys: PathBuf,
    #[command(flatten)]
    pub(super) platform: PlatformArgument,
    #[command(flatten)]
    pub(super) layout: LayoutArguments,
}

#[derive(Debug, Args)]
pub(super) struct ConvertArguments {
    /// [http://]REGISTRY[:PORT]/NAME[:TAG][@DIGEST], a short name of Docker Hub,
    /// docker-archive:FILE[:NAME] or oci:DIRECTORY[:NAME]
    #[arg(value_name = "IMAGE")]
    pub(super) image: String,
    /// Storage of the repository: a directory
    #[arg(long, value_name = "STORAGE")]
    pub(super) storage: String,
    /// Directory with the keys of the repository: FQRN.pub, FQRN.crt, FQRN.key
    #[arg(long, value_name = "DIR")]
    pub(super) keys: PathBuf,
    /// Repository for the layers
    #[arg(long, short, value_name = "FQRN")]
    pub(super) repository: String,
    /// Which images of an index to take: os/architecture[/variant], or all of them with
    /// one thin index [default: this machine's]
    #[arg(long, value_name = "PLATFORM|all")]
    pub(super) platform: Option<PlatformChoice>,
    #[command(flatten)]
    pub(super) layout: LayoutArguments,
    /// Push the thin image to a registry
    #[arg(long, short, value_name = "REF", conflicts_with = "output_archive")]
    pub(super) output: Option<Reference>,
    /// Write the thin image to a file for docker load
    #[arg(long, value_name = "FILE")]
    pub(super) output_archive: Option<PathBuf>,
    /// Name of the image in the file [default: the source's with _thin behind the repository]
    #[arg(long, value_name = "NAME[:TAG]", requires = "output_archive")]
    pub(super) name: Option<Reference>,
    /// Only say what would be done
    #[arg(long)]
    pub(super) dry_run: bool,
}

impl LayoutArguments {
    pub(super) fn layout(&self) -> Layout {
        match self.layout {
            LayoutName::Layers => Layout::layers(&self.subdirectory),
            LayoutName::Unpacked => Layout::Unpacked,
        }
    }
}

/// The list is a YAML file as for DUCC: `version: 1`, `cvmfs_repo`, `output_format` and the images in `input`, with `*`
/// in tags. It is read anew before each round.
#[derive(Debug, Args)]
#[command(after_help = "\
Logins for registries are those of docker login and podman login; DUCC_AUTH_REGISTRIES and
DUCC_OUTPUT_REGISTRY_PASS (with the list's user) are taken too.

With --listen there are a status page at /, the same as JSON at /status, metrics at /metrics,
/healthz, and /webhook for the notifications of Docker registries and Harbor: what was pushed is
looked at at once.

Examples:
  docker2cvmfs loop wishes.yaml --dry-run
  docker2cvmfs loop wishes.yaml --once --json
  docker2cvmfs loop wishes.yaml --interval 15m --listen 127.0.0.1:8081

Exit codes: as everywhere; with --once 1 if an image failed.")]
pub(super) struct LoopArguments {
    /// The wish list
    #[arg(value_name = "RECIPE")]
    pub(super) recipe: PathBuf,
    /// Storage of the repository: a directory or s3://BUCKET/PREFIX [default: /srv/cvmfs/FQRN]
    #[arg(long, value_name = "STORAGE")]
    pub(super) storage: Option<String>,
    /// Directory with the keys of the repository
    #[arg(long, value_name = "DIR", default_value = "/etc/cvmfs/keys")]
    pub(super) keys: PathBuf,
    /// Which images of an index to take: os/architecture[/variant], or all of them with
    /// one thin index [default: this machine's]
    #[arg(long, value_name = "PLATFORM|all")]
    pub(super) platform: Option<PlatformChoice>,
    #[command(flatten)]
    pub(super) layout: LayoutArguments,
    /// Make no thin images
    #[arg(long, short = 'i')]
    pub(super) skip_thin_image: bool,
    /// Only show what would be done
    #[arg(long)]
    pub(super) dry_run: bool,
    /// End after one round
    #[arg(long)]
    pub(super) once: bool,
    /// Time between two rounds
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub(super) interval: Duration,
    /// How long layers stay that no wish needs any more
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = duration)]
    pub(super) grace: Duration,
    /// Do not collect garbage after layers were removed
    #[arg(long)]
    pub(super) no_gc: bool,
    /// Images that are fetched at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) parallel: u16,
    /// Compressed layers that may lie in the spool, in GiB
    #[arg(long, value_name = "GIB", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(super) spool_limit: u64,
    /// Directory for what is remembered between rounds [default: /var/lib/docker2cvmfs/FQRN]
    #[arg(long, value_name = "DIR")]
    pub(super) state: Option<PathBuf>,
    /// Serve status, metrics and notifications
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(super) listen: Option<SocketAddr>,
    /// File with the token that notifications have to state as Authorization
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub(super) token_file: Option<PathBuf>,
}

/// `90`, `90s`, `15m`, `2h`, `30d`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds = match text.get(digits.len()..).unwrap_or_default() {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        unit => return Err(format!("{unit:?} is no unit of time; there are s, m, h and d")),
    };
    let number: u64 = digits.parse().map_err(|_| "a number is wanted, for example 15m".to_owned())?;
    let seconds = number.checked_mul(seconds).filter(|seconds| *seconds <= 100 * 366 * 86_400);
    seconds.map(Duration::from_secs).ok_or_else(|| "longer than a hundred years".to_owned())
}

impl Arguments {
    /// A loop that runs for months tells what it does.
    pub(super) fn log_level(&self) -> tracing::Level {
        let default = match self.command {
            Some(Command::Loop(_)) => tracing::Level::INFO,
            _ => tracing::Level::WARN,
        };
        self.log_level.unwrap_or(default)
    }

    /// Mirrors that are asked first.
    pub(super) fn mirrors(&self) -> Vec<Mirror> {
        self.mirror.clone()
    }

    /// Whether a registry was named.
    pub(super) fn has_registry(&self) -> bool {
        self.registry.is_some()
    }

    /// The registry URL as typed, or the default one.
    pub(super) fn registry_url(&self) -> &str {
        self.registry.as_deref().unwrap_or(DEFAULT_REGISTRY)
    }

    /// The image that a text means. With `--registry` it is a repository on that
    /// registry, as in the original; otherwise it is read as Docker reads it, or as one of
    /// the local forms.
    pub(super) fn image(&self, text: &str) -> Result<ImageSource, ConvertError> {
        let source = text.parse::<ImageSource>();
        match (&self.registry, source) {
            (_, Ok(local @ (ImageSource::DockerArchive { .. } | ImageSource::OciDirectory { .. }))) => {
                Ok(local)
            }
            (None, source) => Ok(source.map_err(RegistryError::from)?),
            (Some(registry), _) => {
                let (transport, host) = Endpoint::parse(registry)?.registry();
                let reference =
                    Reference::on_registry(text, &host, transport).map_err(RegistryError::from)?;
                Ok(ImageSource::Registry(reference))
            }
        }
    }

    /// `TEXT@REGISTRY_URL`, the origin in descriptors of the original.
    pub(super) fn original_origin(&self, text: &str) -> Result<String, ConvertError> {
        let reference = match self.image(text)? {
            ImageSource::Registry(reference) => reference,
            local => return Ok(local.to_string()),
        };
        let is_named = self.registry.is_none() && reference.transport != ReferenceTransport::Auto;
        if is_named || (self.registry.is_none() && reference.registry != "docker.io") {
            return Ok(format!("{text}@{}", Endpoint::of(&reference)?.as_str()));
        }
        Ok(format!("{text}@{}", self.registry_url()))
    }

    /// A client for sources, which `--registry` applies to.
    pub(super) fn source_client(&self) -> Result<Client, ConvertError> {
        let endpoint = self.registry.as_deref().map(Endpoint::parse).transpose()?;
        let mirrors = self.mirrors();
        Ok(Client::new(ClientSettings { endpoint, mirrors, ..ClientSettings::default() })?)
    }
}
