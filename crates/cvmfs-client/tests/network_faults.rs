//! Rows of the fault matrix that concern servers, proxies and what lies between: real sockets, real misbehaviour.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use cvmfs_client::clock::SystemClock;
use cvmfs_client::network::{Cause, FetchError, ProxyState};
use cvmfs_client::repository::Repository;
use cvmfs_client::store::ObjectStore;
use cvmfs_format::compression::Compression;
use cvmfs_format::hash::{ObjectKind, ObjectName};
use support::{Bench, cached_files, closed_port, content, noise, republish, seconds};
use testkit::{BlackHole, Fault, Fixture, Length, NameServer, Origin, Relay};

fn fetch(store: &ObjectStore, name: &ObjectName, plain: &[u8]) -> Result<(), FetchError> {
    let file = store.object(name, Compression::Zlib, Some(plain.len() as u64), seconds(25))?;
    assert_eq!(content(&file), plain);
    Ok(())
}

/// The states of all proxies in the order of the list.
fn states(store: &ObjectStore) -> Vec<ProxyState> {
    store.fetcher().proxy_info().groups.into_iter().flatten().map(|proxy| proxy.state).collect()
}

/// An answer of a server with a status and header lines.
fn answer(status: u16, headers: &[(&str, &str)]) -> Fault {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Fault::Answer { status, headers }
}

#[test]
fn row_01_names_that_do_not_exist_are_passed_over_and_cached_data_stays_readable() {
    let bench = Bench::new();
    let (name, other) = (bench.publish_file(b"x"), bench.publish_file(b"y"));
    let origin = Origin::serve(bench.storage()).unwrap();
    let names = NameServer::start().unwrap();
    let server = names.address();
    let dns = ("CVMFS_DNS_SERVER", server.as_str());

    let hosts = format!("http://nowhere.test.example;{}", origin.url());
    let store = bench.store(&hosts, &[dns]);
    fetch(&store, &name, b"x").unwrap();
    assert_eq!(store.status().host, origin.url());

    let proxies = format!("http://nosquid.test.example:3128|{}", origin.url());
    let store = bench.store("http://origin.invalid", &[dns, ("CVMFS_HTTP_PROXY", &proxies)]);
    fetch(&store, &other, b"y").unwrap();
    let entries = store.fetcher().proxy_info().groups.remove(0);
    assert_eq!(entries[0].state, ProxyState::Unresolved);

    let store = bench.store("http://nowhere.test.example", &[dns]);
    fetch(&store, &name, b"x").unwrap();
    let started = Instant::now();
    let missing = ObjectName::new(
        cvmfs_format::hash::ContentHash::null(cvmfs_format::hash::HashAlgorithm::Sha1),
        ObjectKind::File,
    );
    let error = fetch(&store, &missing, b"z").unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert!(matches!(error, FetchError::Network { cause: Cause::Resolve(_), .. }), "{error}");
    assert!(error.to_string().contains("nowhere.test.example"), "{error}");
}

#[test]
fn row_02_a_silent_name_server_costs_its_own_time_out_once_and_not_per_request() {
    let bench = Bench::new();
    let files: Vec<_> = (0..20_u8).map(|number| bench.publish_file(&[number; 8])).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let names = NameServer::start().unwrap();
    names.set_silent(true);
    let proxies = format!("http://squid.test.example:3128;{}", origin.url());
    let options = [
        ("CVMFS_DNS_SERVER", names.address()),
        ("CVMFS_DNS_TIMEOUT", "1".to_owned()),
        ("CVMFS_DNS_RETRIES", "0".to_owned()),
        ("CVMFS_HTTP_PROXY", proxies),
    ];
    let options: Vec<(&str, &str)> = options.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let store = bench.store("http://origin.invalid", &options);
    let started = Instant::now();
    fetch(&store, &files[0], &[0; 8]).unwrap();
    let first = started.elapsed();
    assert!(first < Duration::from_secs(8), "{first:?}");
    let asked = names.queries("squid.test.example");
    for (number, file) in (0_u8..).zip(&files).skip(1) {
        fetch(&store, file, &[number; 8]).unwrap();
    }
    assert_eq!(names.queries("squid.test.example"), asked, "the name is left alone for its time");
    assert_eq!(store.status().proxy, origin.url());
}

