//! Names, discovery, order, sharding, headers: what happens around the requests, and what an administrator changes.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use cvmfs_client::authz::Caller;
use cvmfs_client::network::{Cause, FetchError, Fetcher, OnBehalf, ProxyState, Request};
use support::{Bench, closed_port, noise, seconds};
use testkit::{Fault, NameServer, Origin};

fn bench() -> Bench {
    let bench = Bench::new();
    std::fs::write(bench.storage().join("file"), b"content").unwrap();
    std::fs::write(bench.storage().join(".cvmfspublished"), b"manifest").unwrap();
    bench
}

fn fetcher(bench: &Bench, servers: &str, options: &[(&str, &str)]) -> Fetcher {
    Fetcher::new(&bench.settings(servers, options)).unwrap()
}

fn request() -> Request {
    Request::new("file", "file", 1000)
}

fn get(fetcher: &Fetcher) -> Result<Vec<u8>, FetchError> {
    fetcher.bytes(&request(), seconds(20))
}

#[test]
fn each_address_of_a_proxy_name_is_an_entry_and_a_dead_one_is_replaced_by_its_sibling() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let names = NameServer::start().unwrap();
    names.set("squid.test.example", &["127.0.0.1", "127.0.0.77", "::1"], 600);
    let proxy = format!("http://squid.test.example:{}", origin.address().port());
    let server = names.address();
    for _ in 0..4 {
        let fetcher = fetcher(
            &bench,
            "http://origin.invalid",
            &[("CVMFS_HTTP_PROXY", &proxy), ("CVMFS_DNS_SERVER", &server)],
        );
        assert_eq!(get(&fetcher).unwrap(), b"content");
        let group = fetcher.proxy_info().groups.remove(0);
        let urls: Vec<&str> = group.iter().map(|entry| entry.url.as_str()).collect();
        let port = origin.address().port();
        assert_eq!(urls, [format!("http://127.0.0.1:{port}"), format!("http://127.0.0.77:{port}")]);
        assert!(group.iter().all(|entry| entry.name.as_deref() == Some("squid.test.example")));
        assert!(group[0].is_current, "{group:?}");
    }
    let one = [
        ("CVMFS_HTTP_PROXY", proxy.as_str()),
        ("CVMFS_DNS_SERVER", server.as_str()),
        ("CVMFS_MAX_IPADDR_PER_PROXY", "1"),
    ];
    let fetcher = fetcher(&bench, "http://origin.invalid", &one);
    let _ = get(&fetcher);
    assert_eq!(fetcher.proxy_info().groups[0].len(), 1);
}

#[test]
fn a_proxy_name_is_resolved_again_when_its_lifetime_is_over() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let names = NameServer::start().unwrap();
    names.set("squid.test.example", &["127.0.0.77"], 0);
    let proxy = format!("http://squid.test.example:{}", origin.address().port());
    let server = names.address();
    let options =
        [("CVMFS_HTTP_PROXY", proxy.as_str()), ("CVMFS_DNS_SERVER", &server), ("CVMFS_DNS_MIN_TTL", "1")];
    let fetcher = fetcher(&bench, "http://origin.invalid", &options);
    assert!(get(&fetcher).is_err());
    names.set("squid.test.example", &["127.0.0.1"], 0);
    let begun = Instant::now();
    while get(&fetcher).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", fetcher.proxy_info());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(fetcher.proxy_info().groups[0].len(), 1);
}

