//! The shell-like syntax of configuration files, evaluated without a shell (client behaviour §1.2).
//!
//! The C++ client feeds each file to `/bin/sh`. Here a file is data: assignments with the shell's quoting,
//! `$NAME`, `${NAME}`, `${NAME:-default}` and its like, `$((…))`, comments, `export`/`readonly`/`eval` in front of an
//! assignment, `unset`, `if`/`elif`/`else`/`fi` over tests of strings, numbers and files and over a plain `grep -q`,
//! `.` of another file, and `return`: what distributed configuration uses. Everything else a shell could do (command
//! substitution, loops, running programs) is not executed but reported with its line, and assignments that depend on
//! it are left out.
//!
//! Invariants: no input makes this module panic, recurse deeper than [`MAX_DEPTH`] or build a value longer than
//! [`MAX_VALUE`].

mod arithmetic;
mod condition;
mod lexer;

pub(super) use condition::FileTest;
use condition::Grep;
use lexer::{Fragment, SubstituteKind, Token, TokenKind, Word};

/// Longest value of a parameter in bytes; the longest in the field are server lists of a few hundred.
const MAX_VALUE: usize = 32 * 1024;
/// Deepest nesting of `if`; bounds the recursion of the evaluator.
const MAX_DEPTH: usize = 32;

/// Where names are looked up and assigned.
pub(super) trait Variables {
    /// The present value of `name`.
    fn value(&self, name: &str) -> Option<&str>;
    /// `name` was assigned in `line`.
    fn assign(&mut self, name: &str, value: String, line: u32, how: Assignment);
    /// Evaluates the file `path`, as seen from the directory of the file at hand; false if that is not possible.
    fn include(&mut self, path: &str, line: u32) -> Result<Flow, String>;
    /// The answer to a question about a file.
    fn test_file(&self, test: FileTest, path: &str) -> bool;
    /// The text of a file; `None` if it cannot be read.
    fn read_file(&self, path: &str) -> Option<String>;
    /// Something in `line` was not understood or not executed.
    fn report(&mut self, line: u32, problem: String);
}

/// How a name was assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Assignment {
    /// Whatever the conditions, and not with the help of its former value.
    Plain,
    /// Inside of a condition, or with its former value.
    Dependent,
}

/// How the evaluation of a file ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// At its end, or by `return`.
    GoesOn,
    /// By `exit`, which ends the files that include it too.
    Exits,
}

/// Evaluates the text of one file.
pub(super) fn evaluate(text: &str, variables: &mut dyn Variables) -> Flow {
    let (tokens, problems) = lexer::tokens(text);
    for (line, problem) in problems {
        variables.report(line, problem.to_owned());
    }
    let mut evaluator =
        Evaluator { tokens: &tokens, position: 0, depth: 0, stopped: false, exits: false, variables };
    while let Some((line, word)) = evaluator.list(true, &[]).0 {
        evaluator.variables.report(line, format!("'{word}' without a matching 'if'"));
    }
    if evaluator.exits { Flow::Exits } else { Flow::GoesOn }
}

/// Outcome of a command, as far as it is known without a shell.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Status {
    True,
    False,
    /// The command was not executed: whatever depends on it is left out.
    Unknown,
}

impl From<bool> for Status {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

struct Evaluator<'a> {
    tokens: &'a [Token],
    position: usize,
    depth: usize,
    /// Whether the rest of the file is left out.
    stopped: bool,
    exits: bool,
    variables: &'a mut dyn Variables,
}

/// The reserved words that end a list of commands.
const BLOCK_WORDS: [&str; 4] = ["then", "elif", "else", "fi"];

