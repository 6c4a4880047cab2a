//! The functions that PAC defines, and the methods of strings and lists.

use std::net::{IpAddr, Ipv4Addr};

use regex_automata::meta::Regex;

use super::interpreter::{Machine, Stop};
use super::value::{Value, bits, parse_number, position};

type Run<T> = Result<T, Stop>;

/// Names that exist without being defined.
const GLOBALS: &[&str] = &[
    "isPlainHostName",
    "dnsDomainIs",
    "localHostOrDomainIs",
    "isResolvable",
    "isInNet",
    "dnsResolve",
    "myIpAddress",
    "dnsDomainLevels",
    "shExpMatch",
    "convert_addr",
    "weekdayRange",
    "dateRange",
    "timeRange",
    "alert",
    "parseInt",
    "parseFloat",
    "isNaN",
    "String",
    "Number",
    "Boolean",
    "Math",
    "dnsResolveEx",
    "myIpAddressEx",
    "isResolvableEx",
];

const WEEKDAYS: [&str; 7] = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];
const MONTHS: [&str; 12] =
    ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];

pub(super) fn global(name: &str) -> Option<Value> {
    match name {
        "NaN" => Some(Value::Number(f64::NAN)),
        "Infinity" => Some(Value::Number(f64::INFINITY)),
        _ => GLOBALS.iter().find(|known| **known == name).map(|known| Value::Builtin(known)),
    }
}

/// Calls a global function.
pub(super) fn call(machine: &mut Machine<'_>, name: &str, arguments: &[Value]) -> Run<Value> {
    let mut texts = Vec::with_capacity(arguments.len().min(8));
    for argument in arguments.iter().take(8) {
        texts.push(machine.show(argument)?);
    }
    let text = |index: usize| texts.get(index).map_or("", String::as_str);
    Ok(match name {
        "isPlainHostName" => Value::Boolean(!text(0).contains('.')),
        "dnsDomainIs" => {
            Value::Boolean(text(0).to_ascii_lowercase().ends_with(&text(1).to_ascii_lowercase()))
        }
        "localHostOrDomainIs" => {
            let (host, full) = (text(0), text(1));
            Value::Boolean(host == full || (!host.contains('.') && full.starts_with(&format!("{host}."))))
        }
        "dnsDomainLevels" => Value::count(text(0).matches('.').count()),
        "shExpMatch" => {
            machine.pay(text(0).len().saturating_mul(text(1).matches('*').count() + 1))?;
            Value::Boolean(shell_match(text(1).as_bytes(), text(0).as_bytes()))
        }
        "isResolvable" | "isResolvableEx" => Value::Boolean(!machine.resolve(text(0))?.is_empty()),
        "dnsResolve" | "dnsResolveEx" => match first_v4(&machine.resolve(text(0))?) {
            Some(address) => Value::text(address.to_string()),
            None => Value::Null,
        },
        "myIpAddress" | "myIpAddressEx" => Value::text(machine.surroundings.own_address().to_string()),
        "isInNet" => {
            let host = match text(0).parse::<Ipv4Addr>() {
                Ok(address) => Some(address),
                Err(_) => first_v4(&machine.resolve(text(0))?),
            };
            let in_net = match (host, text(1).parse::<Ipv4Addr>(), text(2).parse::<Ipv4Addr>()) {
                (Some(host), Ok(net), Ok(mask)) => {
                    u32::from(host) & u32::from(mask) == u32::from(net) & u32::from(mask)
                }
                _ => false,
            };
            Value::Boolean(in_net)
        }
        "convert_addr" => {
            Value::Number(text(0).parse::<Ipv4Addr>().map_or(0.0, |address| f64::from(u32::from(address))))
        }
        "weekdayRange" | "dateRange" | "timeRange" => {
            Value::Boolean(in_time(name, &texts, machine.surroundings.unix_time()))
        }
        "alert" => Value::Undefined,
        "parseInt" => Value::Number(parse_int(text(0), texts.get(1).map(String::as_str))),
        "parseFloat" => {
            let text = text(0).trim();
            let end = text.find(|letter: char| !letter.is_ascii_digit() && !"+-.".contains(letter));
            let number = text.get(..end.unwrap_or(text.len())).unwrap_or_default();
            Value::Number(if number.is_empty() { f64::NAN } else { parse_number(number) })
        }
        "isNaN" => {
            let number = arguments.first().map_or(f64::NAN, Value::number);
            Value::Boolean(number.is_nan())
        }
        "String" => machine.new_text(text(0).to_owned())?,
        "Number" => match arguments.first() {
            Some(value) => Value::Number(machine.number(value)?),
            None => Value::Number(0.0),
        },
        "Boolean" => Value::Boolean(arguments.first().is_some_and(Value::truth)),
        _ => return Err(machine.fault(format!("{name} is no function"))),
    })
}

