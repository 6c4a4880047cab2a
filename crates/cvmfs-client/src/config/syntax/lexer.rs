//! Cuts the text of a configuration file into words and operators.

/// Deepest nesting of `${…}`; bounds the recursion here and where values are expanded.
const MAX_DEPTH: usize = 8;

/// One token and the line it starts in, counted from 1.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) line: u32,
    pub(super) kind: TokenKind,
}

#[derive(Debug)]
pub(super) enum TokenKind {
    Word(Word),
    Newline,
    Semicolon,
    And,
    Or,
    /// An operator that only a shell could execute.
    Unsupported(&'static str),
}

/// A word: adjacent fragments without a blank between them.
#[derive(Debug, Default)]
pub(super) struct Word {
    pub(super) fragments: Vec<Fragment>,
}

#[derive(Debug, Clone)]
pub(super) enum Fragment {
    Text {
        text: String,
        quoted: bool,
    },
    Variable {
        name: String,
        substitute: Option<Substitute>,
    },
    /// The inside of `$((…))`.
    Arithmetic(String),
    /// An expansion that only a shell could execute.
    Unsupported(&'static str),
}

/// What is written instead of a variable's value, or in addition to its look-up: `${NAME:-text}` and its like.
#[derive(Debug, Clone)]
pub(super) struct Substitute {
    pub(super) kind: SubstituteKind,
    /// With the colon an empty value counts as none.
    pub(super) colon: bool,
    pub(super) text: Vec<Fragment>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SubstituteKind {
    /// `-`: if there is no value.
    Default,
    /// `=`: likewise, and the variable is set to it.
    Assign,
    /// `+`: if there is a value.
    Alternative,
}

impl Word {
    /// The text of a word without quotes and expansions: only such a word can be a command or a reserved word.
    pub(super) fn bare(&self) -> Option<&str> {
        match self.fragments.as_slice() {
            [Fragment::Text { text, quoted: false }] => Some(text),
            _ => None,
        }
    }

    /// The name and the value's fragments if the word has the form `NAME=…`.
    pub(super) fn assignment(&self) -> Option<(&str, Vec<Fragment>)> {
        let Some(Fragment::Text { text, quoted: false }) = self.fragments.first() else { return None };
        let (name, rest) = text.split_once('=')?;
        if !super::is_name(name) {
            return None;
        }
        let mut fragments = vec![Fragment::Text { text: rest.to_owned(), quoted: false }];
        fragments.extend(self.fragments.iter().skip(1).cloned());
        Some((name, fragments))
    }

