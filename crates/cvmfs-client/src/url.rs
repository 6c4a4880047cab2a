//! The URLs of servers and proxies as this client understands them: scheme, host, port, path.
//!
//! They come from configuration files, control sockets, name servers and redirects, so everything that could smuggle
//! another header or another host into a request is refused here.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// Longest URL in bytes; longer ones are refused by common proxies as well.
pub(crate) const MAX_URL: usize = 8 * 1024;

/// How a server is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Scheme {
    Http,
    Https,
    /// A directory of this machine.
    File,
}

/// A URL that can be asked. Credentials do not appear in its text forms.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Url {
    pub(crate) scheme: Scheme,
    /// Name or address, IPv6 without brackets, in lower case; empty for files.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// `user:password` as written (percent-encoded).
    pub(crate) credentials: Option<String>,
    /// Path with a leading slash, or nothing; queries stay attached, fragments are cut off.
    pub(crate) path: String,
}

impl Url {
    /// Understands an absolute URL.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        if text.len() > MAX_URL {
            return Err("URL is too long");
        }
        if text.bytes().any(|byte| byte.is_ascii_control() || byte.is_ascii_whitespace() || !byte.is_ascii())
        {
            return Err("URL contains characters that must be percent-encoded");
        }
        let (scheme, rest) = text.split_once("://").ok_or("URL has no scheme")?;
        let (scheme, port) = match scheme.to_ascii_lowercase().as_str() {
            "http" => (Scheme::Http, 80),
            "https" => (Scheme::Https, 443),
            "file" => (Scheme::File, 0),
            _ => return Err("scheme is not http, https or file"),
        };
        let rest = rest.split('#').next().unwrap_or(rest);
        let (authority, path) = match rest.find(['/', '?']) {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let path = if path.starts_with('?') { format!("/{path}") } else { path.to_owned() };
        if scheme == Scheme::File {
            return match authority {
                "" | "localhost" if path.starts_with('/') => {
                    Ok(Self { scheme, host: String::new(), port, credentials: None, path })
                }
                _ => Err("a file URL names a directory of this machine: file:///DIRECTORY"),
            };
        }
        let (credentials, address) = match authority.rsplit_once('@') {
            Some((credentials, address)) => (Some(credentials.to_owned()), address),
            None => (None, authority),
        };
        let (host, port) = host_and_port(address, port)?;
        Ok(Self { scheme, host, port, credentials, path })
    }

    /// The URL that a redirect from this one leads to.
    ///
    /// # Errors
    /// As [`Url::parse`].
    pub(crate) fn join(&self, location: &str) -> Result<Self, &'static str> {
        if location.contains("://") {
            return Self::parse(location);
        }
        let scheme = self.scheme_name();
        if let Some(rest) = location.strip_prefix("//") {
            return Self::parse(&format!("{scheme}://{rest}"));
        }
        let base = self.path.split('?').next().unwrap_or_default();
        let path = if location.starts_with('/') {
            location.to_owned()
        } else {
            let directory = base.rsplit_once('/').map_or("", |(directory, _)| directory);
            format!("{directory}/{location}")
        };
        Self::parse(&format!("{scheme}://{}{path}", self.authority()))
    }

    /// `http`, `https` or `file`.
    pub(crate) fn scheme_name(&self) -> &'static str {
        match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
            Scheme::File => "file",
        }
    }

    /// `HOST` or `HOST:PORT`, the port only if it is not the scheme's own.
    pub(crate) fn authority(&self) -> String {
        let usual = matches!((self.scheme, self.port), (Scheme::Http, 80) | (Scheme::Https, 443))
            || self.scheme == Scheme::File;
        let host = bracketed(&self.host);
        if usual { host } else { format!("{host}:{}", self.port) }
    }

    /// The host as an address, if it is none that has to be resolved.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl fmt::Display for Url {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}://{}{}", self.scheme_name(), self.authority(), self.path)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// The host as it stands in a URL.
pub(crate) fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn host_and_port(address: &str, default: u16) -> Result<(String, u16), &'static str> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("IPv6 address without closing bracket")?;
            host.parse::<Ipv6Addr>().map_err(|_| "not an IPv6 address between brackets")?;
            match port.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if port.is_empty() => (host, None),
                None => return Err("expected a port after the address"),
            }
        }
        None => match address.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    if host.is_empty() || host.len() > 253 {
        return Err("URL without a host name");
    }
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
    if !host.bytes().all(fits) {
        return Err("host name contains letters that do not belong there");
    }
    let port = match port {
        None | Some("") => default,
        Some(port) => {
            port.parse::<u16>().ok().filter(|port| *port > 0).ok_or("port is not a number up to 65535")?
        }
    };
    Ok((host.to_ascii_lowercase(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart_and_put_together_again() {
        let cases = [
            ("http://S1.example.org/cvmfs/a", "http://s1.example.org/cvmfs/a", "s1.example.org", 80),
            ("http://p:3128", "http://p:3128", "p", 3128),
            ("https://user:pass@h:443/x?y#z", "https://h/x?y", "h", 443),
            ("http://[2001:db8::1]:8080/x", "http://[2001:db8::1]:8080/x", "2001:db8::1", 8080),
            ("file:///srv/cvmfs", "file:///srv/cvmfs", "", 0),
        ];
        for (text, shown, host, port) in cases {
            let url = Url::parse(text).unwrap();
            assert_eq!((url.to_string().as_str(), url.host.as_str(), url.port), (shown, host, port));
        }
        let url = Url::parse("http://user:p%40ss@proxy:3128").unwrap();
        assert_eq!(url.credentials.as_deref(), Some("user:p%40ss"));
        assert!(!format!("{url:?} {url}").contains("p%40ss"), "no secret in a text form");
    }

    #[test]
    fn what_could_smuggle_something_into_a_request_is_refused() {
        let wrong = [
            "",
            "http",
            "http://",
            "http:///x",
            "ftp://h/",
            "http://h h/",
            "http://h/\r\nX: y",
            "http://h:0/",
            "http://h:70000",
            "http://h:x",
            "http://[::1",
            "http://[x]:80",
            "http://[::1]80",
            "http://a/ä",
            "http://a(b)/",
            "file://host/x",
        ];
        for text in wrong {
            assert!(Url::parse(text).is_err(), "{text}");
        }
        assert!(Url::parse(&format!("http://h/{}", "x".repeat(MAX_URL))).is_err());
    }

    #[test]
    fn redirects_lead_to_absolute_and_relative_places() {
        let base = Url::parse("http://h:8000/cvmfs/a/data/x").unwrap();
        let cases = [
            ("https://other/y", "https://other/y"),
            ("//other/y", "http://other/y"),
            ("/y", "http://h:8000/y"),
            ("y", "http://h:8000/cvmfs/a/data/y"),
        ];
        for (location, expected) in cases {
            assert_eq!(base.join(location).unwrap().to_string(), expected);
        }
        assert!(base.join("gopher://x/").is_err());
    }
}
