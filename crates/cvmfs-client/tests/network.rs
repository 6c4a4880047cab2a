//! What users see when servers, proxies and networks misbehave.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use cvmfs_client::deadline::{Interrupt, Patience};
use cvmfs_client::error::ClientError;
use cvmfs_client::network::{Cause, FetchError};
use cvmfs_client::store::ObjectStore;
use cvmfs_format::compression::Compression;
use cvmfs_format::hash::ObjectName;
use support::{Bench, cached_files, closed_port, content, noise, seconds, temporary_files};
use testkit::{Fault, Origin};

fn fetch(store: &ObjectStore, name: &ObjectName, plain: &[u8]) -> Result<(), FetchError> {
    let file = store.object(name, Compression::Zlib, Some(plain.len() as u64), seconds(20))?;
    assert_eq!(content(&file), plain);
    Ok(())
}

#[test]
fn row_04_a_dead_proxy_is_replaced_at_once_by_the_next_one() {
    let bench = Bench::new();
    let plain = noise(1, 5000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let proxies = format!("{};{}", closed_port(), origin.url());
    let store = bench.store("http://origin.invalid/", &[("CVMFS_HTTP_PROXY", &proxies)]);
    let started = Instant::now();
    fetch(&store, &name, &plain).unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(origin.requests().iter().all(|request| request.absolute), "asked as a proxy");
    assert_eq!(store.status().proxy, origin.url());
    assert_eq!(store.counters().fail_overs, 1);
    // The verdict is remembered: the next object does not ask the dead proxy again.
    let other = bench.publish_file(b"other");
    fetch(&store, &other, b"other").unwrap();
    assert_eq!(store.counters().network_errors, 1);
}

#[test]
fn row_19_direct_is_never_used_where_it_is_not_listed() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    let proxies = format!("{}|{}", closed_port(), closed_port());
    let store = bench.store(&origin.url(), &[("CVMFS_HTTP_PROXY", &proxies)]);
    let error = fetch(&store, &name, b"x").unwrap_err();
    assert!(matches!(error, FetchError::Network { cause: Cause::Connect(_), .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&name.to_string())
            && text.contains(&origin.url())
            && text.contains("proxy http://127.0.0.1"),
        "{text}"
    );
    assert_eq!(origin.connections(), 0);
}

#[test]
fn direct_is_used_when_all_proxies_before_it_are_dead() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[("CVMFS_HTTP_PROXY", &format!("{};DIRECT", closed_port()))]);
    fetch(&store, &name, b"x").unwrap();
    assert_eq!(store.status().proxy, "DIRECT");
}

#[test]
fn row_07_a_slow_proxy_is_not_replaced_by_direct() {
    let bench = Bench::new();
    let plain = noise(2, 100_000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let proxy = Origin::serve(bench.storage()).unwrap();
    proxy.set_fault("*", Fault::Slow(100));
    let options = [
        ("CVMFS_HTTP_PROXY", &*format!("{};DIRECT", proxy.url())),
        ("CVMFS_TIMEOUT", "1"),
        ("CVMFS_MAX_RETRIES", "0"),
    ];
    let store = bench.store(&origin.url(), &options);
    let error = fetch(&store, &name, &plain).unwrap_err();
    assert!(matches!(error, FetchError::Network { cause: Cause::TooSlow { .. }, .. }), "{error}");
    assert_eq!(origin.connections(), 0, "DIRECT is no way around a slow proxy");
    proxy.clear_faults();
    fetch(&store, &name, &plain).unwrap();
    assert_eq!(store.status().proxy, proxy.url(), "slow is not dead");
}

#[test]
fn row_20_the_preferred_proxy_comes_back_after_its_reset_time() {
    let bench = Bench::new();
    let names: Vec<_> = (0..3_u8).map(|number| bench.publish_file(&[number; 10])).collect();
    let second = Origin::serve(bench.storage()).unwrap();
    let first = Origin::serve(bench.storage()).unwrap();
    let address = first.address();
    drop(first);
    let proxies = format!("http://{address};{}", second.url());
    let store = bench
        .store("http://origin.invalid", &[("CVMFS_HTTP_PROXY", &proxies), ("CVMFS_PROXY_RESET_AFTER", "1")]);
    fetch(&store, &names[0], &[0; 10]).unwrap();
    assert_eq!(store.status().proxy, second.url());
    let first = Origin::serve_at(bench.storage(), address).unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    fetch(&store, &names[1], &[1; 10]).unwrap();
    assert_eq!(support::requests(&first, 1), 1);
    assert_eq!(store.status().proxy, first.url());
}

#[test]
fn row_06_a_server_that_never_answers_ends_with_the_deadline() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Hang);
    let store = bench.store(&origin.url(), &[]);
    let started = Instant::now();
    let error = store.object(&name, Compression::Zlib, Some(1), seconds(1)).unwrap_err();
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
    assert!(matches!(error, FetchError::Deadline { .. }), "{error}");
    assert!(error.to_string().contains(&origin.url()), "{error}");
    assert_eq!(ClientError::from(error).errno(), libc::ETIMEDOUT);
}

#[test]
fn an_interrupted_reader_leaves_at_once() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Hang);
    let store = bench.store(&origin.url(), &[]);
    let interrupt = Interrupt::new();
    let raise = interrupt.clone();
    let signal = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        raise.raise();
    });
    let started = Instant::now();
    let patience = Patience { deadline: seconds(20), interrupt: Some(&interrupt) };
    let error = store.object(&name, Compression::Zlib, Some(1), patience).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!(ClientError::from(error).errno(), libc::EINTR);
    signal.join().unwrap();
}