#[test]
fn a_proxy_name_that_did_not_resolve_is_tried_again_after_the_least_lifetime() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let names = NameServer::start().unwrap();
    let proxy = format!("http://squid.test.example:{}", origin.address().port());
    let server = names.address();
    let options =
        [("CVMFS_HTTP_PROXY", proxy.as_str()), ("CVMFS_DNS_SERVER", &server), ("CVMFS_DNS_MIN_TTL", "1")];
    let fetcher = fetcher(&bench, "http://origin.invalid", &options);
    let error = get(&fetcher).unwrap_err();
    assert!(matches!(error, FetchError::Network { cause: Cause::ResolveProxy(_), .. }), "{error}");
    assert_eq!(fetcher.proxy_info().groups[0][0].state, ProxyState::Unresolved);
    names.set("squid.test.example", &["127.0.0.1"], 600);
    let begun = Instant::now();
    while get(&fetcher).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", fetcher.proxy_info());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_host_with_several_addresses_is_reached_by_one_that_answers() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let names = NameServer::start().unwrap();
    names.set("s1.test.example", &["127.0.0.77", "127.0.0.1"], 600);
    let host = format!("http://s1.test.example:{}", origin.address().port());
    let server = names.address();
    let fetcher = fetcher(&bench, &host, &[("CVMFS_DNS_SERVER", &server)]);
    for _ in 0..4 {
        assert_eq!(get(&fetcher).unwrap(), b"content");
    }
    assert_eq!(fetcher.counters().errors, 0);
    assert_eq!(fetcher.nameserver().unwrap().to_string(), "127.0.0.1");
}

#[test]
fn proxies_are_found_by_a_proxy_configuration_file_and_remembered() {
    let bench = bench();
    let proxy = Origin::serve(bench.storage()).unwrap();
    // What was found is kept beside the cache, which exists when something is mounted.
    std::fs::create_dir_all(bench.directory.path().join("cache/shared")).unwrap();
    let web = tempfile::tempdir().unwrap();
    let script = format!(
        "function FindProxyForURL(url, host) {{\n\
           if (shExpMatch(url, '*.cvmfspublished') && isInNet(myIpAddress(), '0.0.0.0', '0.0.0.0'))\n\
             return 'PROXY {}; DIRECT';\n\
           return 'PROXY nowhere.invalid:1';\n}}",
        proxy.address()
    );
    std::fs::write(web.path().join("wpad.dat"), script).unwrap();
    let server = Origin::serve(web.path()).unwrap();
    let urls = format!("{};{}/wpad.dat", closed_port(), server.url());
    let options = [("CVMFS_HTTP_PROXY", "auto"), ("CVMFS_PAC_URLS", urls.as_str())];
    let found = fetcher(&bench, "http://origin.invalid", &options);
    assert_eq!(get(&found).unwrap(), b"content");
    let shown = |fetcher: &Fetcher| -> Vec<String> {
        fetcher.proxy_info().groups.iter().flatten().map(|entry| entry.url.clone()).collect()
    };
    assert_eq!(shown(&found), [proxy.url(), "DIRECT".to_owned()]);
    assert_eq!(server.requests().len(), 1);
    drop(server);
    let again = fetcher(&bench, "http://origin.invalid", &options);
    assert_eq!(get(&again).unwrap(), b"content");
    assert_eq!(shown(&again), [proxy.url(), "DIRECT".to_owned()], "as found the last time");
}

#[test]
fn without_any_proxy_found_there_is_an_error_that_says_so_and_no_direct_connection() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let web = tempfile::tempdir().unwrap();
    std::fs::write(web.path().join("wpad.dat"), "function FindProxyForURL(u, h) { while (true) ; }").unwrap();
    std::fs::write(web.path().join("page"), "<html>").unwrap();
    let server = Origin::serve(web.path()).unwrap();
    let urls = format!("{0}/wpad.dat;{0}/page;{0}/missing", server.url());
    let options = [("CVMFS_HTTP_PROXY", "auto"), ("CVMFS_PAC_URLS", urls.as_str())];
    let fetcher = fetcher(&bench, &origin.url(), &options);
    let error = get(&fetcher).unwrap_err();
    assert!(matches!(error, FetchError::Network { cause: Cause::NoProxy(_), .. }), "{error}");
    for words in ["takes too long", "web page", "404"] {
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
    let started = Instant::now();
    get(&fetcher).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(1), "the failure is remembered for a while");
    assert_eq!(origin.connections(), 0);
}

