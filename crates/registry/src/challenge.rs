//! The `WWW-Authenticate` header (RFC 9110 §11.6.1).
//!
//! Several challenges may come in one header or in several. Commas separate challenges
//! as well as parameters, and inside quotes they belong to the value:
//! `scope="repository:x:pull,push"`.

/// One challenge of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// In lower case.
    pub scheme: String,
    /// Names in lower case.
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The value of a parameter.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// Reads all challenges of one header. What cannot be read ends the list: a server that
/// sends garbage is treated like one that sends less.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut scanner = Scanner { rest: header };
    let mut challenges: Vec<Challenge> = Vec::new();
    loop {
        scanner.skip_separators();
        let Some(word) = scanner.token() else { return challenges };
        if !scanner.take_equals() {
            challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
            scanner.skip_token68();
            continue;
        }
        let (Some(value), Some(challenge)) = (scanner.value(), challenges.last_mut()) else {
            return challenges;
        };
        challenge.parameters.push((word.to_ascii_lowercase(), value));
    }
}

struct Scanner<'a> {
    rest: &'a str,
}

impl<'a> Scanner<'a> {
    fn skip_separators(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', ',']);
    }

    fn token(&mut self) -> Option<&'a str> {
        let end = self.rest.find(|c: char| !is_token(c)).unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!token.is_empty()).then_some(token)
    }

    fn take_equals(&mut self) -> bool {
        match self.rest.trim_start_matches([' ', '\t']).strip_prefix('=') {
            Some(rest) => {
                self.rest = rest.trim_start_matches([' ', '\t']);
                true
            }
            None => false,
        }
    }

    /// `Negotiate YII…==`: an opaque word after the scheme instead of parameters.
    fn skip_token68(&mut self) {
        let rest = self.rest.trim_start_matches(' ');
        let end = rest.find(|c: char| !(is_token(c) || c == '/')).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let padding_end = after.trim_start_matches('=');
        let ends_here = padding_end.is_empty() || padding_end.starts_with([',', ' ']);
        let is_scheme_or_name = after.starts_with(' ') || (after.starts_with('=') && !ends_here);
        if !word.is_empty() && ends_here && !is_scheme_or_name {
            self.rest = padding_end;
        }
    }

    fn value(&mut self) -> Option<String> {
        match self.rest.strip_prefix('"') {
            Some(rest) => self.quoted(rest),
            None => self.token().map(str::to_owned),
        }
    }

    fn quoted(&mut self, text: &'a str) -> Option<String> {
        let mut value = String::new();
        let mut characters = text.char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '"' => {
                    self.rest = text.get(at + 1..).unwrap_or_default();
                    return Some(value);
                }
                '\\' => value.push(characters.next()?.1),
                other => value.push(other),
            }
        }
        None
    }
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bearer(header: &str) -> Challenge {
        parse(header).into_iter().find(|c| c.scheme == "bearer").unwrap()
    }

    #[test]
    fn commas_in_quotes_belong_to_the_value() {
        let challenge = bearer(
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
        );
        assert_eq!(challenge.parameter("realm"), Some("https://auth.docker.io/token"));
        assert_eq!(challenge.parameter("service"), Some("registry.docker.io"));
        assert_eq!(challenge.parameter("scope"), Some("repository:a/b:pull,push"));
    }

    #[test]
    fn several_challenges_in_one_header() {
        let found = parse(r#"Negotiate YIIabc==, Basic realm="a\"b, c", bearer Realm = "x" , error=invalid"#);
        let schemes: Vec<_> = found.iter().map(|c| c.scheme.as_str()).collect();
        assert_eq!(schemes, ["negotiate", "basic", "bearer"]);
        assert_eq!(found[1].parameter("realm"), Some("a\"b, c"));
        assert_eq!(found[2].parameter("realm"), Some("x"));
        assert_eq!(found[2].parameter("error"), Some("invalid"));
    }

    #[test]
    fn schemes_without_parameters() {
        assert_eq!(parse("Negotiate, NTLM").len(), 2);
        assert_eq!(parse("Negotiate").len(), 1);
        assert_eq!(parse("").len(), 0);
    }

    #[test]
    fn garbage_ends_the_list() {
        assert!(parse("=\"x\"").is_empty());
        assert_eq!(parse(r#"Basic realm="open"#), [Challenge { scheme: "basic".into(), parameters: vec![] }]);
    }

    proptest! {
        #[test]
        fn any_header_is_read_to_an_end(header in "\\PC{0,120}") {
            let _ = parse(&header);
        }
    }
}