    fn push(&mut self, letter: char, in_quotes: bool) {
        match self.fragments.last_mut() {
            Some(Fragment::Text { text, quoted }) if *quoted == in_quotes => text.push(letter),
            _ => self.fragments.push(Fragment::Text { text: letter.to_string(), quoted: in_quotes }),
        }
    }
}

/// The tokens of `text` and what was wrong with it.
pub(super) fn tokens(text: &str) -> (Vec<Token>, Vec<(u32, &'static str)>) {
    let mut lexer = Lexer { rest: text.chars().peekable(), line: 1, depth: 0, problems: Vec::new() };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.token() {
        tokens.push(token);
    }
    (tokens, lexer.problems)
}

struct Lexer<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    line: u32,
    /// Nesting of `${…}`.
    depth: usize,
    problems: Vec<(u32, &'static str)>,
}

impl Lexer<'_> {
    fn token(&mut self) -> Option<Token> {
        loop {
            let line = self.line;
            let kind = match *self.rest.peek()? {
                ' ' | '\t' | '\r' => {
                    self.rest.next();
                    continue;
                }
                '#' => {
                    while self.rest.next_if(|letter| *letter != '\n').is_some() {}
                    continue;
                }
                '\n' => {
                    self.rest.next();
                    self.line += 1;
                    TokenKind::Newline
                }
                ';' => self.single(TokenKind::Semicolon),
                '&' => self.doubled('&', TokenKind::And, "&"),
                '|' => self.doubled('|', TokenKind::Or, "|"),
                '(' => self.single(TokenKind::Unsupported("(")),
                ')' => self.single(TokenKind::Unsupported(")")),
                '<' => self.single(TokenKind::Unsupported("<")),
                '>' => self.single(TokenKind::Unsupported(">")),
                _ => match self.word() {
                    Some(word) => TokenKind::Word(word),
                    None => continue,
                },
            };
            return Some(Token { line, kind });
        }
    }

    fn single(&mut self, kind: TokenKind) -> TokenKind {
        self.rest.next();
        kind
    }

    fn doubled(&mut self, letter: char, kind: TokenKind, alone: &'static str) -> TokenKind {
        self.rest.next();
        if self.rest.next_if_eq(&letter).is_some() { kind } else { TokenKind::Unsupported(alone) }
    }

    /// A word; `None` if it consisted of nothing but a line continuation.
    fn word(&mut self) -> Option<Word> {
        let mut word = Word::default();
        let mut any = false;
        while let Some(&letter) = self.rest.peek() {
            match letter {
                ' ' | '\t' | '\r' | '\n' | ';' | '&' | '|' | '(' | ')' | '<' | '>' => break,
                '\\' => {
                    self.rest.next();
                    match self.rest.next() {
                        Some('\n') => {
                            self.line += 1;
                            continue;
                        }
                        Some(escaped) => word.push(escaped, true),
                        None => {}
                    }
                }
                '\'' => self.single_quotes(&mut word),
                '"' => self.double_quotes(&mut word),
                '$' => self.dollar(&mut word, false),
                '`' => self.backticks(&mut word),
                _ => {
                    self.rest.next();
                    word.push(letter, false);
                }
            }
            any = true;
        }
        any.then_some(word)
    }

    /// A quoted text ends at the line's end at the latest: values have no line breaks, and a forgotten quote must
    /// not swallow the rest of the file.
    fn single_quotes(&mut self, word: &mut Word) {
        self.rest.next();
        word.fragments.push(Fragment::Text { text: String::new(), quoted: true });
        loop {
            match self.rest.peek() {
                None | Some('\n') => {
                    return self.problems.push((self.line, "quote is not closed in this line"));
                }
                Some('\'') => {
                    self.rest.next();
                    return;
                }
                Some(&letter) => {
                    self.rest.next();
                    word.push(letter, true);
                }
            }
        }
    }

    fn double_quotes(&mut self, word: &mut Word) {
        self.rest.next();
        word.fragments.push(Fragment::Text { text: String::new(), quoted: true });
        loop {
            match self.rest.peek() {
                None | Some('\n') => {
                    return self.problems.push((self.line, "quote is not closed in this line"));
                }
                Some('"') => {
                    self.rest.next();
                    return;
                }
                Some('$') => self.dollar(word, true),
                Some('`') => self.backticks(word),
                Some('\\') => {
                    self.rest.next();
                    match self.rest.next() {
                        Some('\n') => self.line += 1,
                        Some(escaped @ ('"' | '\\' | '$' | '`')) => word.push(escaped, true),
                        Some(other) => {
                            word.push('\\', true);
                            word.push(other, true);
                        }
                        None => {}
                    }
                }
                Some(&letter) => {
                    self.rest.next();
                    word.push(letter, true);
                }
            }
        }
    }

    fn backticks(&mut self, word: &mut Word) {
        self.rest.next();
        while let Some(letter) = self.rest.next_if(|letter| *letter != '\n') {
            if letter == '`' {
                break;
            }
        }
        word.fragments.push(Fragment::Unsupported("command substitution"));
    }

    fn dollar(&mut self, word: &mut Word, in_quotes: bool) {
        self.rest.next();
        match self.rest.peek() {
            Some('(') => {
                let inside = self.parentheses();
                word.fragments.push(match inside.strip_prefix('(').and_then(|text| text.strip_suffix(')')) {
                    Some(expression) => Fragment::Arithmetic(expression.to_owned()),
                    None => Fragment::Unsupported("command substitution"),
                });
            }
            Some('{') => {
                self.rest.next();
                let fragment = self.braces();
                word.fragments.push(fragment);
            }
            Some(letter) if letter.is_ascii_alphabetic() || *letter == '_' => {
                let name = self.name();
                word.fragments.push(Fragment::Variable { name, substitute: None });
            }
            Some(letter) if letter.is_ascii_digit() || "?*@#!$-".contains(*letter) => {
                self.rest.next();
                word.fragments.push(Fragment::Unsupported("a special shell variable"));
            }
            _ => word.push('$', in_quotes),
        }
    }

    /// What stands between a parenthesis and its counterpart, or up to the line's end.
    fn parentheses(&mut self) -> String {
        let mut inside = String::new();
        let mut depth = 0_u32;
        while let Some(letter) = self.rest.next_if(|letter| *letter != '\n') {
            match letter {
                '(' => depth += 1,
                ')' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                inside.remove(0);
                return inside;
            }
            inside.push(letter);
        }
        inside
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(letter) = self.rest.next_if(|letter| letter.is_ascii_alphanumeric() || *letter == '_')
        {
            name.push(letter);
        }
        name
    }

    /// The inside of `${…}` and its closing brace.
    fn braces(&mut self) -> Fragment {
        let name = self.name();
        let mut rest = String::new();
        let mut open = 1_u32;
        while let Some(letter) = self.rest.next_if(|letter| *letter != '\n') {
            match letter {
                '{' => open += 1,
                '}' => open -= 1,
                _ => {}
            }
            if open == 0 {
                break;
            }
            rest.push(letter);
        }
        if open > 0 {
            self.problems.push((self.line, "'${' is not closed in this line"));
        }
        if name.is_empty() || open > 0 {
            return Fragment::Unsupported("this expansion");
        }
        if rest.is_empty() {
            return Fragment::Variable { name, substitute: None };
        }
        match self.substitute(&rest) {
            Some(substitute) => Fragment::Variable { name, substitute: Some(substitute) },
            None => Fragment::Unsupported("this expansion"),
        }
    }

    fn substitute(&mut self, text: &str) -> Option<Substitute> {
        let (colon, text) = match text.strip_prefix(':') {
            Some(text) => (true, text),
            None => (false, text),
        };
        let mut letters = text.chars();
        let kind = match letters.next()? {
            '-' => SubstituteKind::Default,
            '=' => SubstituteKind::Assign,
            '+' => SubstituteKind::Alternative,
            _ => return None,
        };
        if self.depth == MAX_DEPTH {
            return None;
        }
        let rest = letters.as_str().chars().peekable();
        let mut inner = Lexer { rest, line: self.line, depth: self.depth + 1, problems: Vec::new() };
        let fragments = inner.text();
        self.problems.append(&mut inner.problems);
        Some(Substitute { kind, colon, text: fragments })
    }

    /// All that is left as one word, in which blanks and operators have no meaning.
    fn text(&mut self) -> Vec<Fragment> {
        let mut word = Word::default();
        while let Some(&letter) = self.rest.peek() {
            match letter {
                '\'' => self.single_quotes(&mut word),
                '"' => self.double_quotes(&mut word),
                '$' => self.dollar(&mut word, true),
                '`' => self.backticks(&mut word),
                '\\' => {
                    self.rest.next();
                    if let Some(escaped) = self.rest.next() {
                        word.push(escaped, true);
                    }
                }
                _ => {
                    self.rest.next();
                    word.push(letter, true);
                }
            }
        }
        word.fragments
    }
}
