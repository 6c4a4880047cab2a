//! From a request to the driver and back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, header};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::operator;
use super::stream::{self, ResponseBody};
use crate::causes::with_causes;
use crate::driver::Driver;
use crate::plugin::Plugin;
use crate::protocol::{
    Activated, Capabilities, Capable, Changes, ComparisonRequest, CreateRequest, Directory, Done, Existence,
    Failed, GetRequest, InitRequest, LayerRequest, Metadata, NoArguments, Size, StatusRows,
};

/// Largest body of a JSON call. The largest real one is Init with id maps, some kB.
const MAX_JSON_BYTES: usize = 1 << 20;
/// A JSON body arrives at once or not at all.
const JSON_TIMEOUT: Duration = Duration::from_secs(30);
const CONTENT_TYPE: &str = "application/vnd.docker.plugins.v1.1+json";
/// Calls that take longer are logged at level info.
const SLOW_CALL: Duration = Duration::from_secs(2);

pub(super) type Answer = Response<ResponseBody>;

/// What the engine is told when a call fails.
#[derive(Debug)]
pub(super) struct CallError {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

impl<E: std::error::Error> From<E> for CallError {
    fn from(error: E) -> Self {
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, message: with_causes(&error) }
    }
}

/// Answers one request, whatever it is.
pub(super) async fn answer(plugin: Arc<Plugin>, request: Request<Incoming>) -> Answer {
    let started = Instant::now();
    let call = request.uri().path().to_owned();
    let is_question = request.method() == Method::GET;
    let counters = Arc::clone(&plugin);
    let answered =
        if is_question { question(plugin, &call).await } else { dispatch(plugin, &call, request).await };
    let elapsed = started.elapsed();
    if !is_question {
        counters.calls().note(&call, answered.is_err(), elapsed);
    }
    match answered {
        Ok(answer) => {
            if elapsed > SLOW_CALL {
                tracing::info!(call, seconds = elapsed.as_secs_f64(), "slow call");
            } else {
                tracing::debug!(call, seconds = elapsed.as_secs_f64(), "call");
            }
            answer
        }
        Err(CallError { status, message }) => {
            tracing::error!(call, seconds = elapsed.as_secs_f64(), error = message, "call failed");
            json(status, &Failed { error: message })
        }
    }
}

/// What operators ask.
async fn question(plugin: Arc<Plugin>, path: &str) -> Result<Answer, CallError> {
    let report = |plugin: Arc<Plugin>| async move {
        let driver = plugin.driver()?;
        blocking(move || Ok(driver.report()?)).await
    };
    match path {
        "/status" => Ok(done(&report(plugin).await?)),
        "/metrics" => {
            let counters = Arc::clone(&plugin);
            let text = operator::metrics(&report(plugin).await?, counters.calls());
            let mut answer = whole(text.into_bytes());
            let kind = header::HeaderValue::from_static(cvmfs_fuse::metrics::CONTENT_TYPE);
            answer.headers_mut().insert(header::CONTENT_TYPE, kind);
            Ok(answer)
        }
        _ => {
            let message =
                format!("GET {path}: the plugin protocol uses POST; there are /status and /metrics");
            Err(CallError { status: StatusCode::METHOD_NOT_ALLOWED, message })
        }
    }
}

