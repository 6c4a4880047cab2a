//! `.cvmfsdirtab`: which directories are to be nested catalogs (repository format §19.1).
//!
//! The file lies in the root of the repository. Every publish applies it to what it changed, and to everything
//! if the file itself changed. Directories become nested catalogs by it and never cease to be.

use std::collections::HashSet;

use crate::error::{PublishError, shown};
use crate::workspace::{Index, ROOT, Workspace, joined};

/// Name of the file.
pub(crate) const DIRTAB: &[u8] = b".cvmfsdirtab";
/// Longest accepted file: people write it.
pub(crate) const MAX_DIRTAB: u64 = 1 << 20;

/// The rules of one file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Dirtab {
    /// Patterns by path component.
    wanted: Vec<Vec<Pattern>>,
    /// Patterns of whole paths, whose wildcards match slashes too.
    excluded: Vec<Pattern>,
}

impl Dirtab {
    /// Parses the file; one bad line spoils it, as a half-understood one would give a wrong tree.
    pub(crate) fn parse(text: &[u8]) -> Result<Dirtab, PublishError> {
        let mut dirtab = Dirtab::default();
        let (mut positive, mut negative) = (HashSet::new(), HashSet::new());
        for (number, line) in text.split(|&b| b == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let bad = |reason: &str| PublishError::Entry {
                path: "/.cvmfsdirtab".to_owned(),
                reason: format!("line {} ({}) {reason}", number + 1, shown(line)),
            };
            let (excludes, pattern) = match line.strip_prefix(b"!") {
                Some(rest) => (true, rest.trim_ascii_start()),
                None => (false, line),
            };
            let pattern = pattern.strip_suffix(b"/").unwrap_or(pattern);
            if excludes {
                if pattern.is_empty() {
                    return Err(bad("excludes nothing"));
                }
                dirtab.excluded.push(Pattern::parse(pattern).ok_or_else(|| bad("ends with a backslash"))?);
                negative.insert(pattern.to_vec());
            } else {
                let relative =
                    pattern.strip_prefix(b"/").ok_or_else(|| bad("does not begin with a slash"))?;
                let components: Option<Vec<Pattern>> =
                    relative.split(|&b| b == b'/').map(Pattern::parse).collect();
                let components = components.ok_or_else(|| bad("ends with a backslash"))?;
                if components.iter().any(|component| component.0.is_empty()) {
                    return Err(bad("has an empty name"));
                }
                dirtab.wanted.push(components);
                positive.insert(pattern.to_vec());
            }
            if positive.contains(pattern) && negative.contains(pattern) {
                return Err(bad("is both wanted and excluded"));
            }
        }
        Ok(dirtab)
    }

    /// Directories that the rules want as nested catalogs and that are none yet, parents before children. Only what
    /// the transaction changed is looked at, unless `everywhere`.
    pub(crate) fn missing(
        &self,
        workspace: &mut Workspace,
        everywhere: bool,
    ) -> Result<Vec<Vec<u8>>, PublishError> {
        let mut found = Vec::new();
        if !self.wanted.is_empty() {
            let states: Vec<&[Pattern]> = self.wanted.iter().map(Vec::as_slice).collect();
            self.walk(workspace, (b"", ROOT), &states, everywhere, &mut found)?;
        }
        Ok(found)
    }

    /// `states` are what is left of the rules that match the path so far.
    fn walk(
        &self,
        workspace: &mut Workspace,
        (path, at): (&[u8], Index),
        states: &[&[Pattern]],
        everywhere: bool,
        found: &mut Vec<Vec<u8>>,
    ) -> Result<(), PublishError> {
        for child in workspace.list(at, path)? {
            if !child.is_directory() || child.is_bind_mountpoint() {
                continue;
            }
            let matching: Vec<&[Pattern]> = states
                .iter()
                .filter(|state| state.first().is_some_and(|first| first.matches(&child.name)))
                .map(|state| &state[1..])
                .collect();
            if matching.is_empty() {
                continue;
            }
            let below = joined(path, &child.name);
            if !everywhere && !workspace.has_changes(at, &below) {
                continue;
            }
            let is_wanted = matching.iter().any(|state| state.is_empty());
            if is_wanted && !child.is_nested_mountpoint() && !self.excludes(&below) {
                found.push(below.clone());
            }
            let further: Vec<&[Pattern]> = matching.into_iter().filter(|state| !state.is_empty()).collect();
            if !further.is_empty() {
                let content = workspace.content_catalog(&below)?;
                self.walk(workspace, (&below, content), &further, everywhere, found)?;
            }
        }
        Ok(())
    }