#[test]
fn hosts_and_fallback_proxies_are_sorted_by_the_geo_api() {
    let bench = bench();
    let proxy = Origin::serve(bench.storage()).unwrap();
    // Sorted: a, b, c, the separator, fallback proxies.
    proxy.set_fault("*/api/v1.0/geo/*", Fault::Replace(b"3,1,2,6,5,4\n".to_vec()));
    let hosts = "http://b.invalid/cvmfs/x;http://a.invalid/cvmfs/x;http://c.invalid/cvmfs/x";
    let fallback = "http://127.0.0.2:3128;http://127.0.0.3:3128";
    let own = proxy.url();
    let options = [
        ("CVMFS_HTTP_PROXY", own.as_str()),
        ("CVMFS_FALLBACK_PROXY", fallback),
        ("CVMFS_USE_GEOAPI", "yes"),
        ("CVMFS_MAX_SERVERS", "2"),
    ];
    proxy.set_fault("*/file", Fault::Replace(b"content".to_vec()));
    let sorted = fetcher(&bench, hosts, &options);
    get(&sorted).unwrap();
    let order: Vec<String> = sorted.host_info().into_iter().map(|host| host.url).collect();
    assert_eq!(order, ["http://c.invalid/cvmfs/x", "http://a.invalid/cvmfs/x"]);
    let groups = sorted.proxy_info();
    assert_eq!(groups.first_fallback_group, 1);
    let urls: Vec<&str> = groups.groups.iter().map(|group| group[0].url.as_str()).collect();
    assert_eq!(urls, [own.as_str(), "http://127.0.0.3:3128", "http://127.0.0.2:3128"]);
    let asked = proxy.requests().remove(0).path;
    let expected = "/api/v1.0/geo/127.0.0.1/a.invalid,b.invalid,c.invalid,+PXYSEP+,127.0.0.2,127.0.0.3";
    assert!(asked.ends_with(expected), "{asked}");

    proxy.set_fault("*/api/v1.0/geo/*", Fault::Replace(b"1,1,1\n".to_vec()));
    let unsorted = fetcher(&bench, hosts, &options);
    get(&unsorted).unwrap();
    let order: Vec<String> = unsorted.host_info().into_iter().map(|host| host.url).collect();
    assert_eq!(order, ["http://b.invalid/cvmfs/x", "http://a.invalid/cvmfs/x"], "the configured order stays");
}

#[test]
fn sharding_spreads_objects_over_the_proxies_of_a_group_always_in_the_same_way() {
    let bench = bench();
    let names: Vec<_> = (0..60_u64).map(|seed| bench.publish_file(&noise(seed, 100))).collect();
    let proxies: Vec<Origin> = (0..3).map(|_| Origin::serve(bench.storage()).unwrap()).collect();
    let list = proxies.iter().map(Origin::url).collect::<Vec<_>>().join("|");
    let options = [("CVMFS_HTTP_PROXY", list.as_str()), ("CVMFS_PROXY_SHARD", "yes")];
    let run = || -> Vec<HashSet<String>> {
        for proxy in &proxies {
            proxy.clear_requests();
        }
        let fetcher = fetcher(&bench, "http://origin.invalid", &options);
        for name in &names {
            fetcher.bytes(&Request::new(name.path(), "object", 10_000), seconds(20)).unwrap();
        }
        assert!(fetcher.proxy_info().groups[0].iter().all(|entry| entry.is_current));
        proxies
            .iter()
            .map(|proxy| proxy.requests().into_iter().map(|request| request.path).collect())
            .collect()
    };
    let first = run();
    assert!(
        first.iter().all(|paths| !paths.is_empty()),
        "{:?}",
        first.iter().map(HashSet::len).collect::<Vec<_>>()
    );
    assert_eq!(first.iter().map(HashSet::len).sum::<usize>(), 60, "each object by one proxy");
    assert_eq!(run(), first);
}