/// Calls a method of a value.
pub(super) fn method(
    machine: &mut Machine<'_>,
    object: &Value,
    name: &str,
    arguments: &[Value],
) -> Run<Value> {
    match object {
        Value::Text(text) => {
            machine.pay(text.len())?;
            let text = text.to_string();
            text_method(machine, &text, name, arguments)
        }
        Value::List(list) => list_method(machine, *list, name, arguments),
        Value::Regex(regex) => {
            let text = machine.show(arguments.first().unwrap_or(&Value::Undefined))?;
            match name {
                "test" => {
                    machine.pay(100 * text.len())?;
                    Ok(Value::Boolean(regex.is_match(text.as_bytes())))
                }
                "exec" => captures(machine, regex, &text),
                _ => unknown(machine, name),
            }
        }
        Value::Builtin("Math") => {
            let first = arguments.first().map_or(f64::NAN, Value::number);
            let second = arguments.get(1).map_or(f64::NAN, Value::number);
            Ok(Value::Number(match name {
                "floor" => first.floor(),
                "ceil" => first.ceil(),
                "round" => (first + 0.5).floor(),
                "abs" => first.abs(),
                "min" => first.min(second),
                "max" => first.max(second),
                "pow" => first.powf(second),
                #[allow(clippy::cast_precision_loss)]
                "random" => crate::network::routes::random_below(1 << 52) as f64 / (1_u64 << 52) as f64,
                _ => return unknown(machine, name),
            }))
        }
        Value::Number(_) | Value::Boolean(_) | Value::Object(_) if name == "toString" => {
            let text = machine.show(object)?;
            machine.new_text(text)
        }
        _ => unknown(machine, name),
    }
}

fn unknown(machine: &Machine<'_>, name: &str) -> Run<Value> {
    let name: String = name.chars().take(50).collect();
    Err(machine.fault(format!("method {name} is not supported")))
}

fn text_method(machine: &mut Machine<'_>, text: &str, name: &str, arguments: &[Value]) -> Run<Value> {
    let letters: Vec<char> = text.chars().collect();
    machine.pay(letters.len())?;
    let length = letters.len();
    let argument = |machine: &mut Machine<'_>, index: usize| match arguments.get(index) {
        Some(value) => machine.show(value),
        None => Ok(String::new()),
    };
    let number = |index: usize, default: f64| match arguments.get(index) {
        Some(Value::Undefined) | None => default,
        Some(value) => value.number(),
    };
    #[allow(clippy::cast_precision_loss)]
    let whole = length as f64;
    let cut = |from: usize, to: usize| {
        letters.get(from..to.max(from)).unwrap_or_default().iter().collect::<String>()
    };
    // A place counted from the end if it is negative.
    let place =
        |value: f64| if value < 0.0 { position(whole + value, length) } else { position(value, length) };
    Ok(match name {
        "toString" | "valueOf" => Value::text(text),
        "toLowerCase" => machine.new_text(text.to_lowercase())?,
        "toUpperCase" => machine.new_text(text.to_uppercase())?,
        "trim" => machine.new_text(text.trim().to_owned())?,
        "charAt" => {
            let at = position(number(0, 0.0), length);
            machine.new_text(cut(at, (at + 1).min(length)))?
        }
        "charCodeAt" => match letters.get(position(number(0, 0.0), length)) {
            Some(letter) => Value::Number(f64::from(u32::from(*letter))),
            None => Value::Number(f64::NAN),
        },
        "substring" => {
            let (from, to) = (position(number(0, 0.0), length), position(number(1, whole), length));
            machine.new_text(cut(from.min(to), from.max(to)))?
        }
        "substr" => {
            let from = place(number(0, 0.0));
            let to = from + position(number(1, whole), length - from);
            machine.new_text(cut(from, to))?
        }
        "slice" => {
            let (from, to) = (place(number(0, 0.0)), place(number(1, whole)));
            machine.new_text(cut(from, to.max(from)))?
        }
        "concat" => {
            let mut joined = text.to_owned();
            for index in 0..arguments.len() {
                joined.push_str(&argument(machine, index)?);
                machine.pay(joined.len())?;
            }
            machine.new_text(joined)?
        }
        "indexOf" | "lastIndexOf" | "includes" | "startsWith" | "endsWith" => {
            let wanted = argument(machine, 0)?;
            machine.pay(length + wanted.len())?;
            let index = match name {
                "indexOf" => {
                    let from: usize = letters
                        .iter()
                        .take(position(number(1, 0.0), length))
                        .map(|letter| letter.len_utf8())
                        .sum();
                    text.get(from..).and_then(|rest| rest.find(&wanted)).map(|at| from + at)
                }
                "lastIndexOf" => text.rfind(&wanted),
                "includes" => return Ok(Value::Boolean(text.contains(&wanted))),
                "startsWith" => return Ok(Value::Boolean(text.starts_with(&wanted))),
                _ => return Ok(Value::Boolean(text.ends_with(&wanted))),
            };
            match index {
                Some(index) => Value::count(text.get(..index).unwrap_or_default().chars().count()),
                None => Value::Number(-1.0),
            }
        }
        "split" => {
            let separator = argument(machine, 0)?;
            let parts: Vec<Value> = match arguments.first() {
                None | Some(Value::Undefined) => vec![Value::text(text)],
                Some(Value::Regex(regex)) => {
                    machine.pay(100 * text.len())?;
                    let mut parts = Vec::new();
                    let mut last = 0;
                    for found in regex.find_iter(text.as_bytes()) {
                        parts.push(Value::text(text.get(last..found.start()).unwrap_or_default()));
                        last = found.end();
                    }
                    parts.push(Value::text(text.get(last..).unwrap_or_default()));
                    parts
                }
                Some(_) if separator.is_empty() => {
                    letters.iter().map(|letter| Value::text(letter.to_string())).collect()
                }
                Some(_) => text.split(&separator).map(Value::text).collect(),
            };
            machine.new_list(parts)?
        }
        "replace" => {
            let by = argument(machine, 1)?;
            let replaced = match arguments.first() {
                Some(Value::Regex(regex)) => {
                    machine.pay(100 * text.len())?;
                    match regex.find(text.as_bytes()) {
                        Some(found) => {
                            let (before, after) = (text.get(..found.start()), text.get(found.end()..));
                            format!("{}{by}{}", before.unwrap_or_default(), after.unwrap_or_default())
                        }
                        None => text.to_owned(),
                    }
                }
                _ => text.replacen(&argument(machine, 0)?, &by, 1),
            };
            machine.new_text(replaced)?
        }
        "match" | "search" => {
            let regex = match arguments.first() {
                Some(Value::Regex(regex)) => regex.clone(),
                _ => {
                    let pattern = argument(machine, 0)?;
                    match machine.regex(&pattern, "")? {
                        Value::Regex(regex) => regex,
                        _ => return unknown(machine, name),
                    }
                }
            };
            if name == "match" {
                return captures(machine, &regex, text);
            }
            machine.pay(100 * text.len())?;
            match regex.find(text.as_bytes()) {
                Some(found) => Value::count(text.get(..found.start()).unwrap_or_default().chars().count()),
                None => Value::Number(-1.0),
            }
        }
        _ => return unknown(machine, name),
    })
}