    fn excludes(&self, path: &[u8]) -> bool {
        self.excluded.iter().any(|pattern| pattern.matches(path))
    }
}

/// A name or path with the wildcards `*` and `?`.
#[derive(Debug, PartialEq, Eq)]
struct Pattern(Vec<Token>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Byte(u8),
    One,
    Any,
}

impl Pattern {
    /// `None` if a backslash has nothing to escape.
    fn parse(text: &[u8]) -> Option<Pattern> {
        let mut tokens = Vec::with_capacity(text.len());
        let mut bytes = text.iter();
        while let Some(&byte) = bytes.next() {
            tokens.push(match byte {
                b'*' => Token::Any,
                b'?' => Token::One,
                b'\\' => Token::Byte(*bytes.next()?),
                byte => Token::Byte(byte),
            });
        }
        Some(Pattern(tokens))
    }

    /// Matches the whole of `text`. Time is at most the product of both lengths.
    fn matches(&self, text: &[u8]) -> bool {
        let tokens = &self.0;
        let (mut token, mut at) = (0, 0);
        // where to go on if the run that the last `*` stands for must be longer
        let mut retry: Option<(usize, usize)> = None;
        while at < text.len() {
            match tokens.get(token) {
                Some(Token::Any) => {
                    retry = Some((token + 1, at));
                    token += 1;
                }
                Some(Token::One) => (token, at) = (token + 1, at + 1),
                Some(Token::Byte(byte)) if *byte == text[at] => (token, at) = (token + 1, at + 1),
                _ => match retry {
                    Some((after, from)) => {
                        retry = Some((after, from + 1));
                        (token, at) = (after, from + 1);
                    }
                    None => return false,
                },
            }
        }
        tokens[token..].iter().all(|token| *token == Token::Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_as_people_expect() {
        let matches =
            |pattern: &str, text: &str| Pattern::parse(pattern.as_bytes()).unwrap().matches(text.as_bytes());
        for (pattern, text) in
            [("*", ""), ("*", ".hidden"), ("a*c", "abbc"), ("a?c", "abc"), ("*.svn", "/a/.svn"), (r"\*", "*")]
        {
            assert!(matches(pattern, text), "{pattern} does not match {text}");
        }
        for (pattern, text) in [("a*c", "abd"), ("a?c", "ac"), ("", "a"), (r"\*", "a"), ("a*b*c", "acb")] {
            assert!(!matches(pattern, text), "{pattern} matches {text}");
        }
        let long = "a".repeat(4000);
        assert!(!matches("*a*a*a*a*a*a*a*b", &long));
    }

    #[test]
    fn one_bad_line_spoils_the_file() {
        let text = b"# comment\n\n/software/*/*\n  ! *.svn\n! /software/x/\n/data/\n";
        let dirtab = Dirtab::parse(text).unwrap();
        assert_eq!((dirtab.wanted.len(), dirtab.excluded.len()), (2, 2));
        assert!(dirtab.excludes(b"/software/a/.svn") && dirtab.excludes(b"/software/x"));
        assert!(!dirtab.excludes(b"/software/x/y"));
        for bad in ["software/*", "/", "/a//b", "!", "/a\\", "/a\n!/a\n", "!/a\n/a/"] {
            let error = Dirtab::parse(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("entry /.cvmfsdirtab: line "), "{bad:?}: {error}");
        }
    }
}