#[test]
fn row_03_a_name_with_many_addresses_and_no_lifetime_is_asked_for_once_and_capped() {
    let bench = Bench::new();
    let files: Vec<_> = (0..20_u8).map(|number| bench.publish_file(&[number; 8])).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let names = NameServer::start().unwrap();
    // Every address of 127/8 leads to the origin only if it listens there, so all but one are dead.
    let many: Vec<String> = (1..=60).map(|number| format!("127.0.0.{number}")).collect();
    names.set("squids.test.example", &many.iter().map(String::as_str).collect::<Vec<_>>(), 0);
    names.set("squid.test.example", &["127.0.0.1"], 0);
    let proxies = format!(
        "http://squid.test.example:{port};http://squids.test.example:{port}",
        port = origin.address().port()
    );
    let options = [("CVMFS_DNS_SERVER", names.address()), ("CVMFS_HTTP_PROXY", proxies)];
    let options: Vec<(&str, &str)> = options.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let store = bench.store("http://origin.invalid", &options);
    for (number, file) in (0_u8..).zip(&files) {
        fetch(&store, file, &[number; 8]).unwrap();
    }
    let info = store.fetcher().proxy_info();
    assert_eq!((info.groups[0].len(), info.groups[1].len()), (1, 16));
    assert_eq!(info.groups[0][0].name.as_deref(), Some("squid.test.example"));
    assert!(names.queries("squid.test.example") <= 2, "one query for each family");
}

#[test]
fn row_05_a_black_hole_is_left_after_the_connect_time_out_by_all_at_once() {
    let bench = Bench::new();
    let files: Vec<_> = (0..20_u8).map(|number| bench.publish_file(&[number; 8])).collect();
    let hole = BlackHole::open().unwrap();
    let origin = Origin::serve(bench.storage()).unwrap();
    let proxies = format!("{};{}", hole.url(), origin.url());
    let store =
        bench.store("http://origin.invalid", &[("CVMFS_HTTP_PROXY", &proxies), ("CVMFS_TIMEOUT", "2")]);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for (number, file) in (0_u8..).zip(&files) {
            let store = &store;
            scope.spawn(move || fetch(store, file, &[number; 8]).unwrap());
        }
    });
    // Sixteen connect at once, four wait for their turn and know better then.
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    assert!(store.counters().network_errors <= 16);
    assert_eq!(states(&store), [ProxyState::Burned, ProxyState::Alive]);
}

#[test]
fn row_06_a_proxy_that_accepts_and_never_answers_is_left_and_not_burned_at_once() {
    let bench = Bench::new();
    let (name, other) = (bench.publish_file(b"x"), bench.publish_file(b"y"));
    let silent = Origin::serve(bench.storage()).unwrap();
    silent.set_fault("*", Fault::Hang);
    let good = Origin::serve(bench.storage()).unwrap();
    let direct = Origin::serve(bench.storage()).unwrap();
    let proxies = format!("{};{};DIRECT", silent.url(), good.url());
    let store = bench.store(&direct.url(), &[("CVMFS_HTTP_PROXY", &proxies), ("CVMFS_TIMEOUT", "1")]);
    fetch(&store, &name, b"x").unwrap();
    fetch(&store, &other, b"y").unwrap();
    assert_eq!(states(&store), [ProxyState::Slow, ProxyState::Alive, ProxyState::Alive]);
    assert_eq!(store.counters().network_errors, 1, "the second request knows");
    assert_eq!(direct.connections(), 0);
    // The only proxy left stays silent for long: now DIRECT, which is listed, has its turn.
    good.set_fault("*", Fault::Hang);
    let third = bench.publish_file(b"z");
    fetch(&store, &third, b"z").unwrap();
    assert_eq!(support::requests(&direct, 1), 1);
    assert_eq!(store.fetcher().counters().past_proxies, 1);
}

#[test]
fn row_07_a_dripping_proxy_is_slow_and_another_one_serves_meanwhile() {
    let bench = Bench::new();
    let plain = noise(7, 50_000);
    let name = bench.publish_file(&plain);
    let dripping = Origin::serve(bench.storage()).unwrap();
    dripping.set_fault("*", Fault::Slow(1));
    let good = Origin::serve(bench.storage()).unwrap();
    let direct = Origin::serve(bench.storage()).unwrap();
    let proxies = format!("{};{};DIRECT", dripping.url(), good.url());
    let options = [
        ("CVMFS_HTTP_PROXY", proxies.as_str()),
        ("CVMFS_TIMEOUT", "1"),
        ("CVMFS_MAX_RETRIES", "0"),
        ("CVMFS_PROXY_RESET_AFTER", "0"),
    ];
    let store = bench.store(&direct.url(), &options);
    fetch(&store, &name, &plain).unwrap();
    assert_eq!(states(&store), [ProxyState::Slow, ProxyState::Alive, ProxyState::Alive]);
    assert_eq!(store.status().proxy, good.url());
    assert_eq!(store.fetcher().counters().slow_proxies, 1);
    // The good one dies: the slow one is still better than none.
    drop(good);
    dripping.clear_faults();
    let other = bench.publish_file(b"y");
    fetch(&store, &other, b"y").unwrap();
    assert_eq!(store.status().proxy, dripping.url());
    assert_eq!(direct.connections(), 0);
}

