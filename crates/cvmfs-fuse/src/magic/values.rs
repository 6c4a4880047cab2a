//! The values of the magic attributes, in the words of the C++ client.

use std::fmt::Write;
use std::io::Read;

use cvmfs_client::config::Selection;
use cvmfs_client::deadline::Deadline;
use cvmfs_format::catalog::Counters;
use cvmfs_format::hash::Hasher;

use super::Value;
use crate::content::object_name;
use crate::filesystem::Mount;
use crate::logging::redaction::redacted;
use crate::nodes::Node;
use crate::view::ViewError;

/// Largest file of public keys that is shown.
const MAX_KEY_FILE: u64 = 64 << 10;

/// The value of the magic attribute `name`; `None` if there is none now.
pub(super) fn value(
    mount: &Mount,
    node: &Node,
    name: &str,
    deadline: Deadline,
) -> Result<Option<Value>, ViewError> {
    let entry = &node.located.entry;
    let text = match name {
        "user.catalog_counters" | "user.repo_counters" => counters(mount, node, name, deadline)?,
        "user.chunk_list" => return Ok(Some(Value::Lines(chunk_list(node).into_bytes()))),
        "user.chunks" => node.chunks.len().max(1).to_string(),
        "user.compression" => entry.compression().name().to_owned(),
        "user.direct_io" => u8::from(entry.is_direct_io()).to_string(),
        "user.external_file" => u8::from(entry.is_external()).to_string(),
        "user.hash" => return Ok(entry.hash.map(|hash| Value::Whole(hash.to_string().into_bytes()))),
        "user.lhash" => local_hash(mount, node),
        "user.rawlink" | "xfsroot.rawlink" => return Ok(Some(Value::Whole(entry.symlink.clone()))),
        _ => match of_revision(mount, name).or_else(|| of_process(mount, name)) {
            Some(text) => text,
            None => return Ok(of_network(mount, name)),
        },
    };
    Ok(Some(Value::Whole(text.into_bytes())))
}

/// What describes the repository and its revision.
fn of_revision(mount: &Mount, name: &str) -> Option<String> {
    let repository = mount.view.repository();
    let snapshot = repository.snapshot();
    let pin = snapshot.pinned();
    Some(match name {
        "user.authz" => String::from_utf8_lossy(snapshot.requirement()?).into_owned(),
        "user.expires" if repository.is_fixed() => "never (fixed root catalog)".into(),
        "user.expires" => (repository.ttl().as_secs() / 60).to_string(),
        "user.fqrn" => snapshot.fqrn().to_owned(),
        "user.nclg" => snapshot.attached().len().to_string(),
        "user.revision" => pin.revision.to_string(),
        "user.root_hash" => pin.root_hash.to_string(),
        "user.tag" => match &repository.settings().selection {
            Selection::Tag(tag) => tag.clone(),
            _ => String::new(),
        },
        _ => return None,
    })
}

/// What describes the client's process.
fn of_process(mount: &Mount, name: &str) -> Option<String> {
    let counted = || mount.call_statistics();
    let store = mount.view.repository().store();
    let traffic = store.counters();
    Some(match name {
        "user.hitrate" => match traffic.cache_hits + traffic.cache_misses {
            0 => "n/a".into(),
            all => format!("{:.3}", 100.0 * traffic.cache_hits as f64 / all as f64),
        },
        // Node ids are spread over all numbers.
        "user.inode_max" => u64::MAX.to_string(),
        "user.maxfd" => {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
            limit.current.unwrap_or(u64::MAX).to_string()
        }
        "user.ndiropen" => counted().opened_directories.to_string(),
        "user.nioerr" => counted().io_errors.to_string(),
        "user.nopen" => counted().opened_files.to_string(),
        "user.pid" => std::process::id().to_string(),
        "user.timestamp_last_ioerr" => counted().last_io_error.to_string(),
        "user.uptime" => (mount.started.elapsed().as_secs() / 60).to_string(),
        "user.usedfd" => counted().open_files.to_string(),
        "user.useddirp" => counted().open_directories.to_string(),
        "user.version" => concat!(env!("CARGO_PKG_VERSION"), ".0").to_owned(),
        _ => return None,
    })
}

