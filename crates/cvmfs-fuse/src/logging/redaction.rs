//! Keeps secrets out of what leaves the client: log lines, answers, messages.
//!
//! Secrets come into a client's texts by one way: as user name and password in the URL of a proxy or server. They
//! are recognised by their form, wherever they appear, so that no place that formats an error has to think of it.

use std::borrow::Cow;

/// What stands in place of user name and password.
const HIDDEN: &str = "***";
/// Longest part of a URL in front of `@` that is taken for user name and password.
const LONGEST: usize = 4096;

/// The text without user names and passwords of URLs.
pub(crate) fn redacted(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(position) = rest.find("://") {
        let (before, after) = rest.split_at(position + 3);
        safe.push_str(before);
        rest = after;
        // A password may hold anything but the end of the authority; the last @ in front of that ends it.
        let authority = after.find(is_end).map_or(after, |end| after.get(..end).unwrap_or(after));
        if let Some(at) = authority.rfind('@').filter(|at| *at <= LONGEST) {
            safe.push_str(HIDDEN);
            rest = after.get(at..).unwrap_or_default();
        }
    }
    safe.push_str(rest);
    safe
}

/// What cannot stand in the authority of a URL: it begins the path, or the text goes on.
fn is_end(character: char) -> bool {
    character.is_whitespace()
        || matches!(character, '/' | '?' | '#' | '"' | '\'' | '|' | ';' | ',' | '<' | '>' | ')' | '(')
}

/// The same for a line of a log, which need not be text.
pub(super) fn redacted_line(line: &[u8]) -> Cow<'_, [u8]> {
    match std::str::from_utf8(line) {
        // The usual case costs a search.
        Ok(text) if !text.contains('@') => Cow::Borrowed(line),
        Ok(text) => Cow::Owned(redacted(text).into_bytes()),
        Err(_) => Cow::Owned(redacted(&String::from_utf8_lossy(line)).into_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_of_urls_are_hidden_wherever_they_stand() {
        let cases = [
            ("http://u:secret@p:3128", "http://***@p:3128"),
            ("http://u:s@cr@t@p:3128/x", "http://***@p:3128/x"),
            ("a=\"http://u:secret@p\" b=https://t0ken@h/y", "a=\"http://***@p\" b=https://***@h/y"),
            ("http://u:secret@a|http://v:secret@b;DIRECT", "http://***@a|http://***@b;DIRECT"),
            ("http://p:3128/path@1", "http://p:3128/path@1"),
            ("mail me@x.org about http://p", "mail me@x.org about http://p"),
            ("://", "://"),
            ("", ""),
        ];
        for (text, safe) in cases {
            assert_eq!(redacted(text), safe);
        }
        assert_eq!(redacted_line(b"\xff http://u:secret@p\n").as_ref(), "\u{fffd} http://***@p\n".as_bytes());
    }
}