#[test]
fn row_08_a_connection_that_is_reset_mid_body_is_repeated_once_and_then_left() {
    let bench = Bench::new();
    let plain = noise(8, 200_000);
    let (name, other) = (bench.publish_file(&plain), bench.publish_file(&noise(9, 200_000)));
    let hosts = [Origin::serve(bench.storage()).unwrap(), Origin::serve(bench.storage()).unwrap()];
    let store = bench.store(&format!("{};{}", hosts[0].url(), hosts[1].url()), &[]);
    hosts[0].set_fault_times("*", Fault::ResetAfter(70_000), 1);
    fetch(&store, &name, &plain).unwrap();
    assert_eq!(hosts[1].connections(), 0, "once more by the same way");
    hosts[0].set_fault("*", Fault::ResetAfter(70_000));
    fetch(&store, &other, &noise(9, 200_000)).unwrap();
    assert_eq!(store.status().host, hosts[1].url());
    assert_eq!(cached_files(store.cache().directory()).len(), 2, "no part of a file is in the cache");
}

#[test]
fn row_09_a_kept_connection_that_was_dropped_silently_is_nobodys_fault() {
    let bench = Bench::new();
    let (name, other) = (bench.publish_file(b"x"), bench.publish_file(b"y"));
    let proxy = Origin::serve(bench.storage()).unwrap();
    proxy.set_fault("*", Fault::HangReused);
    let spare = Origin::serve(bench.storage()).unwrap();
    let proxies = format!("{};{}", proxy.url(), spare.url());
    let options =
        [("CVMFS_HTTP_PROXY", proxies.as_str()), ("CVMFS_TIMEOUT", "1"), ("CVMFS_MAX_RETRIES", "0")];
    let store = bench.store("http://origin.invalid", &options);
    fetch(&store, &name, b"x").unwrap();
    fetch(&store, &other, b"y").unwrap();
    assert_eq!((proxy.connections(), spare.connections()), (2, 0), "a fresh connection to the same proxy");
    assert_eq!(states(&store), [ProxyState::Alive, ProxyState::Alive]);
    let counters = store.fetcher().counters();
    assert_eq!((counters.errors, counters.fail_overs, counters.stale_connections), (0, 0, 1));
}

#[test]
fn row_09_a_server_that_closed_an_idle_connection_is_asked_again_at_once() {
    let bench = Bench::new();
    let (name, other) = (bench.publish_file(b"x"), bench.publish_file(b"y"));
    let origin = Origin::serve(bench.storage()).unwrap();
    let address = origin.address();
    let store = bench.store(&origin.url(), &[("CVMFS_MAX_RETRIES", "0")]);
    fetch(&store, &name, b"x").unwrap();
    drop(origin);
    let _origin = Origin::serve_at(bench.storage(), address).unwrap();
    fetch(&store, &other, b"y").unwrap();
    assert_eq!(store.fetcher().counters().errors, 0);
}

#[test]
fn row_10_a_lossy_link_causes_no_flapping() {
    let bench = Bench::new();
    let files: Vec<_> = (0..150_u8).map(|number| bench.publish_file(&noise(number.into(), 6000))).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    let jitter = Duration::from_millis(100);
    let links = [
        Relay::lossy(origin.address(), jitter, 5).unwrap(),
        Relay::lossy(origin.address(), jitter, 5).unwrap(),
    ];
    let proxies = format!("{}|{}", links[0].url(), links[1].url());
    let store = bench.store("http://origin.invalid", &[("CVMFS_HTTP_PROXY", &proxies)]);
    std::thread::scope(|scope| {
        for part in files.chunks(20).enumerate() {
            let store = &store;
            scope.spawn(move || {
                for (offset, file) in part.1.iter().enumerate() {
                    fetch(store, file, &noise((part.0 * 20 + offset) as u64, 6000)).unwrap();
                }
            });
        }
    });
    let counters = store.fetcher().counters();
    assert!(counters.fail_overs <= 1, "{counters:?}");
}