fn captures(machine: &mut Machine<'_>, regex: &Regex, text: &str) -> Run<Value> {
    machine.pay(100 * text.len())?;
    let mut found = regex.create_captures();
    regex.captures(text.as_bytes(), &mut found);
    if !found.is_match() {
        return Ok(Value::Null);
    }
    let group = |index: usize| match found.get_group(index) {
        Some(span) => Value::text(text.get(span.start..span.end).unwrap_or_default()),
        None => Value::Undefined,
    };
    let groups = (0..found.group_len()).map(group).collect();
    machine.new_list(groups)
}

fn list_method(machine: &mut Machine<'_>, list: usize, name: &str, arguments: &[Value]) -> Run<Value> {
    let items = machine.lists[list].clone();
    machine.pay(16 * items.len() + 1)?;
    Ok(match name {
        "push" => {
            machine.pay(16 * arguments.len())?;
            machine.lists[list].extend_from_slice(arguments);
            Value::count(items.len() + arguments.len())
        }
        "pop" => machine.lists[list].pop().unwrap_or(Value::Undefined),
        "shift" if items.is_empty() => Value::Undefined,
        "shift" => machine.lists[list].remove(0),
        "reverse" => {
            machine.lists[list].reverse();
            Value::List(list)
        }
        "join" => {
            let separator = match arguments.first() {
                Some(value) => machine.show(value)?,
                None => ",".to_owned(),
            };
            let mut joined = String::new();
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    joined.push_str(&separator);
                }
                if !matches!(item, Value::Undefined | Value::Null) {
                    joined.push_str(&machine.show(item)?);
                }
                machine.pay(separator.len() + 1)?;
            }
            machine.new_text(joined)?
        }
        "indexOf" => {
            let wanted = arguments.first().cloned().unwrap_or(Value::Undefined);
            match items.iter().position(|item| item.is_identical(&wanted)) {
                Some(index) => Value::count(index),
                None => Value::Number(-1.0),
            }
        }
        "concat" => {
            let mut joined = items;
            for argument in arguments {
                match argument {
                    Value::List(other) => {
                        let other = machine.lists[*other].clone();
                        machine.pay(16 * other.len())?;
                        joined.extend(other);
                    }
                    other => joined.push(other.clone()),
                }
            }
            machine.new_list(joined)?
        }
        "slice" => {
            let length = items.len();
            let from = position(arguments.first().map_or(0.0, Value::number), length);
            let to = match arguments.get(1) {
                Some(to) => position(to.number(), length),
                None => length,
            };
            machine.new_list(items.get(from..to.max(from)).unwrap_or_default().to_vec())?
        }
        "toString" => {
            let text = machine.show(&Value::List(list))?;
            machine.new_text(text)?
        }
        _ => return unknown(machine, name),
    })
}