/// What describes servers, proxies and traffic.
fn of_network(mount: &Mount, name: &str) -> Option<Value> {
    let store = mount.view.repository().store();
    let fetcher = store.fetcher();
    let traffic = store.counters();
    let (proxied, direct) = fetcher.timeouts();
    let text = match name {
        "user.external_host" => NO_HOST.into(),
        // The C++ client reports the direct one here.
        "user.external_timeout" | "user.timeout_direct" => direct.as_secs().to_string(),
        "user.timeout" => proxied.as_secs().to_string(),
        "user.host" => redacted(&store.status().host),
        "user.host_list" => {
            let hosts = fetcher.host_info();
            let first = hosts.iter().position(|host| host.is_current).unwrap_or(0);
            let urls = hosts.iter().map(|host| redacted(&host.url)).collect();
            rotated(urls, first).join(";")
        }
        "user.ndownload" => traffic.requests.to_string(),
        "user.ncleanup24" => traffic.evictions.to_string(),
        "user.proxy" => redacted(&store.status().proxy),
        "user.proxy_list" => {
            let groups = fetcher.proxy_info().groups;
            return Some(Value::Lines(lines(groups.iter().flatten().map(|proxy| redacted(&proxy.url)))));
        }
        "user.proxy_list_external" => return Some(Value::Lines(b"DIRECT\n".to_vec())),
        "user.pubkeys" => return Some(Value::Lines(public_keys(mount))),
        "user.rx" => (traffic.bytes_fetched / 1024).to_string(),
        "user.speed" => "n/a".into(),
        "user.repo_metainfo" => "metainfo not available".into(),
        "user.logbuffer" => String::new(),
        _ => return None,
    };
    Some(Value::Whole(text.into_bytes()))
}

/// What the C++ client shows instead of a host if there is none.
const NO_HOST: &str = "internal error: no hosts defined";

fn lines(texts: impl Iterator<Item = String>) -> Vec<u8> {
    texts.flat_map(|text| format!("{text}\n").into_bytes()).collect()
}

/// The list, beginning with the one at `first`.
fn rotated(mut list: Vec<String>, first: usize) -> Vec<String> {
    let first = first.min(list.len());
    list.rotate_left(first);
    list
}

fn public_keys(mount: &Mount) -> Vec<u8> {
    let mut text = Vec::new();
    for path in &mount.view.repository().settings().public_keys {
        if let Ok(file) = std::fs::File::open(path) {
            let _ = file.take(MAX_KEY_FILE).read_to_end(&mut text);
        }
    }
    text
}

/// The hash of the plain bytes in the cache.
fn local_hash(mount: &Mount, node: &Node) -> String {
    let entry = &node.located.entry;
    let store = mount.view.repository().store();
    let cached =
        object_name(node).and_then(|name| store.cached_object(&name, entry.compression(), Some(entry.size)));
    let (Some(cached), Some(hash)) = (cached, entry.hash) else { return "Not in cache".into() };
    let mut hasher = Hasher::new(hash.algorithm);
    let mut file = &cached.file;
    let mut part = vec![0; 1 << 16];
    loop {
        match file.read(&mut part) {
            Ok(0) => return hasher.finish().to_string(),
            Ok(length) => hasher.update(part.get(..length).unwrap_or_default()),
            Err(error) => return format!("Not in cache ({error})"),
        }
    }
}

fn chunk_list(node: &Node) -> String {
    let mut text = String::from("hash,offset,size\n");
    let entry = &node.located.entry;
    if node.chunks.is_empty()
        && let Some(hash) = entry.hash
    {
        let _ = writeln!(text, "{hash},0,{}", entry.size);
    }
    for chunk in &node.chunks {
        let _ = writeln!(text, "{},{},{}", chunk.hash, chunk.offset, chunk.size);
    }
    text
}

fn counters(mount: &Mount, node: &Node, name: &str, deadline: Deadline) -> Result<String, ViewError> {
    let snapshot = mount.view.repository().snapshot();
    if name == "user.repo_counters" {
        return Ok(counter_lines(&snapshot.counters(deadline)?));
    }
    let catalog = &node.located.catalog;
    Ok(format!(
        "catalog_hash: {}\ncatalog_mountpoint: {}\n{}",
        catalog.hash(),
        String::from_utf8_lossy(catalog.mountpoint()),
        counter_lines(&snapshot.catalog_counters(&node.located, deadline)?)
    ))
}

fn counter_lines(counters: &Counters) -> String {
    let mut text = String::new();
    for (prefix, counts) in [("self", &counters.own), ("subtree", &counters.subtree)] {
        for (name, value) in counts.iter() {
            let _ = writeln!(text, "{prefix}_{name},{value}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_hosts_begins_with_the_one_in_use() {
        let hosts = || ["a", "b", "c"].map(str::to_owned).to_vec();
        assert_eq!(rotated(hosts(), 1), ["b", "c", "a"]);
        assert_eq!(rotated(hosts(), 0), ["a", "b", "c"]);
        assert!(rotated(Vec::new(), 0).is_empty());
    }
}
