//! The way of one object from the servers into the cache.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::flight::Driver;
use super::verify::{InMemory, Verified, Wanted};
use super::{Asked, CacheName, CachedFile, ObjectResult, ObjectStore, described, hint, stored};
use crate::cache::{Draft, Kind};
use crate::deadline::{Deadline, Leave, Patience};
use crate::network::{FetchError, Fetcher, Request};

/// Longest download of one object. Within it the low-speed limit decides.
pub(super) const LONGEST_DOWNLOAD: Duration = Duration::from_secs(3600);
/// How long a download goes on that nobody waits for.
const LINGER: Duration = Duration::from_secs(20);

impl Driver for Fetcher {
    fn wait<T>(&self, work: impl Future<Output = T>, patience: Patience<'_>) -> Result<T, Leave> {
        Fetcher::wait(self, work, patience)
    }

    fn go_on(&self, work: BoxFuture<'static, ()>) {
        Fetcher::go_on(self, work);
    }

    fn begin(&self, work: BoxFuture<'static, ()>) {
        self.runtime().spawn(work);
    }

    fn linger(&self) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(LINGER))
    }
}

/// A download, with everything that it needs to go on without the one who asked.
struct Job {
    store: ObjectStore,
    fetcher: Fetcher,
    wanted: Wanted,
    file: CacheName,
    kind: Kind,
    keep: bool,
    hint: Option<Box<str>>,
    request: Request,
}

impl ObjectStore {
    /// The work of fetching what is asked for. With `look_again` it may have been stored since the last look.
    pub(super) fn download(&self, asked: &Asked<'_>, look_again: bool) -> BoxFuture<'static, ObjectResult> {
        if look_again && let Some(found) = self.cached(asked, &asked.file()) {
            return Box::pin(std::future::ready(Ok(Arc::new(found))));
        }
        let (kind, keep) = self.kind(&asked.name);
        let wanted = asked.wanted();
        let (request, fetcher) = match (request_for(asked, wanted.max_stored()), self.fetcher_of(asked)) {
            (Ok(request), Ok(fetcher)) => (request, fetcher.clone()),
            (Err(error), _) | (_, Err(error)) => return Box::pin(std::future::ready(Err(error))),
        };
        let hint = hint(asked).map(|hint| hint.as_ref().into());
        let job = Job { store: self.clone(), fetcher, wanted, file: asked.file(), kind, keep, hint, request };
        Box::pin(async move { job.run().await.map(Arc::new) })
    }
}

/// The request for what is asked for.
pub(super) fn request_for(asked: &Asked<'_>, max: u64) -> Result<Request, FetchError> {
    let context = &asked.context;
    let path = match (context.is_external, context.path) {
        (false, _) => asked.source.map_or_else(|| asked.name.path(), str::to_owned),
        (true, path) => {
            let text = path.and_then(|path| std::str::from_utf8(path).ok());
            let text = text.ok_or_else(|| FetchError::Refused {
                object: described(asked),
                reason: "the path of an external file must be known, and be UTF-8".to_owned(),
            })?;
            text.trim_start_matches('/').to_owned()
        }
    };
    Ok(Request {
        range: asked.range,
        caller: context.caller,
        file: hint(asked).map(std::borrow::Cow::into_owned),
        credentials: context.credentials.cloned(),
        ..Request::new(path, described(asked), max)
    })
}

impl Job {
    async fn run(&self) -> Result<CachedFile, FetchError> {
        if self.keep && self.store.cache().is_read_only() {
            return Err(stored(&self.wanted.name, rustix::io::Errno::ROFS.into()));
        }
        match self.wanted.size.filter(|size| *size <= InMemory::SMALL) {
            Some(size) => self.fetch_small(size).await,
            None => self.fetch_large().await,
        }
    }

    /// In memory first: the cache sees nothing of it before it is complete and verified.
    async fn fetch_small(&self, size: u64) -> Result<CachedFile, FetchError> {
        let mut sink = InMemory::new(self.wanted, size);
        let deadline = Deadline::after(LONGEST_DOWNLOAD);
        self.fetcher.transfer(&self.request, &mut sink, deadline).await?;
        let plain = sink.into_plain();
        let store = || {
            let mut txn = self.store.cache().begin(self.draft(Some(size)))?;
            txn.write_all(&plain)?;
            txn.commit()
        };
        store().map_err(|error| stored(&self.wanted.name, error))
    }

    /// Through a temporary file.
    async fn fetch_large(&self) -> Result<CachedFile, FetchError> {
        let failed = |error| stored(&self.wanted.name, error);
        let txn = self.store.cache().begin(self.draft(self.wanted.size)).map_err(failed)?;
        let mut sink = Verified::new(self.wanted, txn);
        let deadline = Deadline::after(LONGEST_DOWNLOAD);
        self.fetcher.transfer(&self.request, &mut sink, deadline).await?;
        sink.into_target().commit().map_err(failed)
    }

    fn draft(&self, expected: Option<u64>) -> Draft<'_> {
        Draft { name: &self.file, kind: self.kind, expected, hint: self.hint.as_deref(), keep: self.keep }
    }
}