#[test]
fn row_06_a_silent_host_is_left_for_the_next_one() {
    let bench = Bench::new();
    let plain = noise(3, 2000);
    let name = bench.publish_file(&plain);
    let silent = Origin::serve(bench.storage()).unwrap();
    silent.set_fault("*", Fault::Hang);
    let origin = Origin::serve(bench.storage()).unwrap();
    let servers = format!("{};{}", silent.url(), origin.url());
    let store = bench.store(&servers, &[("CVMFS_TIMEOUT_DIRECT", "1")]);
    let started = Instant::now();
    fetch(&store, &name, &plain).unwrap();
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    assert_eq!(store.status().host, origin.url());
}

#[test]
fn row_08_a_cut_body_is_fetched_again_and_never_enters_the_cache() {
    let bench = Bench::new();
    let plain = noise(4, 50_000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault_times("*", Fault::Truncate(20_000), 1);
    let store = bench.store(&origin.url(), &[]);
    fetch(&store, &name, &plain).unwrap();
    assert_eq!(store.counters().network_errors, 1);

    let other = bench.publish_file(&noise(5, 50_000));
    origin.set_fault("*", Fault::Truncate(20_000));
    let error = fetch(&store, &other, &noise(5, 50_000)).unwrap_err();
    assert!(matches!(error, FetchError::Network { cause: Cause::Cut(_), .. }), "{error}");
    assert_eq!(cached_files(store.cache().directory()).len(), 1, "only the whole object is in the cache");
    assert_eq!(temporary_files(store.cache().directory()), 0);
}

#[test]
fn a_reset_connection_is_forgiven_once() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault_times("*", Fault::Reset, 1);
    let store = bench.store(&origin.url(), &[("CVMFS_MAX_RETRIES", "0")]);
    fetch(&store, &name, b"x").unwrap();
}

#[test]
fn row_11_an_object_that_one_host_lacks_comes_from_the_other() {
    let bench = Bench::new();
    let plain = noise(6, 3000);
    let name = bench.publish_file(&plain);
    let lagging = Origin::serve(tempfile::tempdir().unwrap().path()).unwrap();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&format!("{};{}", lagging.url(), origin.url()), &[]);
    fetch(&store, &name, &plain).unwrap();
    assert_eq!(store.status().host, origin.url(), "the host that had it is preferred from now on");
}

#[test]
fn row_11_an_object_that_no_host_has_is_not_found_and_not_asked_for_again_at_once() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    std::fs::remove_file(bench.storage().join(name.path())).unwrap();
    let hosts = [Origin::serve(bench.storage()).unwrap(), Origin::serve(bench.storage()).unwrap()];
    let store = bench.store(&format!("{};{}", hosts[0].url(), hosts[1].url()), &[]);
    for _ in 0..20 {
        let error = fetch(&store, &name, b"x").unwrap_err();
        assert!(matches!(error, FetchError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(&name.to_string()), "{error}");
    }
    assert_eq!(store.counters().requests, 2, "one request to each host, whoever asks how often");
    assert_eq!(store.counters().failures, 20);
}

#[test]
fn statuses_are_told_to_the_user() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    for (status, words) in [(500, "HTTP status 500"), (403, "HTTP status 403"), (302, "redirect")] {
        origin.clear_faults();
        origin.set_fault("*", Fault::Status(status));
        let error = fetch(&bench.store(&origin.url(), &[]), &name, b"x").unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn row_15_a_login_page_for_everything_is_refused_and_not_kept() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Replace(b"<html>please log in</html>".to_vec()));
    let store = bench.store(&origin.url(), &[]);
    let error = fetch(&store, &name, b"x").unwrap_err();
    assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    assert_eq!(cached_files(store.cache().directory()).len(), 0);
}

#[test]
fn row_17_a_body_much_larger_than_the_object_is_aborted() {
    let bench = Bench::new();
    let name = bench.publish_file(b"small");
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Replace(vec![b'x'; 64 << 20]));
    let store = bench.store(&origin.url(), &[]);
    let error = fetch(&store, &name, b"small").unwrap_err();
    assert!(error.to_string().contains("larger than"), "{error}");
    assert!(store.counters().bytes_fetched < 1 << 20);
}

#[test]
fn the_client_introduces_itself_as_cvmfs() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    fetch(&bench.store(&origin.url(), &[]), &name, b"x").unwrap();
    support::requests(&origin, 1);
    let requests = origin.requests();
    assert!(requests[0].headers["user-agent"].starts_with("cvmfs Fuse "), "{requests:?}");
    assert!(!requests[0].headers.contains_key("accept-encoding"));
}

#[test]
fn one_connection_serves_many_objects() {
    let bench = Bench::new();
    let names: Vec<_> = (0..50_u8).map(|number| bench.publish_file(&[number; 100])).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    for (number, name) in (0..).zip(&names) {
        fetch(&store, name, &[number; 100]).unwrap();
    }
    // One, plus what may be opened in vain while the first is on its way back to the pool.
    assert!(origin.connections() <= 5, "{} connections", origin.connections());
}

#[test]
fn row_24_ten_thousand_cold_opens_share_a_bounded_number_of_connections() {
    let bench = Bench::new();
    let names: Vec<_> = (0..500_u32).map(|number| bench.publish_file(&number.to_le_bytes())).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    std::thread::scope(|scope| {
        for part in 0..100_usize {
            let (store, names) = (&store, &names);
            scope.spawn(move || {
                for step in 0..100 {
                    let number = (part * 31 + step * 7) % names.len();
                    fetch(store, &names[number], &(number as u32).to_le_bytes()).unwrap();
                }
            });
        }
    });
    // At most 16 at once; a connection may be opened in vain while another one becomes free.
    assert!(origin.connections() <= 32, "{} connections", origin.connections());
    assert_eq!(store.counters().requests, 500);
}
