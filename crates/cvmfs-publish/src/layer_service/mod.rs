//! The layer service: publishes the layers that engines leave in a bucket (thin images §7).
//!
//! An engine with the graph driver plugin that commits a container of a thin image puts the container's changes as
//! an archive into a bucket, named after its SHA-256, and asks here until the layer is in the repository. Layers that
//! arrive while others are published go into the next revision together.
//!
//! Nothing is kept but in the bucket and in the repository: a service that was killed learns from them what is to be
//! done. Layers become known by the store's event notifications, by the engines' own questions, and by looking into
//! the bucket; the first is never needed.

mod http;
mod publish;
mod queue;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bucket::LayerBucket;
use tokio::net::TcpListener;

use crate::error::PublishError;
use crate::http_server;
use crate::interrupt::Interrupt;
use crate::path::RepositoryPath;
use crate::publisher::Clock;
use http::Answers;
use publish::Worker;
use queue::Queue;

/// How to run a layer service.
#[derive(Debug)]
pub struct LayerServiceOptions {
    /// Name of the repository.
    pub fqrn: String,
    /// Its storage.
    pub storage: String,
    /// Directory with its keys.
    pub keys: PathBuf,
    /// Where engines leave layers.
    pub bucket: LayerBucket,
    /// Directory of the repository under which each layer has its own, named after its key.
    pub base: String,
    /// How often the bucket is looked into; `None` looks only at the start.
    pub watch: Option<Duration>,
    /// How long to wait for another publisher.
    pub lock_wait: Duration,
    /// Largest layer, as it lies in the bucket, in bytes.
    pub max_layer: u64,
    /// What event notifications must show.
    pub token: Option<String>,
    /// Source of time.
    pub clock: Clock,
}

/// A service that is bound to its address and publishes, but does not answer yet.
#[derive(Debug)]
pub struct LayerService {
    listener: TcpListener,
    answers: Arc<Answers>,
    queue: Arc<Queue>,
    interrupt: Interrupt,
    worker: Option<JoinHandle<()>>,
}

impl LayerService {
    /// Checks keys, repository and bucket, then binds to `address` (`host:port`, port 0 for a free one), and begins to
    /// publish what lies in the bucket.
    ///
    /// # Errors
    /// Whatever would keep it from publishing.
    pub async fn start(address: &str, options: LayerServiceOptions) -> Result<LayerService, PublishError> {
        let base = RepositoryPath::parse(options.base.as_bytes())?;
        let queue = Arc::new(Queue::default());
        let interrupt = Interrupt::default();
        let token = options.token.clone();
        let worker = Worker::new(options, base, queue.clone(), interrupt.clone());
        let (worker, first_look) = tokio::task::spawn_blocking(move || {
            let looked = worker.check().and_then(|()| worker.look_into_bucket());
            (worker, looked)
        })
        .await
        .map_err(|error| PublishError::damaged("layer service", error))?;
        first_look?;
        // Last: whoever can connect is answered.
        let listener = TcpListener::bind(address).await.map_err(PublishError::local("listen on", address))?;
        let worker = Arc::new(worker);
        let answers = Arc::new(Answers::new(worker.clone(), queue.clone(), token));
        let thread = std::thread::Builder::new().name("layers".to_owned()).spawn(move || worker.run());
        let thread = thread.map_err(PublishError::local("start", "a thread"))?;
        Ok(LayerService { listener, answers, queue, interrupt, worker: Some(thread) })
    }

    /// The address with its real port.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn local_addr(&self) -> Result<SocketAddr, PublishError> {
        self.listener.local_addr().map_err(PublishError::local("listen on", "the socket"))
    }

    /// Answers requests until `stop` completes. Then a revision that is being signed is completed, and everything else
    /// left for the next time.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let answers = self.answers.clone();
        let answer = move |request, peer| {
            let answers = answers.clone();
            async move { answers.answer(request, peer).await }
        };
        tokio::select! {
            () = http_server::serve(self.listener, answer) => {}
            () = stop => {}
        }
        self.queue.stop();
        self.interrupt.request();
        if let Some(worker) = self.worker.take() {
            // Whoever waits for a bucket that is silent would wait long; nothing is lost.
            let ended = tokio::task::spawn_blocking(move || worker.join().is_ok());
            let _ = tokio::time::timeout(STOP_PATIENCE, ended).await;
        }
    }
}

/// How long a publish may take to end by itself.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
