//! Registries that misbehave, and what the user gets to see.

use std::io::Read as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::script::{Answer, Script, client, impatient_client};
use registry::{
    BlobReader, Client, Credential, Credentials, Descriptor, Digest, ErrorKind, Platform, RegistryError,
    Secret,
};

fn anonymous() -> Client {
    client(Credentials::none())
}

fn password() -> Credential {
    Credential::Password { user: "me".into(), password: Secret::new("hunter2") }
}

fn content() -> Vec<u8> {
    (0..300_000u32).flat_map(u32::to_le_bytes).collect()
}

fn descriptor(bytes: &[u8]) -> Descriptor {
    let media_type = registry::media_type::DOCKER_LAYER_GZIP.to_owned();
    Descriptor { media_type, size: bytes.len() as u64, digest: Digest::sha256_of(bytes), urls: vec![] }
}

/// The whole blob, or the registry's error.
fn download(client: &Client, script: &Script, blob: &Descriptor) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut reader = client.blob(&script.reference("a/b"), blob).map_err(|error| error.to_string())?;
    reader.read_to_end(&mut bytes).map_err(|error| {
        assert!(BlobReader::failure_of(&error).is_some(), "{error:?}");
        error.to_string()
    })?;
    Ok(bytes)
}

#[test]
fn a_missing_image_is_not_found() {
    let script = Script::start(|_| {
        Answer::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#)
    });
    let error = anonymous().manifest(&script.reference("a/b:1")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let expected = format!(
        "manifest of {0}/a/b:1 not found in registry {0} (manifest unknown); check the ",
        script.address
    );
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[test]
fn a_registry_that_answers_500_is_tried_four_times_within_the_deadline() {
    let script = Script::start(|_| Answer::new(500, "oops"));
    let started = Instant::now();
    let error = anonymous().manifest(&script.reference("a/b")).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(script.requests().len(), 4);
    assert_eq!(error.kind(), ErrorKind::Network);
    assert!(error.to_string().contains("answers 500 to the request for manifest of"), "{error}");
}

#[test]
fn row_88_a_rate_limit_is_waited_for_if_it_is_short_and_reported_if_it_is_long() {
    let count = AtomicUsize::new(0);
    let document = br#"{"manifests":[]}"#;
    let short = Script::start(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Answer::new(429, "").header("Retry-After", "1"),
        _ => Answer::new(200, document),
    });
    let started = Instant::now();
    anonymous().manifest(&short.reference("a/b")).unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));

    let long = Script::start(|_| Answer::new(429, "").header("Retry-After", "21600"));
    let started = Instant::now();
    let error = anonymous().manifest(&long.reference("a/b")).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(1));
    assert!(error.to_string().ends_with("can be asked for again in 21600 s"), "{error}");
}

#[test]
fn a_registry_that_is_not_there_is_a_network_error() {
    let address = Script::start(|_| Answer::new(200, "")).address.clone();
    let error = anonymous().manifest(&format!("{address}/a/b").parse().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network);
    assert!(error.to_string().contains(&format!("cannot reach {address}: ")), "{error}");
}