#[test]
fn row_12_a_missing_manifest_keeps_the_revision_in_use() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let repository = open(&fixture, &origin.url()).unwrap();
    let revision = repository.snapshot().pinned().revision;
    republish(&fixture, |manifest| manifest.revision += 1);
    origin.set_fault("*/.cvmfspublished", Fault::Status(404));
    let error = repository.refresh(seconds(20)).unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    assert_eq!(repository.snapshot().pinned().revision, revision);
    repository.snapshot().root(seconds(20)).unwrap();
    origin.clear_faults();
    repository.refresh(seconds(20)).unwrap();
    assert_eq!(repository.snapshot().pinned().revision, revision + 1);
}

fn open(fixture: &Fixture, servers: &str) -> Result<Repository, cvmfs_client::error::ClientError> {
    let key = fixture.master_pub.to_str().unwrap();
    let options = [("CVMFS_SERVER_URL", servers), ("CVMFS_PUBLIC_KEY", key), ("CVMFS_TIMEOUT_DIRECT", "2")];
    let settings = support::settings(&fixture.fqrn, fixture.dir.path(), &options);
    Repository::open(settings, Arc::new(SystemClock))
}

#[test]
fn row_13_errors_of_the_host_change_the_host_and_errors_of_the_proxy_the_proxy() {
    for status in [400, 404, 500, 502, 503, 504, 429] {
        let bench = Bench::new();
        let name = bench.publish_file(b"x");
        let proxy = Origin::serve(bench.storage()).unwrap();
        proxy.set_fault_times("*", Fault::Status(status), 1);
        let proxies = format!("{};{}", proxy.url(), closed_port());
        let hosts = "http://first.invalid;http://second.invalid";
        let store = bench.store(hosts, &[("CVMFS_HTTP_PROXY", &proxies), ("CVMFS_MAX_RETRIES", "0")]);
        fetch(&store, &name, b"x").unwrap_or_else(|error| panic!("{status}: {error}"));
        assert_eq!(store.status().host, "http://second.invalid", "{status}");
        assert_eq!(states(&store), [ProxyState::Alive, ProxyState::Alive], "{status}");
    }
    let of_the_proxy = [
        answer(403, &[]),
        answer(407, &[]),
        answer(503, &[("X-Squid-Error", "ERR_CANNOT_FORWARD 0")]),
        answer(502, &[("Proxy-Status", "squid; error=proxy_internal_error")]),
    ];
    for fault in of_the_proxy {
        let bench = Bench::new();
        let name = bench.publish_file(b"x");
        let (bad, good) = (Origin::serve(bench.storage()).unwrap(), Origin::serve(bench.storage()).unwrap());
        bad.set_fault("*", fault.clone());
        let proxies = format!("{};{}", bad.url(), good.url());
        let hosts = "http://first.invalid;http://second.invalid";
        let store = bench.store(hosts, &[("CVMFS_HTTP_PROXY", &proxies)]);
        fetch(&store, &name, b"x").unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert_eq!(store.status().host, "http://first.invalid", "{fault:?}");
        assert_eq!(states(&store), [ProxyState::Burned, ProxyState::Alive], "{fault:?}");
    }
}

#[test]
fn row_13_a_host_that_the_proxy_cannot_reach_is_left_and_the_proxy_stays() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let proxy = Origin::serve(bench.storage()).unwrap();
    proxy.set_fault_times("*", answer(503, &[("X-Squid-Error", "ERR_CONNECT_FAIL 111")]), 1);
    let direct = Origin::serve(bench.storage()).unwrap();
    let hosts = format!("{};http://second.invalid", direct.url());
    let store = bench.store(&hosts, &[("CVMFS_HTTP_PROXY", &format!("{};DIRECT", proxy.url()))]);
    fetch(&store, &name, b"x").unwrap();
    assert_eq!(store.status().host, "http://second.invalid");
    assert_eq!(direct.connections(), 0, "the proxy lives, so there is no way around it");
}