impl Evaluator<'_> {
    /// Runs commands up to a block word. A block word that is not in `ends` is returned too: the caller knows
    /// what to make of it. `None` is the end of the file.
    fn list(&mut self, active: bool, ends: &[&str]) -> (Option<(u32, &'static str)>, Status) {
        let mut status = Status::True;
        loop {
            while self.next_is_separator() {
                self.position += 1;
            }
            let Some(token) = self.tokens.get(self.position) else { return (None, status) };
            let line = token.line;
            if let Some(word) = self.peek_word().and_then(block_word) {
                self.position += 1;
                debug_assert!(ends.is_empty() || BLOCK_WORDS.contains(&word));
                return (Some((line, word)), status);
            }
            status = self.and_or(active);
        }
    }

    fn next_is_separator(&self) -> bool {
        matches!(
            self.tokens.get(self.position).map(|token| &token.kind),
            Some(TokenKind::Newline | TokenKind::Semicolon)
        )
    }

    fn peek_word(&self) -> Option<&str> {
        match &self.tokens.get(self.position)?.kind {
            TokenKind::Word(word) => word.bare(),
            _ => None,
        }
    }

    /// Commands joined by `&&` and `||`.
    fn and_or(&mut self, active: bool) -> Status {
        let mut status = self.command(active);
        loop {
            let wanted = match self.tokens.get(self.position).map(|token| &token.kind) {
                Some(TokenKind::And) => Status::True,
                Some(TokenKind::Or) => Status::False,
                _ => return status,
            };
            self.position += 1;
            while matches!(self.tokens.get(self.position).map(|token| &token.kind), Some(TokenKind::Newline))
            {
                self.position += 1;
            }
            let runs = status == wanted;
            let next = self.command(active && runs);
            if runs {
                status = next;
            }
        }
    }

    fn command(&mut self, active: bool) -> Status {
        let line = self.tokens.get(self.position).map_or(0, |token| token.line);
        let Some(word) = self.peek_word() else { return self.simple(active) };
        let end = match word {
            "if" => return self.conditional(active, line),
            "case" => "esac",
            "for" | "while" | "until" | "select" => "done",
            "{" | "function" => "}",
            _ if self.starts_function() => "}",
            _ => return self.simple(active),
        };
        if active {
            self.variables.report(line, format!("shell construct '{word}' is not executed"));
        }
        self.skip_block(end);
        Status::Unknown
    }

    fn starts_function(&self) -> bool {
        let kind = |offset: usize| self.tokens.get(self.position + offset).map(|token| &token.kind);
        matches!(kind(1), Some(TokenKind::Unsupported("(")))
            && matches!(kind(2), Some(TokenKind::Unsupported(")")))
    }

    /// Skips to the word that ends an unsupported block, over blocks of the same kind inside it.
    fn skip_block(&mut self, end: &str) {
        let opens = |word: &str| match end {
            "esac" => word == "case",
            "done" => matches!(word, "for" | "while" | "until" | "select"),
            _ => word == "{",
        };
        let mut depth = usize::from(end == "}" && self.peek_word() != Some("{"));
        // A function's header comes before the brace that opens its body.
        let mut seen_body = depth == 0;
        while self.position < self.tokens.len() {
            if let Some(word) = self.peek_word() {
                if opens(word) {
                    if seen_body {
                        depth += 1;
                    }
                    seen_body = true;
                } else if word == end {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        self.position += 1;
                        return;
                    }
                }
            }
            self.position += 1;
        }
    }

    fn conditional(&mut self, active: bool, line: u32) -> Status {
        self.position += 1;
        if self.depth == MAX_DEPTH {
            self.variables
                .report(line, format!("'if' nested deeper than {MAX_DEPTH}: rest of the file is skipped"));
            self.stop();
            return Status::Unknown;
        }
        self.depth += 1;
        let complete = self.branches(active);
        self.depth -= 1;
        if !complete && !self.stopped {
            self.variables.report(line, "'if' without a matching 'then' or 'fi'".to_owned());
        }
        Status::True
    }

    fn stop(&mut self) {
        self.stopped = true;
        self.position = self.tokens.len();
    }

    /// The branches of an `if`; false if it is malformed. After a condition that is not known no branch is taken.
    fn branches(&mut self, active: bool) -> bool {
        let mut open = active;
        loop {
            let (word, condition) = self.list(open, &["then"]);
            if !matches!(word, Some((_, "then"))) {
                return false;
            }
            let (word, _) = self.list(open && condition == Status::True, &["elif", "else", "fi"]);
            open = open && condition == Status::False;
            match word {
                Some((_, "fi")) => return true,
                Some((_, "elif")) => {}
                Some((_, "else")) => return matches!(self.list(open, &["fi"]).0, Some((_, "fi"))),
                _ => return false,
            }
        }
    }

    /// A command without structure: assignments, a test, or something that is reported.
    fn simple(&mut self, active: bool) -> Status {
        let tokens = self.tokens;
        let start = self.position;
        let mut words: Vec<&Word> = Vec::new();
        let mut unsupported = None;
        while let Some(token) = tokens.get(self.position) {
            match &token.kind {
                TokenKind::Word(word) => words.push(word),
                TokenKind::Unsupported(operator) => unsupported = Some(*operator),
                TokenKind::Newline | TokenKind::Semicolon | TokenKind::And | TokenKind::Or => break,
            }
            self.position += 1;
        }
        if !active {
            return Status::Unknown;
        }
        let line = tokens.get(start).map_or(0, |token| token.line);
        if let Some(operator) = unsupported {
            self.variables.report(line, format!("shell operator '{operator}' is not executed"));
            return Status::Unknown;
        }
        let Some(first) = words.first() else {
            self.variables.report(line, "command expected".to_owned());
            return Status::Unknown;
        };
        let arguments = words.get(1..).unwrap_or_default();
        match first.bare() {
            Some("true" | ":") => Status::True,
            Some("false") => Status::False,
            Some("!") => match self.condition(arguments, line) {
                Status::True => Status::False,
                Status::False => Status::True,
                Status::Unknown => Status::Unknown,
            },
            Some("[" | "[[" | "test" | "grep") => self.condition(&words, line),
            Some("." | "source") => self.include(arguments, line),
            Some("return" | "exit") => {
                self.exits = first.bare() == Some("exit");
                self.stop();
                Status::Unknown
            }
            Some("unset") if arguments.iter().all(|word| word.bare().is_some_and(is_name)) => {
                for name in arguments.iter().filter_map(|word| word.bare()) {
                    self.variables.assign(name, String::new(), line, Assignment::Dependent);
                }
                Status::True
            }
            // `export NAME` of a name assigned elsewhere: everything is exported anyway.
            Some("export" | "readonly" | "eval") if arguments.iter().all(|word| names_or_assigns(word)) => {
                self.assign(arguments, line)
            }
            _ if words.iter().all(|word| word.assignment().is_some()) => self.assign(&words, line),
            _ => {
                let text = first.bare().unwrap_or("…");
                let hint = if text.contains("://") { " (a value with ';' or '|' needs quotes)" } else { "" };
                self.variables.report(line, format!("shell command '{text}' is not executed{hint}"));
                Status::Unknown
            }
        }
    }

    fn assign(&mut self, words: &[&Word], line: u32) -> Status {
        for word in words {
            let Some((name, fragments)) = word.assignment() else { continue };
            match self.expand(&fragments, line) {
                // The C++ client prints the value with an unquoted `echo`: runs of blanks collapse.
                Ok(value) => {
                    let value = value.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
                    let how = match self.depth == 0 && !mentions(&fragments, name) {
                        true => Assignment::Plain,
                        false => Assignment::Dependent,
                    };
                    self.variables.assign(name, value, line, how);
                }
                Err(problem) => {
                    self.variables.report(line, format!("{name} is not set here: {problem}"));
                    return Status::Unknown;
                }
            }
        }
        Status::True
    }

    fn include(&mut self, arguments: &[&Word], line: u32) -> Status {
        let included = match arguments {
            [path] => self.expand(&path.fragments, line).and_then(|path| self.variables.include(&path, line)),
            _ => Err("exactly one file can be read".to_owned()),
        };
        match included {
            Ok(Flow::GoesOn) => Status::True,
            Ok(Flow::Exits) => {
                self.exits = true;
                self.stop();
                Status::Unknown
            }
            Err(problem) => {
                self.variables.report(line, format!("file is not read here: {problem}"));
                Status::Unknown
            }
        }
    }

    fn condition(&mut self, words: &[&Word], line: u32) -> Status {
        let mut arguments = Vec::with_capacity(words.len());
        for word in words {
            match self.expand(&word.fragments, line) {
                Ok(text) => arguments.push(text),
                Err(problem) => {
                    self.variables.report(line, format!("condition is not evaluated: {problem}"));
                    return Status::Unknown;
                }
            }
        }
        match self.holds(&arguments) {
            Ok(holds) => Status::from(holds),
            Err(problem) => {
                self.variables.report(line, format!("condition is not evaluated: {problem}"));
                Status::Unknown
            }
        }
    }

    fn holds(&self, arguments: &[String]) -> Result<bool, String> {
        if let [command, rest @ ..] = arguments
            && command == "grep"
        {
            let grep = Grep::parse(rest)
                .ok_or("only 'grep -q TEXT FILE' with plain alternatives is understood, 'grep' is not run")?;
            return Ok(self.variables.read_file(&grep.file).is_some_and(|text| grep.matches(&text)));
        }
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let inside = match words.as_slice() {
            ["[", inside @ .., "]"] | ["[[", inside @ .., "]]"] | ["test", inside @ ..] => inside,
            _ => return Err("only '[ … ]' is understood".to_owned()),
        };
        condition::holds(inside, &|test, path| self.variables.test_file(test, path)).ok_or_else(|| {
            "only tests of strings (-z -n = !=), numbers (-eq -ne -lt -le -gt -ge) and files (-e -f -d -r -s) \
             are understood"
                .to_owned()
        })
    }

    fn expand(&mut self, fragments: &[Fragment], line: u32) -> Result<String, String> {
        let mut value = String::new();
        for fragment in fragments {
            match fragment {
                Fragment::Text { text, .. } => value.push_str(text),
                Fragment::Variable { name, substitute: None } => {
                    value.push_str(self.variables.value(name).unwrap_or_default());
                }
                Fragment::Variable { name, substitute: Some(substitute) } => {
                    let known = self.variables.value(name).map(str::to_owned);
                    let known = known.filter(|text| !(substitute.colon && text.is_empty()));
                    match (substitute.kind, known) {
                        (SubstituteKind::Alternative, None) => {}
                        (SubstituteKind::Default | SubstituteKind::Assign, Some(text)) => {
                            value.push_str(&text);
                        }
                        (kind, _) => {
                            let text = self.expand(&substitute.text, line)?;
                            value.push_str(&text);
                            if kind == SubstituteKind::Assign {
                                self.variables.assign(name, text, line, Assignment::Dependent);
                            }
                        }
                    }
                }
                Fragment::Arithmetic(expression) => {
                    let number = |name: &str| self.variables.value(name)?.trim().parse().ok();
                    let result = arithmetic::evaluate(expression, &number)
                        .ok_or_else(|| format!("'{}' is not understood", expression.escape_debug()))?;
                    value.push_str(&result.to_string());
                }
                Fragment::Unsupported(what) => return Err(format!("{what} is not executed")),
            }
            if value.len() > MAX_VALUE {
                return Err(format!("value longer than {MAX_VALUE} bytes"));
            }
        }
        Ok(value)
    }
}