#[test]
fn headers_tell_servers_who_reads_what_only_if_the_site_wants_it() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let options = [
        ("CVMFS_SEND_INFO_HEADER", "yes"),
        ("CVMFS_HTTP_TRACING", "on"),
        ("CVMFS_HTTP_TRACING_HEADERS", "Site:CERN | job:a b"),
        ("CERNVM_UUID", "0123-ab"),
    ];
    let request = Request {
        caller: Some(Caller { uid: 1000, gid: 100, pid: 42 }),
        file: Some("/sw/a file\r\n".to_owned()),
        ..request()
    };
    let telling = fetcher(&bench, &origin.url(), &options);
    telling.bytes(&request, seconds(20)).unwrap();
    support::requests(&origin, 1);
    let headers = origin.requests().remove(0).headers;
    let expected = [
        ("cvmfs-info", "/sw/a%20file%0D%0A"),
        ("x-cvmfs-pid", "42"),
        ("x-cvmfs-gid", "100"),
        ("x-cvmfs-uid", "1000"),
        ("x-cvmfs-site", "CERN"),
        ("x-cvmfs-job", "a b"),
        ("connection", "Keep-Alive"),
    ];
    for (name, value) in expected {
        assert_eq!(headers.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(headers["user-agent"].ends_with(" 0123-ab"), "{headers:?}");
    assert!(telling.tells_readers());
    {
        let _reading = OnBehalf::of(Caller { uid: 7, gid: 8, pid: 9 }, "/other".to_owned());
        get(&telling).unwrap();
    }
    get(&telling).unwrap();
    support::requests(&origin, 3);
    let requests = origin.requests();
    let told = |index: usize| requests[index].headers.get("cvmfs-info").map(String::as_str);
    assert_eq!((told(1), told(2)), (Some("/other"), None));
    assert_eq!(requests[1].headers["x-cvmfs-pid"], "9");
    fetcher(&bench, &origin.url(), &[]).bytes(&request, seconds(20)).unwrap();
    support::requests(&origin, 4);
    let headers = origin.requests().remove(3).headers;
    assert!(!headers.keys().any(|name| name.starts_with("x-cvmfs") || name == "cvmfs-info"), "{headers:?}");
}

#[test]
fn a_proxy_that_wants_a_password_gets_it_and_nobody_else_sees_it() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let proxy = format!("http://user:sesame@{}", origin.address());
    let fetcher = fetcher(&bench, "http://origin.invalid", &[("CVMFS_HTTP_PROXY", &proxy)]);
    get(&fetcher).unwrap();
    support::requests(&origin, 1);
    assert_eq!(origin.requests()[0].headers["proxy-authorization"], "Basic dXNlcjpzZXNhbWU=");
    let shown = format!("{fetcher:?} {:?} {:?}", fetcher.proxy_info(), fetcher.status());
    assert!(!shown.contains("sesame"), "{shown}");
    let error = fetcher.set_proxies("http://user:sesame@p:x").unwrap_err().to_string();
    assert!(!error.contains("sesame"), "{error}");
}