#[test]
fn row_13_a_server_that_asks_for_a_pause_gets_it() {
    let bench = Bench::new();
    let names: Vec<_> = (0..4_u8).map(|number| bench.publish_file(&[number; 8])).collect();
    let origin = Origin::serve(bench.storage()).unwrap();
    for status in [429, 503] {
        origin.clear_faults();
        origin.clear_requests();
        origin.set_fault_times("*", answer(status, &[("Retry-After", "2")]), 1);
        let cache = tempfile::tempdir().unwrap();
        let options = [("CVMFS_CACHE_BASE", cache.path().to_str().unwrap())];
        let store = bench.store(&origin.url(), &options);
        let started = Instant::now();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| fetch(&store, &names[0], &[0; 8]).unwrap());
            support::requests(&origin, 1);
            // The answer is on its way; that it was read shows nowhere but in what happens next.
            std::thread::sleep(Duration::from_millis(300));
            // Others that come meanwhile wait as well.
            fetch(&store, &names[1], &[1; 8]).unwrap();
            assert!(started.elapsed() >= Duration::from_millis(1900), "{status}: {:?}", started.elapsed());
            first.join().unwrap();
        });
        assert!(started.elapsed() < Duration::from_secs(10), "{status}: {:?}", started.elapsed());
    }
}

#[test]
fn row_14_redirects_are_followed_only_if_allowed_only_to_http_and_only_four_times() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let target = Origin::serve(bench.storage()).unwrap();
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = |follow: &str| {
        let cache = tempfile::tempdir().unwrap().keep();
        let options = [("CVMFS_FOLLOW_REDIRECTS", follow), ("CVMFS_CACHE_BASE", cache.to_str().unwrap())];
        bench.store(&origin.url(), &options)
    };
    let elsewhere = format!("{}/{}", target.url(), name.path());
    for status in [301, 302, 303, 307] {
        origin.set_fault("*", answer(status, &[("Location", &elsewhere)]));
        fetch(&store("yes"), &name, b"x").unwrap_or_else(|error| panic!("{status}: {error}"));
        let error = fetch(&store("no"), &name, b"x").unwrap_err().to_string();
        assert!(error.contains("CVMFS_FOLLOW_REDIRECTS"), "{error}");
    }
    let own = format!("/{}", name.path());
    for (location, words) in [
        (own.as_str(), "more than 4"),
        ("file:///etc/passwd", "not http"),
        ("gopher://x/", "not http"),
        ("", ""),
    ] {
        origin.clear_faults();
        origin.clear_requests();
        origin.set_fault("*", answer(302, &[("Location", location)]));
        let error = fetch(&store("yes"), &name, b"x").unwrap_err().to_string();
        assert!(error.contains(words), "{location}: {error}");
        assert!(origin.requests().len() <= 10, "{location}: {} requests", origin.requests().len());
    }
}

#[test]
fn row_15_a_login_page_keeps_the_revision_in_use() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let repository = open(&fixture, &origin.url()).unwrap();
    origin.set_fault("*", Fault::Replace(b"<html>please log in</html>".to_vec()));
    let error = repository.refresh(seconds(20)).unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    repository.snapshot().root(seconds(20)).unwrap();
    assert!(repository.status().last_error.is_some());
}

#[test]
fn row_16_a_wrong_length_is_found_and_a_missing_one_does_no_harm() {
    let bench = Bench::new();
    let plain = noise(16, 30_000);
    let name = bench.publish_file(&plain);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = || {
        let cache = tempfile::tempdir().unwrap().keep();
        let options = [("CVMFS_CACHE_BASE", cache.to_str().unwrap()), ("CVMFS_MAX_RETRIES", "0")];
        bench.store(&origin.url(), &options)
    };
    for fine in [Length::Absent, Length::Chunked] {
        origin.set_fault("*", Fault::Length(fine));
        fetch(&store(), &name, &plain).unwrap_or_else(|error| panic!("{fine:?}: {error}"));
    }
    origin.set_fault("*", Fault::Length(Length::Longer(10)));
    let error = fetch(&store(), &name, &plain).unwrap_err();
    assert!(matches!(error, FetchError::Network { cause: Cause::Cut(_), .. }), "{error}");
    origin.set_fault("*", Fault::Length(Length::Shorter(10)));
    let error = fetch(&store(), &name, &plain).unwrap_err();
    assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    // What came too much on one connection is no answer to the next request.
    origin.clear_faults();
    origin.set_fault_times("*", Fault::Length(Length::Shorter(10)), 1);
    fetch(&store(), &name, &plain).unwrap();
}