fn names_or_assigns(word: &Word) -> bool {
    word.bare().is_some_and(is_name) || word.assignment().is_some()
}

/// Whether a value uses the variable `name`.
fn mentions(fragments: &[Fragment], wanted: &str) -> bool {
    fragments.iter().any(|fragment| match fragment {
        Fragment::Variable { name, substitute } => {
            name == wanted || substitute.as_ref().is_some_and(|inside| mentions(&inside.text, wanted))
        }
        _ => false,
    })
}

fn block_word(word: &str) -> Option<&'static str> {
    BLOCK_WORDS.into_iter().find(|reserved| *reserved == word)
}

/// Whether `text` is the name of a shell variable.
pub(super) fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[derive(Default)]
    struct Shell {
        values: BTreeMap<String, String>,
        problems: Vec<(u32, String)>,
    }

    impl Variables for Shell {
        fn value(&self, name: &str) -> Option<&str> {
            self.values.get(name).map(String::as_str)
        }
        fn assign(&mut self, name: &str, value: String, _line: u32, _: Assignment) {
            self.values.insert(name.to_owned(), value);
        }
        fn include(&mut self, path: &str, _line: u32) -> Result<Flow, String> {
            match path {
                "../common.conf" => Ok(evaluate("COMMON=yes\nreturn\nCOMMON=no", self)),
                "end.conf" => Ok(evaluate("exit 0", self)),
                _ => Err(format!("{path} does not exist")),
            }
        }
        fn test_file(&self, _: FileTest, path: &str) -> bool {
            path == "/etc/debian_version"
        }
        fn read_file(&self, path: &str) -> Option<String> {
            (path == "/etc/debian_version").then(|| "12.5\n".to_owned())
        }
        fn report(&mut self, line: u32, problem: String) {
            self.problems.push((line, problem));
        }
    }

    fn run(text: &str) -> Shell {
        let mut shell = Shell::default();
        evaluate(text, &mut shell);
        shell
    }

    fn value_of_x(text: &str) -> Option<String> {
        run(text).values.remove("X")
    }

    #[test]
    fn values_are_what_a_shell_would_echo() {
        let table = [
            ("X=plain", "plain"),
            ("  X=indented  ", "indented"),
            ("X=\"quoted value\"", "quoted value"),
            ("X='single $A'", "single $A"),
            ("X=\"a;b|c\"", "a;b|c"),
            ("X=a\\;b", "a;b"),
            ("X=\"one   two\"", "one two"),
            ("X=", ""),
            ("X=\"\"", ""),
            ("export X=1", "1"),
            ("readonly X=1", "1"),
            ("eval X=1", "1"),
            ("X=value # comment", "value"),
            ("X=value#nocomment", "value#nocomment"),
            ("X=\"with # inside\"", "with # inside"),
            ("#X=no\nX=yes", "yes"),
            ("X=1\nX=2", "2"),
            ("A=a X=b", "b"),
            ("A=a; X=$A", "a"),
            ("A=a\nX=${A}b", "ab"),
            ("A=a\nX=\"$A.b\"", "a.b"),
            ("X=$UNSET", ""),
            ("X=${UNSET:-other}", "other"),
            ("A=\nX=${A:-other}", "other"),
            ("A=set\nX=${A:-other}", "set"),
            ("X=pre\nX=\"$X;post\"", "pre;post"),
            ("X=\"a\"'b'c", "abc"),
            ("X=a\\\nb", "ab"),
            ("X=crlf\r\nA=b\r\n", "crlf"),
            ("X='a=b'", "a=b"),
            ("X=http://h:80/cvmfs/@fqrn@", "http://h:80/cvmfs/@fqrn@"),
            ("X=\"${X:=DIRECT}\"", "DIRECT"),
            ("export X=${X:=default}", "default"),
            ("A=${X:=kept}", "kept"),
            ("A=a\nX=${A:+is set}", "is set"),
            ("X=${A:+is set}", ""),
            ("A=\nX=${A-unset}", ""),
            ("B=b\nX=\"${A:-${B}/c}\"", "b/c"),
            ("X=$((2 * (3 + 4)))", "14"),
            ("A=5\nX=$((A % 2))", "1"),
            ("export A X=1", "1"),
            ("X=1\nunset X", ""),
            ("X=1\nreturn\nX=2", "1"),
            ("if [ -z \"$A\" ]; then X=1; return; X=2; fi\nX=3", "1"),
            ("X=1\nif [ -n \"$A\" ]; then return; fi\nX=2", "2"),
            (". ../common.conf\nX=$COMMON", "yes"),
            ("X=1\n. end.conf\nX=2", "1"),
            ("A=5\nif [ -z $A ] || [ $A -lt 10 ]; then X=10; fi", "10"),
            (
                "if [ -f /etc/debian_version ] && grep -q \"wheezy\\|jessie\" /etc/debian_version;\nthen\n  :\nelse\n  X=new\nfi",
                "new",
            ),
            ("if [ -f /absent ] && grep -q x /absent; then X=1; else X=2; fi", "2"),
            ("if [ \"$((RANDOM % 2))\" -eq 1 ]; then X=1; else X=2; fi", "2"),
        ];
        for (text, expected) in table {
            let shell = run(text);
            assert_eq!(shell.values.get("X").map(String::as_str), Some(expected), "{text:?}");
            assert_eq!(shell.problems, [], "{text:?}");
        }
    }

    #[test]
    fn conditions_of_distributed_configuration_choose_their_branch() {
        let table = [
            ("if [ \"$A\" = \"\" ]; then X=unset; fi", Some("unset")),
            ("A=1\nif [ \"$A\" = \"\" ]; then\n X=unset\nelse\n X=set\nfi", Some("set")),
            ("A=1\nif [ x\"$A\" = x\"1\" ]\nthen\n X=one\nfi", Some("one")),
            ("if [ -z \"$A\" ]; then X=z; fi", Some("z")),
            ("if [ -n \"$A\" ]; then X=n; fi", None),
            ("if [ ! -n \"$A\" ]; then X=n; fi", Some("n")),
            ("if [ $A = yes ]; then X=n; fi", None),
            ("A=2\nif [ $A = 1 ]; then X=1; elif [ $A = 2 ]; then X=2; else X=3; fi", Some("2")),
            ("A=2\nif [ $A != 2 ]; then X=1; elif [ $A = 3 ]; then X=2; else X=3; fi", Some("3")),
            ("if [ \"$A\" = \"\" ] && [ -z \"$B\" ]; then X=both; fi", Some("both")),
            ("if [ -n \"$A\" ] || [ -z \"$B\" ]; then X=either; fi", Some("either")),
            ("[ -z \"$A\" ] && X=short", Some("short")),
            ("[ -n \"$A\" ] && X=short", None),
            ("if [ -n \"$A\" ]; then\n if [ -z \"$B\" ]; then X=1; fi\nelse\n X=2\nfi", Some("2")),
        ];
        for (text, expected) in table {
            let shell = run(text);
            assert_eq!(shell.values.get("X").map(String::as_str), expected, "{text:?}");
            assert_eq!(shell.problems, [], "{text:?}");
        }
    }

    #[test]
    fn shell_constructs_are_reported_with_their_line_and_not_executed() {
        let table = [
            ("A=1\n. /etc/other", 2, "/etc/other does not exist"),
            ("source /etc/other", 1, "/etc/other does not exist"),
            ("X=http://a/b;http://c/d", 1, "needs quotes"),
            ("X=$(hostname)", 1, "X is not set"),
            ("X=`hostname`", 1, "X is not set"),
            ("X=${A%.*}", 1, "X is not set"),
            ("rm -rf /", 1, "'rm'"),
            ("for i in 1 2; do\n X=$i\ndone", 1, "'for'"),
            ("case $A in\n a) X=1 ;;\nesac", 1, "'case'"),
            ("f() {\n X=1\n}", 1, "'f'"),
            ("if [ /etc/x -nt /etc/y ]; then X=1; else X=2; fi", 1, "condition"),
            ("if grep -c x /etc/x; then X=1; fi", 1, "'grep'"),
            ("X=$((1 << 2))", 1, "X is not set"),
            ("echo a | sed b", 1, "'|'"),
            ("X=\"not closed\nB=1", 1, "quote"),
            ("A=1\nfi", 2, "without a matching 'if'"),
            ("if [ -z \"$A\" ]; then B=1", 1, "without a matching"),
        ];
        for (text, line, problem) in table {
            let shell = run(text);
            let first = shell.problems.first().unwrap_or_else(|| panic!("nothing reported for {text:?}"));
            assert_eq!(first.0, line, "{text:?}");
            assert!(first.1.contains(problem), "{text:?}: {first:?}");
        }
        for text in
            ["X=$(hostname)", "for i in 1; do\n X=1\ndone", "f() {\n X=1\n}", "case a in a) X=1;; esac"]
        {
            assert_eq!(value_of_x(text), None, "{text:?}");
        }
    }

    #[test]
    fn evaluation_goes_on_after_a_block_that_was_skipped() {
        assert_eq!(
            value_of_x("for i in 1; do\n for j in 2; do A=1; done\ndone\nX=after").as_deref(),
            Some("after")
        );
        assert_eq!(value_of_x("f() {\n A=1\n}\nX=after").as_deref(), Some("after"));
        assert_eq!(value_of_x("case a in a) A=1;; esac\nX=after").as_deref(), Some("after"));
    }

    #[test]
    fn values_cannot_grow_without_bound() {
        let mut text = String::from("X=0123456789\n");
        for _ in 0..64 {
            text.push_str("X=$X$X\n");
        }
        let shell = run(&text);
        assert!(shell.values["X"].len() <= MAX_VALUE);
        assert!(!shell.problems.is_empty());
    }

    #[test]
    fn deep_nesting_is_refused() {
        let shell = run(&"if true; then\n".repeat(100_000));
        assert!(shell.problems[0].1.contains("nested deeper"));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_evaluator_panic(text in "[ -~\n\r\t]{0,200}") {
            run(&text);
        }

        #[test]
        fn no_sequence_of_shell_words_makes_the_evaluator_panic(
            words in proptest::collection::vec(
                proptest::sample::select(vec![
                    "if", "then", "else", "elif", "fi", "[", "]", "for", "done", "case", "esac", "{", "}", "(", ")",
                    "\n", ";", "&&", "||", "|", "X=1", "$X", "\"", "'", "`", "${", "$(", "\\", "f", "!", "&", "<", ">",
                ]),
                0..60,
            )
        ) {
            run(&words.join(" "));
        }
    }
}