#[test]
fn a_registry_that_hangs_meets_the_deadline() {
    let script = Script::start(|_| {
        std::thread::sleep(Duration::from_secs(8));
        Answer::new(200, "")
    });
    let started = Instant::now();
    let error = impatient_client().manifest(&script.reference("a/b")).unwrap_err();
    assert!(matches!(error, RegistryError::Timeout { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(6));
}

#[test]
fn a_manifest_with_another_digest_is_refused() {
    let script = Script::start(|_| Answer::new(200, r#"{"manifests":[]}"#));
    let digest = Digest::sha256_of(b"what was signed");
    let error = anonymous().manifest(&script.reference(&format!("a/b@{digest}"))).unwrap_err();
    assert!(matches!(error, RegistryError::WrongDigest { .. }), "{error}");
    let mixed_up = Script::start(move |_| {
        Answer::new(200, r#"{"manifests":[]}"#).header("Docker-Content-Digest", digest.to_string())
    });
    assert!(anonymous().manifest(&mixed_up.reference("a/b")).is_err());
}

#[test]
fn a_huge_manifest_is_not_read_to_its_end() {
    let script = Script::start(|_| Answer::new(200, vec![b' '; 5 << 20]));
    let error = anonymous().manifest(&script.reference("a/b")).unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
}

#[test]
fn row_90_a_missing_platform_lists_those_there_are() {
    let digest = Digest::sha256_of(b"");
    let entry = |os: &str, architecture: &str| {
        format!(
            r#"{{"size":1,"digest":"{digest}","platform":{{"os":"{os}","architecture":"{architecture}"}}}}"#
        )
    };
    let index = format!(
        r#"{{"manifests":[{},{},{}]}}"#,
        entry("linux", "arm64"),
        entry("windows", "amd64"),
        entry("unknown", "unknown")
    );
    let script = Script::start(move |_| Answer::new(200, index.clone()));
    let wanted: Platform = "linux/amd64".parse().unwrap();
    let error = anonymous().source(&script.reference("a/b")).image(&wanted).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(
        error.to_string().ends_with("has no image for linux/amd64; it has: linux/arm64, windows/amd64"),
        "{error}"
    );
}

#[test]
fn an_index_that_contains_itself_comes_to_an_end() {
    let index = |digest: &Digest| {
        format!(
            r#"{{"manifests":[{{"size":1,"digest":"{digest}","mediaType":"{}"}}]}}"#,
            registry::media_type::OCI_INDEX
        )
    };
    // Each selector leads to an index that names the digest of one made before.
    let first = index(&Digest::sha256_of(b""));
    let mut chain = vec![first];
    for _ in 0..6 {
        let next = index(&Digest::sha256_of(chain.last().unwrap().as_bytes()));
        chain.push(next);
    }
    let script = Script::start(move |request| {
        let named = chain
            .iter()
            .find(|text| request.target.ends_with(&Digest::sha256_of(text.as_bytes()).to_string()));
        Answer::new(200, named.unwrap_or_else(|| chain.last().unwrap()).clone())
    });
    let error = anonymous().source(&script.reference("a/b")).image(&Platform::host()).unwrap_err();
    assert!(error.to_string().contains("nests indexes too deeply"), "{error}");
}

#[test]
fn a_blob_with_other_bytes_ends_in_an_error() {
    let mut flipped = content();
    flipped[1_000_000] ^= 1;
    let script = Script::start(move |_| Answer::new(200, flipped.clone()));
    let message = download(&anonymous(), &script, &descriptor(&content())).unwrap_err();
    assert!(message.contains("the content was damaged or exchanged"), "{message}");
}

#[test]
fn a_blob_of_another_size_is_refused_before_it_is_read() {
    for size in [1_200_001, 100] {
        let script = Script::start(move |_| Answer::new(200, vec![0; size]));
        let message = download(&anonymous(), &script, &descriptor(&content())).unwrap_err();
        assert!(message.contains(&format!("has {size} bytes, not 1200000")), "{message}");
    }
}

#[test]
fn row_88_a_download_that_breaks_off_is_resumed_where_it_broke() {
    let bytes = content();
    let served = bytes.clone();
    let script = Script::start(move |request| match request.header("range") {
        None => Answer::new(200, &served[..400_000]).announcing(served.len()),
        Some("bytes=400000-") => Answer::new(206, &served[400_000..900_000])
            .header("Content-Range", format!("bytes 400000-{}/{}", served.len() - 1, served.len()))
            .announcing(served.len() - 400_000),
        // A server may ignore the range.
        Some("bytes=900000-") => Answer::new(200, served.clone()),
        Some(other) => panic!("{other}"),
    });
    assert!(download(&anonymous(), &script, &descriptor(&bytes)).unwrap() == bytes);
    assert_eq!(script.requests().len(), 3);
}

#[test]
fn a_download_that_gets_nowhere_is_given_up() {
    let script = Script::start(|request| {
        let rest = if request.header("range").is_some() { 206 } else { 200 };
        let body: &[u8] = if rest == 200 { &[0; 10] } else { b"" };
        let answer = Answer::new(rest, body).header("Content-Range", "bytes 10-1199999/1200000");
        answer.announcing(if rest == 200 { 1_200_000 } else { 1_199_990 })
    });
    let started = Instant::now();
    let message = download(&anonymous(), &script, &descriptor(&content())).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(20));
    assert!(message.contains("cannot reach"), "{message}");
}

/// The rest of `bytes` that a request asks for, of which only `piece` bytes come.
fn stalling(bytes: &[u8], piece: usize) -> Script {
    let served = bytes.to_vec();
    Script::start(move |request| {
        let length = served.len();
        let range = request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        let from: usize = range.map_or(0, |from| from.parse().unwrap());
        let body = if from == 0 { &served[..50_000] } else { &served[from..from + piece] };
        Answer::new(if from == 0 { 200 } else { 206 }, body)
            .header("Content-Range", format!("bytes {from}-{}/{length}", length - 1))
            .announcing(length - from)
            .then_silent()
    })
}

#[test]
fn a_registry_that_stalls_within_a_blob_is_reported_in_time_however_often_it_is_asked() {
    let bytes = content();
    for piece in [0, 5_000] {
        let script = stalling(&bytes, piece);
        let started = Instant::now();
        let message = download(&impatient_client(), &script, &descriptor(&bytes)).unwrap_err();
        let took = started.elapsed();
        assert!(took < Duration::from_secs(6), "{piece} bytes with each request: {took:?}");
        assert!(message.contains("did not answer within 3 s"), "{message}");
        assert!(script.requests().len() >= 3, "it is not given up at the first silence");
    }
}

/// A user in front of a dead registry waits half a minute, wherever it died.
#[test]
fn no_stall_lasts_longer_than_half_a_minute() {
    let deadlines = registry::Deadlines::default();
    for wait in [deadlines.document, deadlines.stall] {
        assert!(wait <= Duration::from_secs(28), "{deadlines:?}");
    }
}

/// A slow line is no stall: what comes pays for the waiting.
#[test]
fn a_slow_download_takes_the_time_it_needs() {
    let bytes = content();
    let served = bytes.clone();
    let script = Script::start(move |request| {
        let length = served.len();
        let range = request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        let from: usize = range.map_or(0, |from| from.parse().unwrap());
        std::thread::sleep(Duration::from_millis(500));
        let end = length.min(from + 200_000);
        Answer::new(if from == 0 { 200 } else { 206 }, &served[from..end])
            .header("Content-Range", format!("bytes {from}-{}/{length}", length - 1))
            .announcing(length - from)
    });
    let started = Instant::now();
    assert!(download(&impatient_client(), &script, &descriptor(&bytes)).unwrap() == bytes);
    assert!(started.elapsed() > Duration::from_secs(3), "longer than a stall may last");
}

#[test]
fn another_range_than_asked_for_is_refused() {
    let script = Script::start(|request| match request.header("range") {
        None => Answer::new(200, [0; 10]).announcing(1_200_000),
        Some(_) => Answer::new(206, [0; 10]).header("Content-Range", "bytes 5-14/1200000"),
    });
    let message = download(&anonymous(), &script, &descriptor(&content())).unwrap_err();
    assert!(message.contains("another range"), "{message}");
}

#[test]
fn a_reader_that_goes_away_ends_the_download() {
    let bytes = content().repeat(20);
    let served = bytes.clone();
    let script = Script::start(move |_| Answer::new(200, served.clone()));
    let client = anonymous();
    let mut reader = client.blob(&script.reference("a/b"), &descriptor(&bytes)).unwrap();
    reader.read_exact(&mut [0; 10]).unwrap();
    drop(reader);
    drop(client);
}

#[test]
fn cancelling_ends_a_wait_at_once() {
    let script = Script::start(|_| {
        std::thread::sleep(Duration::from_secs(8));
        Answer::new(200, "")
    });
    let client = anonymous();
    let canceller = client.canceller();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        canceller.cancel();
    });
    let started = Instant::now();
    let error = client.manifest(&script.reference("a/b")).unwrap_err();
    assert!(
        matches!(error, RegistryError::Cancelled) && started.elapsed() < Duration::from_secs(3),
        "{error}"
    );
}

#[test]
fn a_branch_is_cancelled_alone_or_with_its_client() {
    let script = Script::start(|_| Answer::new(200, r#"{"manifests":[]}"#));
    let reference = script.reference("a/b");
    let client = anonymous();
    let (first, second) = (client.branch(), client.branch());
    first.canceller().cancel();
    assert!(matches!(first.manifest(&reference), Err(RegistryError::Cancelled)));
    second.manifest(&reference).unwrap();
    client.canceller().cancel();
    assert!(matches!(second.branch().manifest(&reference), Err(RegistryError::Cancelled)));
}

#[test]
fn row_88_credentials_do_not_follow_a_redirect_to_another_host() {
    let bytes = content();
    let served = bytes.clone();
    let storage = Script::start(move |_| Answer::new(200, served.clone()));
    let target = format!("http://{}/bucket?signature=s3cret", storage.address);
    let script = Script::start(move |request| match request.header("authorization") {
        None => Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"r\""),
        Some(_) => Answer::new(307, "").header("Location", target.clone()),
    });
    let client = client(Credentials::none().with(script.address.clone(), password()));
    assert!(download(&client, &script, &descriptor(&bytes)).unwrap() == bytes);
    assert_eq!(storage.requests().len(), 1);
    assert_eq!(storage.requests()[0].header("authorization"), None);
}

#[test]
fn a_redirect_in_a_circle_ends() {
    let script = Script::start(|request| Answer::new(302, "").header("Location", request.target.clone()));
    let error = anonymous().manifest(&script.reference("a/b")).unwrap_err();
    assert!(error.to_string().contains("redirects in a circle"), "{error}");
}

#[test]
fn row_88_a_token_is_asked_for_once_and_renewed_when_it_is_refused() {
    // The token service is part of the same server; tokens serve three requests.
    let issued = AtomicUsize::new(0);
    let used = AtomicUsize::new(0);
    let script = Script::start(move |request| {
        if request.target.starts_with("/token?") {
            let number = issued.fetch_add(1, Ordering::SeqCst);
            used.store(0, Ordering::SeqCst);
            return Answer::new(200, format!(r#"{{"access_token":"T{number}","expires_in":60}}"#));
        }
        let current = format!("Bearer T{}", issued.load(Ordering::SeqCst).wrapping_sub(1));
        if request.header("authorization") == Some(&current) && used.fetch_add(1, Ordering::SeqCst) < 3 {
            return Answer::new(200, r#"{"manifests":[]}"#);
        }
        let host = request.header("host").unwrap();
        let challenge = format!(
            r#"Bearer realm="http://{host}/token",service="the service",scope="repository:a/b:pull,push""#
        );
        Answer::new(401, "").header("WWW-Authenticate", "Negotiate").header("WWW-Authenticate", challenge)
    });
    let client = client(Credentials::none().with(script.address.clone(), password()));
    for _ in 0..5 {
        client.manifest(&script.reference("a/b")).unwrap();
    }
    let requests = script.requests();
    let tokens: Vec<_> = requests.iter().filter(|r| r.target.starts_with("/token?")).collect();
    assert_eq!(tokens.len(), 2, "one at the start, one after the first was refused");
    assert_eq!(tokens[0].target, "/token?service=the+service&scope=repository%3Aa%2Fb%3Apull%2Cpush");
    assert_eq!(tokens[0].header("authorization"), Some("Basic bWU6aHVudGVyMg=="));
    assert_eq!(requests.len(), 5 + 2 + 2);
}

#[test]
fn an_identity_token_is_exchanged() {
    let script = Script::start(|request| {
        if request.method == "POST" {
            return Answer::new(200, r#"{"token":"T"}"#);
        }
        if request.header("authorization") == Some("Bearer T") {
            return Answer::new(200, r#"{"manifests":[]}"#);
        }
        let challenge =
            format!(r#"Bearer realm="http://{}/token",service="s""#, request.header("host").unwrap());
        Answer::new(401, "").header("WWW-Authenticate", challenge)
    });
    let token = Credential::IdentityToken(Secret::new("R"));
    client(Credentials::none().with(script.address.clone(), token))
        .manifest(&script.reference("a/b"))
        .unwrap();
    let exchange = script.requests().into_iter().find(|r| r.method == "POST").unwrap();
    let form = String::from_utf8(exchange.body).unwrap();
    assert_eq!(
        form,
        "grant_type=refresh_token&refresh_token=R&service=s&scope=repository%3Aa%2Fb%3Apull&client_id=docker2cvmfs"
    );
}

/// A token service that limits requests: the first answer is 429 with this pause.
fn limiting_token_service(pause: &'static str) -> Script {
    let limited = AtomicUsize::new(0);
    Script::start(move |request| {
        if request.target.starts_with("/token") {
            if limited.fetch_add(1, Ordering::SeqCst) == 0 {
                return Answer::new(429, "slow down").header("Retry-After", pause);
            }
            return Answer::new(200, r#"{"token":"T"}"#);
        }
        if request.header("authorization") == Some("Bearer T") {
            return Answer::new(200, r#"{"manifests":[]}"#);
        }
        let challenge = format!(r#"Bearer realm="http://{}/token""#, request.header("host").unwrap());
        Answer::new(401, "").header("WWW-Authenticate", challenge)
    })
}

#[test]
fn a_token_service_that_limits_requests_is_given_the_pause_it_asks_for() {
    let script = limiting_token_service("2");
    let started = Instant::now();
    anonymous().manifest(&script.reference("a/b")).unwrap();
    // Two seconds were asked for; our own pause would be half a second.
    assert!(started.elapsed() >= Duration::from_secs(2));

    let script = limiting_token_service("3600");
    let error = anonymous().manifest(&script.reference("a/b")).unwrap_err();
    assert!(matches!(error, RegistryError::RateLimited { .. }), "{error}");
    assert!(error.to_string().ends_with("can be asked for again in 3600 s"), "{error}");
    let tokens = script.requests().iter().filter(|r| r.target.starts_with("/token")).count();
    assert_eq!(tokens, 1, "a service that asks for an hour is not asked again at once");
}

#[test]
fn a_server_with_several_challenges_is_answered_with_the_one_that_works() {
    // The first token service is on a host that must not see the password, the second knows nobody.
    let script = Script::start(|request| {
        if request.target.starts_with("/token") {
            return Answer::new(401, "");
        }
        if request.header("authorization") == Some("Basic bWU6aHVudGVyMg==") {
            return Answer::new(200, r#"{"manifests":[]}"#);
        }
        let own = format!(r#"Bearer realm="http://{}/token""#, request.header("host").unwrap());
        Answer::new(401, "")
            .header("WWW-Authenticate", r#"Bearer realm="http://tokens.example.org/token""#)
            .header("WWW-Authenticate", format!(r#"{own}, Basic realm="r""#))
    });
    client(Credentials::none().with(script.address.clone(), password()))
        .manifest(&script.reference("a/b"))
        .unwrap();
    assert_eq!(script.requests().len(), 3, "{:?}", script.requests());
}

#[test]
fn row_88_a_registry_that_refuses_every_token_ends_as_denied() {
    let script = Script::start(|request| {
        if request.target.starts_with("/token") {
            return Answer::new(200, r#"{"token":"T"}"#);
        }
        let challenge = format!(r#"Bearer realm="http://{}/token""#, request.header("host").unwrap());
        Answer::new(401, "").header("WWW-Authenticate", challenge)
    });
    let error = anonymous().manifest(&script.reference("a/b")).unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    assert!(script.requests().len() <= 6);
}

#[test]
fn a_missing_login_says_what_to_do() {
    let script = Script::start(|_| Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"r\""));
    let error = anonymous().manifest(&script.reference("a/b")).unwrap_err();
    assert!(error.to_string().contains("log in with docker login"), "{error}");
}

#[test]
fn credentials_are_not_sent_in_clear_to_another_host() {
    let script = Script::start(|_| {
        Answer::new(401, "").header("WWW-Authenticate", r#"Bearer realm="http://tokens.example.org/token""#)
    });
    let client = client(Credentials::none().with(script.address.clone(), password()));
    let error = client.manifest(&script.reference("a/b")).unwrap_err();
    assert!(error.to_string().contains("in clear to tokens.example.org"), "{error}");
}

#[test]
fn row_90_foreign_layers_come_from_their_urls() {
    let bytes = content();
    let served = bytes.clone();
    let elsewhere = Script::start(move |_| Answer::new(200, served.clone()));
    let script = Script::start(|_| Answer::new(404, ""));
    let mut blob = descriptor(&bytes);
    blob.urls = vec!["ftp://x/y".into(), format!("http://{}/layer", elsewhere.address)];
    assert!(download(&anonymous(), &script, &blob).is_err());
    blob.media_type = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".into();
    assert!(download(&anonymous(), &script, &blob).unwrap() == bytes);
}

#[test]
fn no_secret_is_in_the_debug_form_of_a_client() {
    let client = client(Credentials::none().with("a.b", password()));
    assert!(!format!("{client:?}").contains("hunter2"));
}
