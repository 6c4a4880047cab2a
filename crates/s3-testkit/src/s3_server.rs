//! A real S3 server in this process, storing in a directory, with faults in front of it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderValue, IF_MATCH, IF_NONE_MATCH, LAST_MODIFIED};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::runtime::Runtime;

use testkit::ScratchDir;

/// A bucket that is there from the start.
pub const BUCKET: &str = "images";
/// Another one.
pub const LAYERS: &str = "layers";
/// Who may do everything, if requests must be signed.
pub const ACCESS_KEY: &str = "publisher";
/// What he signs with.
pub const SECRET_KEY: &str = "not-a-secret";

/// One request that arrived.
#[derive(Debug, Clone)]
pub struct Arrived {
    /// `GET`, `PUT` and so on.
    pub method: Method,
    /// Key in [`BUCKET`]; in another one its name and the key.
    pub key: String,
    /// Empty if there was none.
    pub content_type: String,
    /// Empty if there was none.
    pub cache_control: String,
    /// A part of an upload.
    pub part: bool,
}

/// What goes wrong; a request that something is done to counts one down.
#[derive(Debug, Default)]
pub struct Faults {
    /// So many requests are answered with 503 first.
    pub busy: usize,
    /// Uploads of objects that are still stored; later ones are refused with 403.
    pub uploads_until_refusal: Option<usize>,
    /// So many uploads of objects or layers are confirmed and forgotten.
    pub lost_uploads: usize,
    /// Parts of uploads that are still stored; later ones are refused with 403.
    pub refuse_parts_after: Option<usize>,
    /// Conditions are not looked at.
    pub unconditional: bool,
    /// The next manifest is stored, and the connection ends without an answer.
    pub silent_manifest: bool,
    /// Uploads of layers are refused with this status.
    pub refuse_layers: Option<u16>,
    /// So many bytes are missing at the end of each layer that is read.
    pub cut_layers: usize,
}

/// The server; stopped when dropped.
#[derive(Debug)]
pub struct S3Server {
    /// `http://HOST:PORT`.
    pub address: String,
    root: ScratchDir,
    faults: Arc<Mutex<Faults>>,
    arrived: Arc<Mutex<Vec<Arrived>>>,
    signed: bool,
    _runtime: Runtime,
}