async fn dispatch(plugin: Arc<Plugin>, call: &str, request: Request<Incoming>) -> Result<Answer, CallError> {
    if request.method() != Method::POST {
        let message = format!("{} {call}: the plugin protocol uses POST", request.method());
        return Err(CallError { status: StatusCode::METHOD_NOT_ALLOWED, message });
    }
    match call {
        // The one call whose body is empty.
        "/Plugin.Activate" => Ok(done(&Activated { implements: ["GraphDriver"] })),
        "/GraphDriver.Init" => {
            let init: InitRequest = arguments(request).await?;
            blocking(move || Ok(plugin.init(init)?)).await.map(|()| done(&Done {}))
        }
        "/GraphDriver.Capabilities" => {
            arguments::<NoArguments>(request).await?;
            Ok(done(&Capable { capabilities: Capabilities { reproduces_exact_diffs: false } }))
        }
        "/GraphDriver.Create" => {
            let create: CreateRequest = arguments(request).await?;
            on_driver(plugin, move |driver| driver.create(&create).map(|()| Done {})).await
        }
        "/GraphDriver.CreateReadWrite" => {
            let create: CreateRequest = arguments(request).await?;
            on_driver(plugin, move |driver| driver.create_container(&create).map(|()| Done {})).await
        }
        "/GraphDriver.Remove" => {
            let layer: LayerRequest = arguments(request).await?;
            on_driver(plugin, move |driver| driver.remove(&layer.id).map(|()| Done {})).await
        }
        "/GraphDriver.Get" => {
            let get: GetRequest = arguments(request).await?;
            on_driver(plugin, move |driver| {
                driver.get(&get.id, &get.mount_label).map(|path| Directory { path })
            })
            .await
        }
        "/GraphDriver.Put" => {
            let layer: LayerRequest = arguments(request).await?;
            on_driver(plugin, move |driver| driver.put(&layer.id).map(|()| Done {})).await
        }
        "/GraphDriver.Exists" => {
            let layer: LayerRequest = arguments(request).await?;
            on_driver(plugin, move |driver| Ok(Existence { exists: driver.exists(&layer.id) })).await
        }
        "/GraphDriver.Status" => {
            arguments::<NoArguments>(request).await?;
            on_driver(plugin, |driver| Ok(StatusRows { rows: driver.status() })).await
        }
        "/GraphDriver.GetMetadata" => {
            let layer: LayerRequest = arguments(request).await?;
            on_driver(plugin, move |driver| driver.metadata(&layer.id).map(|values| Metadata { values }))
                .await
        }
        "/GraphDriver.Cleanup" => {
            arguments::<NoArguments>(request).await?;
            on_driver(plugin, |driver| driver.clean_up().map(|()| Done {})).await
        }
        "/GraphDriver.Changes" => {
            let of: ComparisonRequest = arguments(request).await?;
            let changes = move |driver: &Driver| driver.changes(&of.id, of.parent.as_ref());
            on_driver(plugin, move |driver| changes(driver).map(|changes| Changes { changes })).await
        }
        "/GraphDriver.DiffSize" => {
            let of: ComparisonRequest = arguments(request).await?;
            let size = move |driver: &Driver| driver.diff_size(&of.id, of.parent.as_ref());
            on_driver(plugin, move |driver| size(driver).map(|bytes| Size { bytes })).await
        }
        "/GraphDriver.Diff" => {
            let of: ComparisonRequest = arguments(request).await?;
            let driver = plugin.driver()?;
            stream::writing(move |out| driver.diff(&of.id, of.parent.as_ref(), out)).await
        }
        "/GraphDriver.ApplyDiff" => {
            let to = comparison_in_query(request.uri().query().unwrap_or_default())?;
            let driver = plugin.driver()?;
            let body = request.into_body();
            let bytes =
                stream::reading(body, move |tar| driver.apply_diff(&to.id, to.parent.as_ref(), tar)).await?;
            Ok(done(&Size { bytes }))
        }
        _ => Err(CallError { status: StatusCode::NOT_FOUND, message: format!("{call}: no such call") }),
    }
}

/// The body, whole and as a type. An empty one is what the engine sends when it repeats
/// a call after a broken connection; defaults would be wrong then.
async fn arguments<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, CallError> {
    let bad = |message: String| CallError { status: StatusCode::INTERNAL_SERVER_ERROR, message };
    let body = match tokio::time::timeout(JSON_TIMEOUT, collect(request.into_body())).await {
        Err(_) => return Err(bad(format!("the request's body did not arrive within {JSON_TIMEOUT:?}"))),
        Ok(body) => body?,
    };
    if body.is_empty() {
        return Err(bad(
            "the request's body is empty (a call repeated after a broken connection?)".to_owned()
        ));
    }
    serde_json::from_slice(&body).map_err(|error| bad(format!("the request's body cannot be read: {error}")))
}

/// The body. One that is too large is read to its end without being kept, so that the
/// caller can read why it is refused.
async fn collect(mut body: Incoming) -> Result<Vec<u8>, CallError> {
    let mut kept = Vec::new();
    let mut total = 0;
    while let Some(frame) = body.frame().await {
        let data = frame?.into_data().unwrap_or_default();
        total += data.len();
        if total <= MAX_JSON_BYTES {
            kept.extend_from_slice(&data);
        }
    }
    if total > MAX_JSON_BYTES {
        let message = format!("the request's body is larger than {MAX_JSON_BYTES} bytes");
        return Err(CallError { status: StatusCode::PAYLOAD_TOO_LARGE, message });
    }
    Ok(kept)
}

/// `id=…&parent=…`. Ids need no escapes, so a `%` is an error like any other bad id.
fn comparison_in_query(query: &str) -> Result<ComparisonRequest, CallError> {
    let value = |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
    let id = value("id").ok_or_else(|| CallError {
        status: StatusCode::INTERNAL_SERVER_ERROR,
        message: "the query has no id".to_owned(),
    })?;
    let parent = value("parent").filter(|parent| !parent.is_empty());
    Ok(ComparisonRequest { id: id.parse()?, parent: parent.map(str::parse).transpose()? })
}

/// Runs a call on the initialised driver, on a thread that may block.
async fn on_driver<T, F>(plugin: Arc<Plugin>, call: F) -> Result<Answer, CallError>
where
    T: Serialize + Send + 'static,
    F: FnOnce(&Driver) -> Result<T, crate::driver::DriverError> + Send + 'static,
{
    let driver = plugin.driver()?;
    blocking(move || Ok(call(&driver)?)).await.map(|value| done(&value))
}

pub(super) async fn blocking<T, F>(work: F) -> Result<T, CallError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, CallError> + Send + 'static,
{
    // A panic is a bug of ours; it must fail this call and no other.
    tokio::task::spawn_blocking(work).await?
}

fn done<T: Serialize>(value: &T) -> Answer {
    json(StatusCode::OK, value)
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Answer {
    let mut text = serde_json::to_vec(value).expect("the protocol's types always have a JSON form");
    text.push(b'\n');
    let mut answer = whole(text);
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(CONTENT_TYPE));
    answer
}

fn whole(text: Vec<u8>) -> Answer {
    Response::new(Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync())
}