#[test]
fn an_administrator_changes_hosts_proxies_and_time_outs_while_mounted() {
    let bench = bench();
    let (first, second) = (Origin::serve(bench.storage()).unwrap(), Origin::serve(bench.storage()).unwrap());
    let fetcher = fetcher(&bench, &format!("{};{}", first.url(), second.url()), &[]);
    assert!(fetcher.host_info()[0].is_current);
    fetcher.switch_host();
    assert!(fetcher.host_info()[1].is_current);
    get(&fetcher).unwrap();
    assert_eq!((first.connections(), second.connections()), (0, 1));
    fetcher.set_hosts(&format!("{};{}", closed_port(), first.url())).unwrap();
    fetcher.probe_hosts(seconds(20));
    let hosts = fetcher.host_info();
    assert_eq!(hosts[0].url, first.url(), "who answers comes first");
    assert!(hosts[0].is_current && hosts[0].round_trip.is_some() && hosts[1].round_trip.is_none());
    for wrong in ["", ";", "nothing", "http://a b/", "http://u:p@h/"] {
        assert!(fetcher.set_hosts(wrong).is_err(), "{wrong}");
        assert!(
            fetcher.set_proxies(wrong).is_err() || wrong == "nothing" || wrong == "http://u:p@h/",
            "{wrong}"
        );
    }
    fetcher.set_proxies(&format!("{};DIRECT", second.url())).unwrap();
    get(&fetcher).unwrap();
    assert_eq!(fetcher.status().proxy, second.url());
    fetcher.switch_proxy_group();
    assert_eq!(fetcher.status().proxy, "DIRECT");
    fetcher.set_fallback_proxies(&first.url()).unwrap();
    let info = fetcher.proxy_info();
    let urls: Vec<&str> = info.groups.iter().flatten().map(|entry| entry.url.as_str()).collect();
    assert_eq!(urls, [second.url(), first.url()], "with a fallback, DIRECT counts in neither list");
    assert_eq!(info.first_fallback_group, 1);
    fetcher.rebalance_proxies();
    fetcher.set_timeouts(Duration::from_secs(7), Duration::ZERO);
    assert_eq!(fetcher.timeouts(), (Duration::from_secs(7), Duration::from_secs(1)));
}

#[test]
fn external_files_have_a_fetcher_of_their_own_that_asks_for_parts() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let own = fetcher(&bench, "http://origin.invalid", &[]);
    drop(own);
    assert!(Fetcher::external(&bench.settings("http://origin.invalid", &[])).unwrap().is_none());
    let settings = bench.settings("http://origin.invalid", &[("CVMFS_EXTERNAL_URL", &origin.url())]);
    let external = Fetcher::external(&settings).unwrap().unwrap();
    let part = Request { range: Some((2, 4)), ..request() };
    assert_eq!(external.bytes(&part, seconds(20)).unwrap(), b"nte");
    support::requests(&origin, 1);
    assert_eq!(origin.requests()[0].headers["range"], "bytes=2-4");
    // A server that sends the whole file instead.
    origin.set_fault("*", Fault::Replace(b"content".to_vec()));
    origin.set_fault("*", Fault::Answer { status: 200, headers: Vec::new() });
    let error = external.bytes(&part, seconds(20)).unwrap_err();
    assert!(error.to_string().contains("byte range"), "{error}");
}

#[test]
fn a_directory_of_this_machine_can_be_the_server() {
    let bench = bench();
    let url = format!("file://{}", bench.storage().display());
    let fetcher = fetcher(&bench, &url, &[("CVMFS_HTTP_PROXY", &closed_port())]);
    assert_eq!(get(&fetcher).unwrap(), b"content");
    let error = fetcher.bytes(&Request::new("missing", "missing", 10), seconds(5)).unwrap_err();
    assert!(matches!(error, FetchError::NotFound { .. }), "{error}");
    let outside = fetcher.bytes(&Request::new("../unused.pub", "key", 10), seconds(5)).unwrap_err();
    assert!(outside.to_string().contains("leads out"), "{outside}");
    assert!(fetcher.bytes(&Request::new("file", "file", 3), seconds(5)).is_err(), "too large");
}

#[test]
fn those_who_never_give_up_wait_until_their_deadline() {
    let bench = bench();
    let origin = Origin::serve(bench.storage()).unwrap();
    let address = origin.address();
    drop(origin);
    let options = [("CVMFS_FAILOVER_INDEFINITELY", "yes")];
    let fetcher = fetcher(&bench, &format!("http://{address}"), &options);
    let waiting = std::thread::spawn(move || get(&fetcher));
    std::thread::sleep(Duration::from_millis(500));
    let _origin = Origin::serve_at(bench.storage(), address).unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), b"content");
}
