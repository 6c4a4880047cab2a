//! The product's layer service over a bucket of an [`S3Server`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use testkit::process::Service;
use testkit::registry::free_port;
use testkit::{Published, ScratchDir, binary, http};

use crate::S3Server;
use crate::s3_server::{ACCESS_KEY, LAYERS, SECRET_KEY};

const START_TIME: Duration = Duration::from_secs(30);

/// `cvmfs-publish layer-service`; killed when dropped.
#[derive(Debug)]
pub struct LayerService {
    address: String,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    service: Option<Service>,
    directory: ScratchDir,
}

impl LayerService {
    /// Starts the service for `repository` on a free port.
    pub fn start(repository: &Published, bucket: &S3Server, options: &[&str]) -> Result<Self> {
        let mut service = Self::prepare(repository, bucket, options)?;
        service.run()?;
        Ok(service)
    }

    /// As [`LayerService::start`], but [`LayerService::run`] starts it: until then nobody listens.
    pub fn prepare(repository: &Published, bucket: &S3Server, options: &[&str]) -> Result<Self> {
        let address = format!("127.0.0.1:{}", free_port()?);
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a path is not UTF-8");
        let mut arguments = vec!["layer-service".to_owned(), repository.fqrn.clone(), "--storage".to_owned()];
        arguments.extend([text(&repository.storage)?, "--keys".to_owned(), text(&repository.keys)?]);
        let bucket_name = format!("s3://{LAYERS}");
        let fixed = ["--bucket", &bucket_name, "--listen", &address, "--log-level", "info"];
        arguments.extend(fixed.iter().chain(options).map(|&option| option.to_owned()));
        let environment = bucket.environment();
        Ok(Self { address, arguments, environment, service: None, directory: ScratchDir::new("service")? })
    }

    /// Starts the service, again if it was stopped; returns when it listens.
    pub fn run(&mut self) -> Result<()> {
        let mut command = Command::new(binary("cvmfs-publish"));
        command.args(&self.arguments).envs(self.environment.iter().cloned());
        let log = self.directory.path().join("log");
        let mut service = Service::start("layer service", command, &log)?;
        service.wait_ready(START_TIME, || std::net::TcpStream::connect(&self.address).is_ok())?;
        self.service = Some(service);
        Ok(())
    }

    /// Ends the service; SIGKILL, or SIGTERM with time to end.
    pub fn end(&mut self, kill: bool) {
        let Some(mut service) = self.service.take() else { return };
        if kill { service.kill() } else { service.stop(Duration::from_secs(15)) }
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What it has logged.
    pub fn log_text(&self) -> String {
        self.service.as_ref().map(Service::log_text).unwrap_or_default()
    }

    /// What it says of a layer.
    pub fn state(&self, key: &str) -> Result<http::Response> {
        http::get(&self.address, &format!("/status/{key}"))
    }

    /// Asks until a layer has this state, and returns the last answer.
    pub fn wait_for(&self, key: &str, state: &str) -> Result<http::Response> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = self.state(key)?;
            if answer.text() == state {
                return Ok(answer);
            }
            ensure!(
                Instant::now() < deadline,
                "{key} is {} and not {state}\n{}",
                answer.text(),
                self.log_text()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Sends the notification that a store sends when `key` was stored.
    pub fn notify(&self, key: &str, headers: &[(&str, &str)]) -> Result<http::Response> {
        let event = serde_json::json!({
            "EventName": "s3:ObjectCreated:Put",
            "Key": format!("{LAYERS}/{key}"),
            "Records": [{"eventVersion": "2.0", "eventName": "s3:ObjectCreated:Put",
                "s3": {"bucket": {"name": LAYERS}, "object": {"key": key, "size": 1}}}],
        });
        http::request(&self.address, "POST", "/", headers, event.to_string().as_bytes())
    }

    /// Writes the plugin's `config.json` into `directory`.
    pub fn write_plugin_config(
        &self,
        repository: &str,
        bucket: &S3Server,
        directory: &Path,
    ) -> Result<PathBuf> {
        let file = directory.join("config.json");
        let config = serde_json::json!({
            "AccessKey": ACCESS_KEY,
            "AccessSecret": SECRET_KEY,
            "Host": bucket.address.trim_start_matches("http://"),
            "SSL": false,
            "CvmfsRepo": repository,
            "PublishStatusURL": format!("http://{}/status", self.address),
        });
        std::fs::write(&file, config.to_string())?;
        Ok(file)
    }
}

/// Puts a layer into the bucket, past the server; its key.
pub fn leave_layer(bucket: &S3Server, tar: &[u8]) -> Result<String> {
    let gzip = testkit::tar::gzip(tar);
    let key = hex::encode(Sha256::digest(&gzip));
    std::fs::write(bucket.root().join(LAYERS).join(&key), gzip)?;
    Ok(key)
}