#[test]
fn row_17_a_body_without_end_is_aborted_at_the_possible_size() {
    let bench = Bench::new();
    let name = bench.publish_file(b"small");
    let origin = Origin::serve(bench.storage()).unwrap();
    origin.set_fault("*", Fault::Endless);
    let store = bench.store(&origin.url(), &[]);
    let error = fetch(&store, &name, b"small").unwrap_err();
    assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    assert!(store.counters().bytes_fetched < 1 << 20, "{}", store.counters().bytes_fetched);
}

#[test]
fn row_18_a_decompression_bomb_stops_at_the_declared_size() {
    let bench = Bench::new();
    let bomb = vec![0; 64 << 20];
    let name = bench.publish_file(&bomb);
    let origin = Origin::serve(bench.storage()).unwrap();
    let store = bench.store(&origin.url(), &[]);
    let error = store.object(&name, Compression::Zlib, Some(1000), seconds(20)).unwrap_err();
    assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    assert_eq!(cached_files(store.cache().directory()).len(), 0);
    // Each process keeps small records of its own there; nothing of the bomb may be left beside them.
    let processes = std::fs::read_dir(store.cache().directory().join("txn")).unwrap();
    let kept = processes.flat_map(|process| std::fs::read_dir(process.unwrap().path()).unwrap());
    let bytes: u64 = kept.map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes < 64 << 10, "{bytes} bytes are left");
}

#[test]
fn row_19_with_all_proxies_dead_there_is_an_error_in_time_and_no_direct_connection() {
    let bench = Bench::new();
    let name = bench.publish_file(b"x");
    let origin = Origin::serve(bench.storage()).unwrap();
    let hole = BlackHole::open().unwrap();
    let proxies = format!("{}|{};{}", closed_port(), hole.url(), closed_port());
    let options = [
        ("CVMFS_HTTP_PROXY", proxies.as_str()),
        ("CVMFS_TIMEOUT", "1"),
        ("CVMFS_FALLBACK_PROXY", &closed_port()),
    ];
    let store = bench.store(&format!("{0};{0}", origin.url()), &options);
    let started = Instant::now();
    assert!(fetch(&store, &name, b"x").is_err());
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert_eq!(origin.connections(), 0);
}

#[test]
fn row_21_after_an_outage_everything_works_again_without_help() {
    let fixture = Fixture::unpack("basic-sha1").unwrap();
    let origin = Origin::serve(&fixture.storage).unwrap();
    let (address, url) = (origin.address(), origin.url());
    let repository = open(&fixture, &url).unwrap();
    drop(origin);
    repository.snapshot().root(seconds(20)).unwrap();
    for _ in 0..3 {
        let started = Instant::now();
        let error = repository.refresh(seconds(10)).unwrap_err();
        assert_eq!(error.exit_code(), 4, "{error}");
        assert!(started.elapsed() < Duration::from_secs(11));
    }
    assert!(!repository.store().status().online);
    let revision = repository.snapshot().pinned().revision;
    republish(&fixture, |manifest| manifest.revision += 1);
    let _origin = Origin::serve_at(&fixture.storage, address).unwrap();
    repository.refresh(seconds(20)).unwrap();
    assert_eq!(repository.snapshot().pinned().revision, revision + 1);
    assert!(repository.store().status().online);
}

#[test]
fn row_22_a_proxy_with_a_damaged_copy_is_asked_past_its_cache_and_then_another_host() {
    let bench = Bench::new();
    let (plain, other) = (noise(22, 5000), noise(23, 5000));
    let (name, second) = (bench.publish_file(&plain), bench.publish_file(&other));
    let proxy = Origin::serve(bench.storage()).unwrap();
    proxy.set_fault("*", Fault::Stale(b"not the object".to_vec()));
    let hosts = "http://first.invalid;http://second.invalid";
    let store = bench.store(hosts, &[("CVMFS_HTTP_PROXY", &proxy.url())]);
    fetch(&store, &name, &plain).unwrap();
    assert_eq!(store.status().host, "http://first.invalid");
    let requests = proxy.requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[1].headers.get("pragma").map(String::as_str), Some("no-cache"));
    proxy.clear_faults();
    proxy.set_fault_times("*", Fault::Replace(b"transcoded".to_vec()), 2);
    fetch(&store, &second, &other).unwrap();
    assert_eq!(
        store.status().host,
        "http://second.invalid",
        "the same wrong bytes twice are the host's fault"
    );
}
