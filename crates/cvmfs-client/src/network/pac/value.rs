//! Values, and how they become each other.

use std::rc::Rc;

use regex_automata::meta::Regex;

/// A value. Lists, objects and scopes lie in the interpreter, which drops them all at once: nothing can keep itself
/// alive.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Undefined,
    Null,
    Boolean(bool),
    Number(f64),
    Text(Rc<str>),
    List(usize),
    Object(usize),
    /// A function of the file: its index.
    Closure(usize),
    /// A function of the interpreter, or one of its objects, by name.
    Builtin(&'static str),
    Regex(Rc<Regex>),
}

impl Value {
    pub(super) fn text(text: impl AsRef<str>) -> Self {
        Self::Text(Rc::from(text.as_ref()))
    }

    pub(super) fn count(count: usize) -> Self {
        #[allow(clippy::cast_precision_loss)]
        Self::Number(count as f64)
    }

    pub(super) fn truth(&self) -> bool {
        match self {
            Self::Undefined | Self::Null => false,
            Self::Boolean(value) => *value,
            Self::Number(value) => *value != 0.0 && !value.is_nan(),
            Self::Text(value) => !value.is_empty(),
            _ => true,
        }
    }

    /// As a number, for values that are no lists.
    pub(super) fn number(&self) -> f64 {
        match self {
            Self::Null => 0.0,
            Self::Boolean(value) => f64::from(u8::from(*value)),
            Self::Number(value) => *value,
            Self::Text(text) => parse_number(text),
            _ => f64::NAN,
        }
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Boolean(_) => "boolean",
            Self::Number(_) => "number",
            Self::Text(_) => "string",
            Self::Closure(_) | Self::Builtin(_) => "function",
            _ => "object",
        }
    }

    /// `===`.
    pub(super) fn is_identical(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Undefined, Self::Undefined) | (Self::Null, Self::Null) => true,
            (Self::Boolean(left), Self::Boolean(right)) => left == right,
            (Self::Number(left), Self::Number(right)) => left == right,
            (Self::Text(left), Self::Text(right)) => left == right,
            (Self::List(left), Self::List(right)) | (Self::Object(left), Self::Object(right)) => {
                left == right
            }
            (Self::Closure(left), Self::Closure(right)) => left == right,
            (Self::Builtin(left), Self::Builtin(right)) => left == right,
            _ => false,
        }
    }
}

pub(super) fn parse_number(text: &str) -> f64 {
    let text = text.trim();
    if text.is_empty() {
        return 0.0;
    }
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u32::from_str_radix(digits, 16).map_or(f64::NAN, f64::from);
    }
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
    if plain { text.parse().unwrap_or(f64::NAN) } else { f64::NAN }
}

pub(super) fn show_number(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
    } else if value == 0.0 {
        "0".to_owned()
    } else if value.abs() >= 1e21 {
        format!("{value:e}")
    } else {
        value.to_string()
    }
}

/// The 32 bits that bit operators work on.
pub(super) fn bits(value: f64) -> u32 {
    if !value.is_finite() {
        return 0;
    }
    let wrapped = value.trunc().rem_euclid(4_294_967_296.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bits = wrapped as u32;
    bits
}

/// A position in a string or list, within its bounds.
pub(super) fn position(value: f64, length: usize) -> usize {
    if value.is_nan() || value <= 0.0 {
        return 0;
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let index = value.min(9_007_199_254_740_992.0) as u64;
    usize::try_from(index).unwrap_or(usize::MAX).min(length)
}