fn first_v4(addresses: &[IpAddr]) -> Option<Ipv4Addr> {
    addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    })
}

fn parse_int(text: &str, radix: Option<&str>) -> f64 {
    let text = text.trim();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let radix = radix.map_or(0, |radix| bits(parse_number(radix)));
    let hexadecimal = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let (radix, digits) = match (radix, hexadecimal) {
        (0 | 16, Some(digits)) => (16, digits),
        (0, None) => (10, digits),
        (2..=36, _) => (radix, digits),
        _ => return f64::NAN,
    };
    let mut value = None;
    for digit in digits.chars().map_while(|letter| letter.to_digit(radix)).take(400) {
        value = Some(value.unwrap_or(0.0) * f64::from(radix) + f64::from(digit));
    }
    match value {
        Some(value) if negative => -value,
        Some(value) => value,
        None => f64::NAN,
    }
}

/// Whether a shell pattern (`*`, `?`) matches the whole text; takes at most the product of both lengths.
fn shell_match(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut from) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while from < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, from));
                at += 1;
            }
            Some(letter) if *letter == b'?' || text.get(from) == Some(letter) => {
                at += 1;
                from += 1;
            }
            _ => match star {
                Some((star_at, matched)) => {
                    star = Some((star_at, matched + 1));
                    at = star_at + 1;
                    from = matched + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(at).all(|letter| *letter == b'*')
}

/// `weekdayRange`, `dateRange` and `timeRange`, in UTC whether or not `GMT` is said.
fn in_time(name: &str, arguments: &[String], unix: i64) -> bool {
    let arguments: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .filter(|argument| *argument != "GMT" && *argument != "undefined")
        .collect();
    let (days, seconds) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
    let within = |value: i64, from: i64, to: i64| {
        if from <= to { (from..=to).contains(&value) } else { value >= from || value <= to }
    };
    let number = |index: usize| arguments.get(index).and_then(|text| text.parse::<i64>().ok());
    match name {
        "weekdayRange" => {
            let day = |index: usize| {
                let name = arguments.get(index)?;
                WEEKDAYS.iter().position(|day| day == name).and_then(|day| i64::try_from(day).ok())
            };
            let today = (days + 4).rem_euclid(7);
            day(0).is_some_and(|from| within(today, from, day(1).unwrap_or(from)))
        }
        "timeRange" => {
            let values: Option<Vec<i64>> = (0..arguments.len()).map(number).collect();
            match values.as_deref() {
                Some([hour]) => seconds / 3600 == *hour,
                Some([from, to]) => within(seconds / 3600, *from, *to),
                Some([h1, m1, h2, m2]) => within(seconds / 60, h1 * 60 + m1, h2 * 60 + m2),
                Some([h1, m1, s1, h2, m2, s2]) => {
                    within(seconds, h1 * 3600 + m1 * 60 + s1, h2 * 3600 + m2 * 60 + s2)
                }
                _ => false,
            }
        }
        _ => {
            let (year, month, day) = civil(days);
            // Each bound is made of those parts that are given, the larger ones first.
            let part = |text: &str| -> Option<(usize, i64, i64)> {
                if let Some(index) = MONTHS.iter().position(|name| *name == text) {
                    return Some((1, i64::try_from(index).ok()? + 1, month));
                }
                let value = text.parse::<i64>().ok()?;
                Some(if value > 31 { (0, value, year) } else { (2, value, day) })
            };
            let parts: Option<Vec<(usize, i64, i64)>> = arguments.iter().map(|text| part(text)).collect();
            let Some(parts) = parts.filter(|parts| !parts.is_empty()) else { return false };
            let halves = if parts.len() == 1 || (parts.len() % 2 == 1) {
                (&parts[..], &parts[..])
            } else {
                parts.split_at(parts.len() / 2)
            };
            let bound = |half: &[(usize, i64, i64)]| {
                let mut key = [0_i64; 3];
                for (place, value, _) in half {
                    key[*place] = *value;
                }
                key
            };
            let mut today = [0_i64; 3];
            for (place, _, now) in halves.0 {
                today[*place] = *now;
            }
            let (from, to) = (bound(halves.0), bound(halves.1));
            if from <= to { from <= today && today <= to } else { today >= from || today <= to }
        }
    }
}

/// Year, month and day of a number of days since 1970-01-01.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}