impl S3Server {
    /// Starts a server with two empty buckets. Whether requests must be signed decides who may publish.
    pub fn start(signed: bool) -> Result<S3Server> {
        let root = ScratchDir::new("s3")?;
        for bucket in [BUCKET, LAYERS] {
            std::fs::create_dir(root.path().join(bucket))?;
        }
        let files = s3s_fs::FileSystem::new(root.path()).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        let mut builder = S3ServiceBuilder::new(files);
        if signed {
            builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        }
        let service = builder.build();
        let faults = Arc::new(Mutex::new(Faults::default()));
        let arrived = Arc::new(Mutex::new(Vec::new()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("no runtime")?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = format!("http://{}", listener.local_addr()?);
        let front = Arc::new(Front {
            service,
            faults: faults.clone(),
            arrived: arrived.clone(),
            one_at_a_time: tokio::sync::Mutex::default(),
        });
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let front = front.clone();
                tokio::spawn(async move {
                    let answer = service_fn(move |request| {
                        let front = front.clone();
                        async move { front.answer(request).await }
                    });
                    // clients end connections as they like
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
        });
        Ok(S3Server { address, root, faults, arrived, signed, _runtime: runtime })
    }

    /// The variables that a publisher needs.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let mut variables =
            vec![("AWS_ENDPOINT_URL", self.address.clone()), ("AWS_REGION", "us-east-1".to_owned())];
        if self.signed {
            variables.push(("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()));
            variables.push(("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()));
        } else {
            variables.push(("AWS_SKIP_SIGNATURE", "true".to_owned()));
        }
        variables
    }

    /// Where the server keeps what is below `prefix`: it looks like a storage directory.
    pub fn directory(&self, prefix: &str) -> PathBuf {
        self.root.path().join(BUCKET).join(prefix)
    }

    /// Directory of all buckets.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// From now on these things go wrong, and no others.
    pub fn break_with(&self, faults: Faults) {
        *lock(&self.faults) = faults;
    }

    /// Requests since the last call.
    pub fn arrived(&self) -> Vec<Arrived> {
        std::mem::take(&mut *lock(&self.arrived))
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Front {
    service: S3Service,
    faults: Arc<Mutex<Faults>>,
    arrived: Arc<Mutex<Vec<Arrived>>>,
    /// The server looks at a condition and writes in two steps; a real store does both in one.
    one_at_a_time: tokio::sync::Mutex<()>,
}

type Answer = Result<Response<s3s::Body>, std::io::Error>;

impl Front {
    async fn answer(&self, mut request: Request<Incoming>) -> Answer {
        let header =
            |name| request.headers().get(name).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
        let key =
            request.uri().path().trim_start_matches('/').trim_start_matches(BUCKET).trim_start_matches('/');
        let arrived = Arrived {
            method: request.method().clone(),
            key: key.to_owned(),
            content_type: header(CONTENT_TYPE).unwrap_or_default(),
            cache_control: header(CACHE_CONTROL).unwrap_or_default(),
            part: request.uri().query().is_some_and(|query| query.contains("partNumber=")),
        };
        lock(&self.arrived).push(arrived.clone());
        match self.fault(&arrived, &mut request) {
            Fault::None => {}
            Fault::Status(status) => {
                let mut answer = Response::new(s3s::Body::empty());
                *answer.status_mut() = status;
                return Ok(answer);
            }
            Fault::Forget => {
                request.into_body().collect().await.map_err(std::io::Error::other)?;
                let mut answer = Response::new(s3s::Body::empty());
                answer.headers_mut().insert(ETAG, HeaderValue::from_static("\"0\""));
                return Ok(answer);
            }
            Fault::Silence => {
                self.serve(request).await?;
                return Err(std::io::Error::other("no answer"));
            }
            Fault::Cut(missing) => {
                let (head, body) = self.serve(request).await?.into_parts();
                let whole = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
                let part = whole.slice(..whole.len().saturating_sub(missing));
                let mut answer = Response::new(s3s::Body::from(part));
                *answer.status_mut() = head.status;
                for name in [ETAG, LAST_MODIFIED, CONTENT_TYPE] {
                    if let Some(value) = head.headers.get(&name) {
                        answer.headers_mut().insert(name, value.clone());
                    }
                }
                return Ok(answer);
            }
        }
        let conditional = [IF_MATCH, IF_NONE_MATCH].iter().any(|name| request.headers().contains_key(name));
        let _alone = if conditional { Some(self.one_at_a_time.lock().await) } else { None };
        self.serve(request).await
    }

    async fn serve(&self, request: Request<Incoming>) -> Answer {
        let served = hyper::service::Service::call(&self.service, request).await;
        served.map_err(|error| std::io::Error::other(format!("{error:?}")))
    }

    fn fault(&self, arrived: &Arrived, request: &mut Request<Incoming>) -> Fault {
        let mut faults = lock(&self.faults);
        let is_upload = arrived.method == Method::PUT
            && arrived.key.contains("/data/")
            && !arrived.key.contains("/data/txn/");
        if faults.busy > 0 {
            faults.busy -= 1;
            return Fault::Status(StatusCode::SERVICE_UNAVAILABLE);
        }
        let is_layer = arrived.key.starts_with(LAYERS);
        if let Some(status) = faults.refuse_layers
            && is_layer
            && arrived.method == Method::PUT
        {
            return Fault::Status(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR));
        }
        if faults.cut_layers > 0 && is_layer && arrived.method == Method::GET {
            return Fault::Cut(faults.cut_layers);
        }
        if (is_upload || is_layer && arrived.method == Method::PUT) && faults.lost_uploads > 0 {
            faults.lost_uploads -= 1;
            return Fault::Forget;
        }
        if arrived.part
            && let Some(left) = &mut faults.refuse_parts_after
        {
            if *left == 0 {
                return Fault::Status(StatusCode::FORBIDDEN);
            }
            *left -= 1;
        }
        if is_upload && let Some(left) = &mut faults.uploads_until_refusal {
            if *left == 0 {
                return Fault::Status(StatusCode::FORBIDDEN);
            }
            *left -= 1;
        }
        if faults.unconditional {
            request.headers_mut().remove(IF_MATCH);
            request.headers_mut().remove(IF_NONE_MATCH);
        }
        if faults.silent_manifest
            && arrived.method == Method::PUT
            && arrived.key.ends_with("/.cvmfspublished")
        {
            faults.silent_manifest = false;
            return Fault::Silence;
        }
        Fault::None
    }
}

enum Fault {
    None,
    Status(StatusCode),
    Forget,
    Silence,
    Cut(usize),
}
