//! A token service for Debian's docker-registry: the flow of Docker Hub, with tokens that the registry verifies.
//!
//! `GET /token?service=…&scope=…` with or without Basic credentials, and `POST` with an identity token. Anonymous
//! callers may pull what is below `public/`; the one user may do everything.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::ScratchDir;
use crate::process::{Service, run};

/// How long a token is said to live.
const LIFETIME: u64 = 300;
const TIMEOUT: Duration = Duration::from_secs(20);

/// The user that may do everything.
pub const USER: &str = "me";
/// Its password.
pub const PASSWORD: &str = "hunter2";
/// An identity token of the user.
pub const IDENTITY_TOKEN: &str = "identity-of-me";

/// A registry and its token service.
#[derive(Debug)]
pub struct TokenRegistry {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
    _service: Service,
    _directory: ScratchDir,
}

impl TokenRegistry {
    /// Starts both. Installs `docker-registry` and `openssl`.
    pub fn start() -> Result<Self> {
        crate::install(&["docker-registry", "openssl"])?;
        let directory = ScratchDir::new("token-registry")?;
        let path = |name: &str| directory.path().join(name);
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tokens"]);
        openssl.arg("-keyout").arg(path("key.pem")).arg("-out").arg(path("cert.pem"));
        run(openssl, TIMEOUT)?.success()?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let realm = format!("http://{}/token", listener.local_addr()?);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let signer = Signer { key: path("key.pem"), certificate: certificate(&path("cert.pem"))? };
        let noted = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A caller that goes away is its own matter.
                let _ = answer(stream, &signer, &noted);
            }
        });
        let address = format!("127.0.0.1:{}", crate::registry::free_port()?);
        let configuration = json!({
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": path("data")}},
            "http": {"addr": address},
            "auth": {"token": {"realm": realm, "service": "registry", "issuer": "tokens", "rootcertbundle": path("cert.pem")}},
        });
        std::fs::write(path("registry.yml"), configuration.to_string())?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(path("registry.yml")).env("OTEL_TRACES_EXPORTER", "none");
        let mut service = Service::start("docker-registry", command, &path("log"))?;
        service.wait_ready(TIMEOUT, || {
            crate::http::get(&address, "/v2/").is_ok_and(|answer| answer.status == 401)
        })?;
        Ok(Self { address, asked, _service: service, _directory: directory })
    }

    /// `127.0.0.1:PORT` of the registry.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What tokens were asked for: `METHOD SCOPE`.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct Signer {
    key: PathBuf,
    /// In base64, as tokens carry it.
    certificate: String,
}

impl Signer {
    fn token(&self, user: &str, access: &Value) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [self.certificate]});
        let claims = json!({
            "iss": "tokens", "sub": user, "aud": "registry", "iat": now, "nbf": now.saturating_sub(5),
            "exp": now + LIFETIME, "jti": now.to_string(), "access": access,
        });
        let signed = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let mut openssl = Command::new("openssl");
        openssl
            .args(["dgst", "-sha256", "-sign"])
            .arg(&self.key)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = openssl.spawn()?;
        child.stdin.take().context("a pipe was asked for")?.write_all(signed.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "openssl failed");
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(output.stdout)))
    }
}

fn certificate(file: &Path) -> Result<String> {
    let text = std::fs::read_to_string(file)?;
    Ok(text.lines().filter(|line| !line.starts_with("-----")).collect())
}

fn answer(mut stream: TcpStream, signer: &Signer, asked: &Mutex<Vec<String>>) -> Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    // Head, and a body as long as it says.
    let (head, body) = loop {
        let length = stream.read(&mut piece)?;
        request.extend_from_slice(piece.get(..length).unwrap_or_default());
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let expected = header(head, "content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
            if body.len() >= expected {
                break (head.to_owned(), body.to_owned());
            }
        }
        ensure!(length > 0, "cut request");
    };
    let line = head.lines().next().unwrap_or_default().to_owned();
    let (method, target) = line.split_once(' ').context("no request line")?;
    let target = target.split(' ').next().unwrap_or_default();
    let query =
        if method == "POST" { body } else { target.split_once('?').map_or("", |(_, q)| q).to_owned() };
    let parameters = parameters(&query);
    let parameter =
        |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let scope = parameter("scope").unwrap_or_default();
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{method} {scope}"));

    let basic = header(&head, "authorization");
    let right = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
    let user = match (method, basic) {
        ("POST", _) if parameter("refresh_token") == Some(IDENTITY_TOKEN) => Some(USER),
        ("GET", Some(given)) if given == right => Some(USER),
        ("GET", None) => Some(""),
        _ => None,
    };
    let (status, document) = match user {
        None => ("401 Unauthorized", json!({"errors": [{"code": "UNAUTHORIZED", "message": "wrong"}]})),
        Some(user) => {
            let token = signer.token(user, &granted(scope, user))?;
            let key = if method == "POST" { "access_token" } else { "token" };
            ("200 OK", json!({key: token, "expires_in": LIFETIME}))
        }
    };
    let body = document.to_string();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    Ok(())
}

/// What of `repository:NAME:ACTION,ACTION` a user gets.
fn granted(scope: &str, user: &str) -> Value {
    let mut parts = scope.splitn(3, ':');
    let (Some("repository"), Some(name), Some(actions)) = (parts.next(), parts.next(), parts.next()) else {
        return json!([]);
    };
    let is_allowed = |action: &&str| !user.is_empty() || (*action == "pull" && name.starts_with("public/"));
    let actions: Vec<&str> = actions.split(',').filter(is_allowed).collect();
    json!([{"type": "repository", "name": name, "actions": actions}])
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

fn parameters(query: &str) -> Vec<(String, String)> {
    let decoded = |text: &str| {
        let mut bytes = Vec::new();
        let mut rest = text.as_bytes();
        while let Some((&byte, after)) = rest.split_first() {
            let hex = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
            let escaped = hex.and_then(|two| u8::from_str_radix(two, 16).ok()).filter(|_| byte == b'%');
            match escaped {
                Some(value) => {
                    bytes.push(value);
                    rest = after.get(2..).unwrap_or_default();
                }
                None => {
                    bytes.push(if byte == b'+' { b' ' } else { byte });
                    rest = after;
                }
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    query.split('&').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (decoded(k), decoded(v))).collect()
}
