//! `$((…))`: whole numbers, variables, `+ - * / %` and parentheses, as far as configuration files use it.

/// Deepest nesting of parentheses and signs; bounds the recursion.
const MAX_DEPTH: usize = 16;

/// The value of the expression; `None` if it is malformed, divides by zero, overflows or uses another operator. A
/// variable that is not set or no number counts as 0, as in a shell.
pub(super) fn evaluate(text: &str, value: &dyn Fn(&str) -> Option<i64>) -> Option<i64> {
    let mut parser = Parser { rest: text.trim_start(), value, depth: 0 };
    let result = parser.sum()?;
    parser.rest.is_empty().then_some(result)
}

struct Parser<'a> {
    rest: &'a str,
    value: &'a dyn Fn(&str) -> Option<i64>,
    depth: usize,
}

impl Parser<'_> {
    fn sum(&mut self) -> Option<i64> {
        let mut left = self.product()?;
        loop {
            if self.takes('+') {
                left = left.checked_add(self.product()?)?;
            } else if self.takes('-') {
                left = left.checked_sub(self.product()?)?;
            } else {
                return Some(left);
            }
        }
    }

    fn product(&mut self) -> Option<i64> {
        let mut left = self.atom()?;
        loop {
            if self.takes('*') {
                left = left.checked_mul(self.atom()?)?;
            } else if self.takes('/') {
                left = left.checked_div(self.atom()?)?;
            } else if self.takes('%') {
                left = left.checked_rem(self.atom()?)?;
            } else {
                return Some(left);
            }
        }
    }

    fn atom(&mut self) -> Option<i64> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let value = self.atom_inside()?;
        self.depth -= 1;
        Some(value)
    }

    fn atom_inside(&mut self) -> Option<i64> {
        if self.takes('-') {
            return self.atom()?.checked_neg();
        }
        if self.takes('(') {
            let inside = self.sum()?;
            return self.takes(')').then_some(inside);
        }
        self.takes('$');
        let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let end = self.rest.find(|letter| !is_part(letter)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        match word.bytes().next()? {
            b'0'..=b'9' => word.parse().ok(),
            _ => Some((self.value)(word).unwrap_or(0)),
        }
    }

    fn takes(&mut self, letter: char) -> bool {
        match self.rest.strip_prefix(letter) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Option<i64> {
        evaluate(text, &|name| (name == "A").then_some(7))
    }

    #[test]
    fn expressions_have_the_value_that_a_shell_gives_them() {
        for (text, expected) in [
            ("1 + 2*3", 7),
            ("(1+2)*3", 9),
            ("A % 2", 1),
            ("$A - 10", -3),
            ("RANDOM % 2", 0),
            (" -A ", -7),
            ("7/2", 3),
        ] {
            assert_eq!(value(text), Some(expected), "{text}");
        }
        for text in ["", "1 +", "1/0", "9223372036854775807+1", "1 << 2", "(1", "1 2", "0x10", "A=3"] {
            assert_eq!(value(text), None, "{text}");
        }
        assert_eq!(value(&"(".repeat(100_000)), None);
        assert_eq!(value(&"-".repeat(100_000)), None);
    }
}
