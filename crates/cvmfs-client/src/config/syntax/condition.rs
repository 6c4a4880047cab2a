//! Conditions: what stands between `[` and `]`, and `grep -q` over a file.

/// What a file test asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum FileTest {
    /// `-e`
    Exists,
    /// `-f`
    IsFile,
    /// `-d`
    IsDirectory,
    /// `-r`
    IsReadable,
    /// `-s`
    HasContent,
}

impl FileTest {
    fn of(operator: &str) -> Option<Self> {
        Some(match operator {
            "-e" => Self::Exists,
            "-f" => Self::IsFile,
            "-d" => Self::IsDirectory,
            "-r" => Self::IsReadable,
            "-s" => Self::HasContent,
            _ => return None,
        })
    }
}

/// Whether the condition holds; `None` if it is not understood.
pub(super) fn holds(arguments: &[&str], file: &dyn Fn(FileTest, &str) -> bool) -> Option<bool> {
    // With up to three arguments every word may be an operand, as in `[ -a = x ]`.
    if arguments.len() > 3 {
        if let Some(at) = arguments.iter().position(|word| *word == "-o") {
            return Some(holds(&arguments[..at], file)? | holds(&arguments[at + 1..], file)?);
        }
        if let Some(at) = arguments.iter().position(|word| *word == "-a") {
            return Some(holds(&arguments[..at], file)? & holds(&arguments[at + 1..], file)?);
        }
    }
    let number = |text: &str| text.trim().parse::<i64>().ok();
    Some(match arguments {
        [] => false,
        [text] => !text.is_empty(),
        ["!", rest @ ..] => !holds(rest, file)?,
        ["-z", text] => text.is_empty(),
        ["-n", text] => !text.is_empty(),
        [operator, path] => file(FileTest::of(operator)?, path),
        [left, "=" | "==", right] => left == right,
        [left, "!=", right] => left != right,
        [left, operator, right] => {
            let order = number(left)?.cmp(&number(right)?);
            match *operator {
                "-eq" => order.is_eq(),
                "-ne" => order.is_ne(),
                "-lt" => order.is_lt(),
                "-le" => order.is_le(),
                "-gt" => order.is_gt(),
                "-ge" => order.is_ge(),
                _ => return None,
            }
        }
        _ => return None,
    })
}

/// A `grep` whose pattern consists of alternatives of plain text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Grep {
    alternatives: Vec<String>,
    ignore_case: bool,
    pub(super) file: String,
}

impl Grep {
    /// Understands `grep -q[siEF] PATTERN FILE`; without `-q` it would print.
    pub(super) fn parse(arguments: &[String]) -> Option<Self> {
        let (mut quiet, mut ignore_case, mut extended, mut fixed) = (false, false, false, false);
        let mut rest = arguments;
        while let [option, tail @ ..] = rest {
            let Some(letters) = option.strip_prefix('-').filter(|letters| !letters.is_empty()) else { break };
            for letter in letters.chars() {
                match letter {
                    'q' => quiet = true,
                    's' => {}
                    'i' => ignore_case = true,
                    'E' => extended = true,
                    'F' => fixed = true,
                    _ => return None,
                }
            }
            rest = tail;
        }
        let [pattern, file] = rest else { return None };
        let alternatives: Vec<String> = match (fixed, extended) {
            (true, _) => vec![pattern.clone()],
            (false, true) => pattern.split('|').map(str::to_owned).collect(),
            (false, false) => pattern.split("\\|").map(str::to_owned).collect(),
        };
        let special = |text: &String| {
            !fixed && text.contains(['\\', '.', '*', '[', ']', '^', '$', '+', '?', '(', ')', '{'])
        };
        if !quiet || alternatives.iter().any(special) {
            return None;
        }
        let fold = |text: String| if ignore_case { text.to_lowercase() } else { text };
        Some(Self {
            alternatives: alternatives.into_iter().map(fold).collect(),
            ignore_case,
            file: file.clone(),
        })
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        text.lines().any(|line| {
            let folded = if self.ignore_case { line.to_lowercase() } else { line.to_owned() };
            self.alternatives.iter().any(|wanted| folded.contains(wanted))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_hold_as_in_a_shell() {
        let file = |test: FileTest, path: &str| path == "/there" && test != FileTest::IsDirectory;
        let table: [(&str, Option<bool>); 19] = [
            ("", Some(false)),
            ("x", Some(true)),
            ("-z x", Some(false)),
            ("-n x", Some(true)),
            ("a = a", Some(true)),
            ("a != a", Some(false)),
            ("! a = a", Some(false)),
            ("-f /there", Some(true)),
            ("! -f /there", Some(false)),
            ("-d /there", Some(false)),
            ("-e /absent", Some(false)),
            ("10 -lt 9", Some(false)),
            ("10 -ge 10", Some(true)),
            ("x -eq 1", None),
            ("-f /there -a x = x", Some(true)),
            ("a = b -o b = b", Some(true)),
            ("a = b -a b = b -o x", Some(true)),
            ("a < b", None),
            ("-x /there", None),
        ];
        for (text, expected) in table {
            let arguments: Vec<&str> = text.split_ascii_whitespace().collect();
            assert_eq!(holds(&arguments, &file), expected, "[ {text} ]");
        }
    }

    #[test]
    fn a_plain_grep_is_understood_and_any_other_is_not() {
        let parse =
            |words: &[&str]| Grep::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let grep = parse(&["-q", "wheezy\\|jessie", "/etc/debian_version"]).unwrap();
        assert!(grep.matches("x\njessie/sid\n") && !grep.matches("12.5\n"));
        assert!(parse(&["-qi", "ALMA", "f"]).unwrap().matches("AlmaLinux"));
        assert!(parse(&["-q", "-E", "a|b", "f"]).unwrap().matches("xbx"));
        for words in [&["x", "f"][..], &["-q", "x"], &["-q", "a.*b", "f"], &["-qv", "x", "f"], &[]] {
            assert_eq!(parse(words), None, "{words:?}");
        }
    }
}
