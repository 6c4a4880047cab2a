//! Text into tokens.

use super::PacError;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    Number(f64),
    Text(String),
    /// A name or a keyword.
    Word(String),
    /// An operator or a bracket.
    Mark(&'static str),
    /// A regular expression and its flags.
    Regex(String, String),
    End,
}

#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) token: Token,
    pub(super) line: u32,
    /// Whether a line ended before it, which ends a statement as well.
    pub(super) after_newline: bool,
}

/// Longest first, so that the first match is the right one.
const MARKS: &[&str] = &[
    ">>>=", "===", "!==", ">>>", "<<=", ">>=", "==", "!=", "<=", ">=", "&&", "||", "++", "--", "+=", "-=",
    "*=", "/=", "%=", "&=", "|=", "^=", "<<", ">>", "{", "}", "(", ")", "[", "]", ";", ",", "<", ">", "+",
    "-", "*", "/", "%", "&", "|", "^", "!", "~", "?", ":", "=", ".",
];

pub(super) fn tokens(script: &str) -> Result<Vec<Placed>, PacError> {
    let script = script.trim_start_matches('\u{feff}');
    // Files that were prepared for web pages begin with an HTML comment; anything else is the page itself.
    let begin = script.trim_start();
    if begin.starts_with('<') && !begin.starts_with("<!--") {
        return Err(PacError::new(1, "this is a web page and no proxy configuration"));
    }
    let mut lexer = Lexer { rest: script, line: 1, found: Vec::new() };
    lexer.run()?;
    Ok(lexer.found)
}

struct Lexer<'a> {
    rest: &'a str,
    line: u32,
    found: Vec<Placed>,
}

impl<'a> Lexer<'a> {
    fn run(&mut self) -> Result<(), PacError> {
        loop {
            let after_newline = self.skip_blank()?;
            let line = self.line;
            let token = self.next()?;
            let end = token == Token::End;
            self.found.push(Placed { token, line, after_newline });
            if end {
                return Ok(());
            }
        }
    }

    fn error<T>(&self, reason: &str) -> Result<T, PacError> {
        Err(PacError::new(self.line, reason))
    }

    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at_checked(bytes).unwrap_or((self.rest, ""));
        self.line = self.line.saturating_add(u32::try_from(taken.matches('\n').count()).unwrap_or(u32::MAX));
        self.rest = rest;
        taken
    }

    /// Skips blanks and comments; tells whether a line ended.
    fn skip_blank(&mut self) -> Result<bool, PacError> {
        let before = self.line;
        loop {
            let blank = self.rest.len() - self.rest.trim_start().len();
            self.take(blank);
            if self.rest.starts_with("//") || self.rest.starts_with("<!--") {
                let end = self.rest.find('\n').unwrap_or(self.rest.len());
                self.take(end);
            } else if self.rest.starts_with("/*") {
                match self.rest.find("*/") {
                    Some(end) => self.take(end + 2),
                    None => return self.error("comment without end"),
                };
            } else {
                return Ok(self.line != before);
            }
        }
    }

    fn next(&mut self) -> Result<Token, PacError> {
        let Some(first) = self.rest.chars().next() else { return Ok(Token::End) };
        if first == '"' || first == '\'' {
            return self.text(first);
        }
        let second_is_digit = self.rest.as_bytes().get(1).is_some_and(u8::is_ascii_digit);
        if first.is_ascii_digit() || (first == '.' && second_is_digit) {
            return self.number();
        }
        if is_word(first) {
            let end = self.rest.find(|letter| !is_word(letter)).unwrap_or(self.rest.len());
            return Ok(Token::Word(self.take(end).to_owned()));
        }
        if first == '/' && self.regex_may_follow() {
            return self.regex();
        }
        match MARKS.iter().find(|mark| self.rest.starts_with(**mark)) {
            Some(mark) => {
                self.take(mark.len());
                Ok(Token::Mark(mark))
            }
            None => self.error("unknown character"),
        }
    }

    fn text(&mut self, quote: char) -> Result<Token, PacError> {
        let mut value = String::new();
        let mut letters = self.rest.char_indices().skip(1);
        while let Some((index, letter)) = letters.next() {
            match letter {
                '\n' => break,
                '\\' => match letters.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, 't')) => value.push('\t'),
                    Some((_, 'r')) => value.push('\r'),
                    Some((_, kind @ ('x' | 'u'))) => {
                        let count = if kind == 'x' { 2 } else { 4 };
                        let digits: String = letters.by_ref().take(count).map(|(_, digit)| digit).collect();
                        match u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32) {
                            Some(letter) if digits.len() == count => value.push(letter),
                            _ => return self.error("unknown escape sequence"),
                        }
                    }
                    Some((_, '\n')) => {}
                    Some((_, other)) => value.push(other),
                    None => break,
                },
                _ if letter == quote => {
                    self.take(index + 1);
                    return Ok(Token::Text(value));
                }
                _ => value.push(letter),
            }
        }
        self.error("string without end")
    }

    fn number(&mut self) -> Result<Token, PacError> {
        if self.rest.starts_with("0x") || self.rest.starts_with("0X") {
            let digits = self.rest.get(2..).unwrap_or_default();
            let end = digits.find(|digit: char| !digit.is_ascii_hexdigit()).unwrap_or(digits.len());
            let value = u32::from_str_radix(digits.get(..end).unwrap_or_default(), 16);
            self.take(end + 2);
            return value
                .map_or_else(|_| self.error("not a number"), |value| Ok(Token::Number(value.into())));
        }
        let mut end = 0;
        let bytes = self.rest.as_bytes();
        let digits =
            |from: usize| from + bytes.iter().skip(from).take_while(|byte| byte.is_ascii_digit()).count();
        end = digits(end);
        if bytes.get(end) == Some(&b'.') {
            end = digits(end + 1);
        }
        if matches!(bytes.get(end), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
            end = digits(end + 1 + sign);
        }
        let text = self.take(end);
        text.parse().map_or_else(|_| self.error("not a number"), |value| Ok(Token::Number(value)))
    }

    /// Whether a slash begins a regular expression here, not a division.
    fn regex_may_follow(&self) -> bool {
        match self.found.last().map(|placed| &placed.token) {
            None => true,
            Some(Token::Mark(mark)) => !matches!(*mark, ")" | "]" | "}"),
            Some(Token::Word(word)) => matches!(word.as_str(), "return" | "typeof" | "case" | "in" | "else"),
            Some(_) => false,
        }
    }

    fn regex(&mut self) -> Result<Token, PacError> {
        let mut in_class = false;
        let mut escaped = false;
        for (index, letter) in self.rest.char_indices().skip(1) {
            match letter {
                '\n' => break,
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '[' => in_class = true,
                ']' => in_class = false,
                '/' if !in_class => {
                    let pattern = self.rest.get(1..index).unwrap_or_default().to_owned();
                    self.take(index + 1);
                    let end = self
                        .rest
                        .find(|letter: char| !letter.is_ascii_alphabetic())
                        .unwrap_or(self.rest.len());
                    return Ok(Token::Regex(pattern, self.take(end).to_owned()));
                }
                _ => {}
            }
        }
        self.error("regular expression without end")
    }
}

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_' || letter == '$'
}
