//! Proxy configuration files (PAC): a JavaScript function that names the proxies for a URL.
//!
//! Such a file comes from the network, often without any protection, so it runs in an interpreter of our own for the
//! part of the language that such files use, rather than in a JavaScript engine: the whole of ECMAScript would be
//! many times the size of this client, and engines bound neither memory nor the time of a single operation. Here
//! everything costs *fuel*: each step, each byte of a string, each element of a list. A file that runs out of fuel,
//! nests too deeply or uses something that is not supported is an error that names the line, and never a hang.
//!
//! Supported: variables, functions and closures, all statements of ECMAScript 3 but `with` and labels, all its
//! operators but `instanceof`, strings, numbers, lists, plain objects, regular expressions without backreferences,
//! the functions that PAC defines, and the usual methods of strings and lists. Times are those of UTC.

mod functions;
mod interpreter;
mod lexer;
mod parser;
mod value;

use std::net::IpAddr;

use crate::config::{Proxy, ProxyGroup};
use crate::url::{Scheme, Url};

/// Largest file. The longest known ones have some hundred KiB.
pub(super) const MAX_SCRIPT: usize = 1024 * 1024;

/// What a file may ask of the network.
pub(super) trait Surroundings {
    /// The addresses of a name; none if it does not resolve.
    fn resolve(&self, name: &str) -> Vec<IpAddr>;
    /// The address of this machine.
    fn own_address(&self) -> IpAddr;
    /// Seconds since 1970.
    fn unix_time(&self) -> i64;
}

/// Why a file gives no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub(super) struct PacError {
    pub(super) line: u32,
    pub(super) reason: String,
}

impl PacError {
    fn new(line: u32, reason: impl Into<String>) -> Self {
        Self { line, reason: reason.into() }
    }
}

/// What `FindProxyForURL(url, host)` of `script` answers.
///
/// # Errors
/// The file is no JavaScript that this interpreter understands, or does not end.
pub(super) fn find_proxy(
    script: &str,
    url: &str,
    host: &str,
    surroundings: &dyn Surroundings,
) -> Result<String, PacError> {
    if script.len() > MAX_SCRIPT {
        return Err(PacError::new(0, "the file is larger than any sensible one"));
    }
    let program = parser::parse(script)?;
    interpreter::run(&program, url, host, surroundings)
}

/// The answer as groups of proxies: alternatives are used one after the other, so each is a group of its own
/// (client behaviour §5.2). SOCKS proxies are left out.
pub(super) fn groups(answer: &str) -> Vec<ProxyGroup> {
    let mut groups = Vec::new();
    for alternative in answer.split(';').map(str::trim).filter(|text| !text.is_empty()) {
        let (kind, address) = alternative.split_once(char::is_whitespace).unwrap_or((alternative, ""));
        let address = address.trim();
        let proxy = match kind.to_ascii_uppercase().as_str() {
            "DIRECT" => Proxy::Direct,
            "PROXY" | "HTTP" if address.contains("://") => {
                Proxy::Url(address.trim_end_matches('/').to_owned())
            }
            "PROXY" | "HTTP" => Proxy::Url(format!("http://{address}")),
            "HTTPS" => Proxy::Url(format!("https://{address}")),
            _ => {
                tracing::debug!(alternative, "proxy of another kind is left out");
                continue;
            }
        };
        if let Proxy::Url(url) = &proxy
            && !Url::parse(url).is_ok_and(|url| url.scheme != Scheme::File)
        {
            tracing::warn!(proxy = proxy.display(), "proxy configuration names something that is no proxy");
            continue;
        }
        groups.push(ProxyGroup::Listed(vec![proxy]));
        if groups.len() >= MAX_FOUND {
            break;
        }
    }
    groups
}

/// Most proxies that are taken from one answer.
const MAX_FOUND: usize = 32;

#[cfg(test)]
mod tests;
