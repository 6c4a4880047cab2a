//! Numbers and times as tar spells them.
//!
//! The header fields are read here, from the raw bytes, and not taken from the parser underneath: that one
//! drops the sign of binary numbers and the bits that exceed 64.

use crate::Timestamp;

/// A numeric header field: octal digits between blanks, or GNU's binary form (first bit set, two's
/// complement, big endian). An empty field is 0. The error says what is wrong.
pub(crate) fn header_number(field: &[u8]) -> Result<i128, String> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => Ok(binary(*first, field)),
        _ => octal(field),
    }
}

fn binary(first: u8, field: &[u8]) -> i128 {
    // Fields have at most 12 bytes, so 95 bits of number. The second highest bit is the sign.
    let negative = first & 0x40 != 0;
    let start: i128 = if negative { -1 } else { 0 };
    field.iter().enumerate().fold(start, |value, (index, &byte)| {
        let byte = match index {
            0 if negative => byte | 0x80,
            0 => byte & 0x7f,
            _ => byte,
        };
        (value << 8) | i128::from(byte)
    })
}

fn octal(field: &[u8]) -> Result<i128, String> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    let digits = field[..end].trim_ascii();
    let mut value = 0i128;
    for &byte in digits {
        if !(b'0'..=b'7').contains(&byte) {
            return Err(format!("is not an octal number: '{}'", field.escape_ascii()));
        }
        value = value << 3 | i128::from(byte - b'0');
    }
    Ok(value)
}

/// A decimal PAX value without sign.
pub(crate) fn pax_number(value: &[u8]) -> Result<i128, String> {
    // 20 digits hold every 64-bit number; more would also overflow the accumulator one day.
    if value.is_empty() || value.len() > 20 || !value.iter().all(u8::is_ascii_digit) {
        return Err(format!("is not a decimal number: '{}'", crate::error::shown(value)));
    }
    Ok(value.iter().fold(0i128, |number, digit| number * 10 + i128::from(digit - b'0')))
}

/// A PAX time: seconds with optional sign and fraction. Digits beyond nanoseconds are cut off.
pub(crate) fn pax_time(value: &[u8]) -> Result<Timestamp, String> {
    let bad = || format!("is not a time: '{}'", crate::error::shown(value));
    let (negative, unsigned) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let dot = unsigned.iter().position(|&byte| byte == b'.').unwrap_or(unsigned.len());
    let (whole, fraction) = unsigned.split_at(dot);
    let fraction = fraction.get(1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let seconds = pax_number(whole).map_err(|_| bad())?;
    let nanoseconds = (0..9).fold(0u32, |nanoseconds, place| {
        nanoseconds * 10 + fraction.get(place).map_or(0, |digit| u32::from(digit - b'0'))
    });
    let (seconds, nanoseconds) = match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    };
    Ok((i64::try_from(seconds).map_err(|_| bad())?, nanoseconds))
}

/// The spelling that [`pax_time`] reads back.
pub(crate) fn format_pax_time((seconds, nanoseconds): Timestamp) -> String {
    if nanoseconds == 0 {
        return seconds.to_string();
    }
    let (sign, whole, fraction) = if seconds < 0 {
        ("-", -(i128::from(seconds) + 1), 1_000_000_000 - nanoseconds)
    } else {
        ("", i128::from(seconds), nanoseconds)
    };
    let digits = format!("{fraction:09}");
    format!("{sign}{whole}.{}", digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_are_read_with_any_padding() {
        assert_eq!(header_number(b"0000644\0"), Ok(0o644));
        assert_eq!(header_number(b"   644 \0"), Ok(0o644));
        assert_eq!(header_number(b"77777777777 "), Ok(0o77777777777));
        assert_eq!(header_number(b"\0\0\0\0"), Ok(0));
        assert_eq!(header_number(b""), Ok(0));
        assert!(header_number(b"0000648\0").is_err());
        assert!(header_number(b"-000001\0").is_err());
    }

    #[test]
    fn binary_fields_keep_their_sign_and_all_their_bits() {
        assert_eq!(header_number(&[0x80, 0, 0, 0, 0xb2, 0xd0, 0x5e, 0x00]), Ok(3_000_000_000));
        assert_eq!(header_number(&[0xff; 12]), Ok(-1));
        let mut huge = [0u8; 12];
        (huge[0], huge[1]) = (0x80, 1);
        assert_eq!(header_number(&huge), Ok(1 << 80));
    }

    #[test]
    fn pax_times_carry_sign_and_fraction_both_ways() {
        for (text, time) in [
            ("0", (0, 0)),
            ("1700000000.25", (1_700_000_000, 250_000_000)),
            ("-1", (-1, 0)),
            ("-1.5", (-2, 500_000_000)),
            ("-0.000000001", (-1, 999_999_999)),
            ("9223372036854775807", (i64::MAX, 0)),
        ] {
            assert_eq!(pax_time(text.as_bytes()), Ok(time), "{text}");
            assert_eq!(format_pax_time(time), text);
        }
        assert_eq!(pax_time(b"-9223372036854775808"), Ok((i64::MIN, 0)));
        assert_eq!(pax_time(b"1.1234567899"), Ok((1, 123_456_789)));
        for bad in [&b""[..], b"-", b".", b"x", b"1.x", b"--1", b"+1", b"9223372036854775808", b"1e3"] {
            assert!(pax_time(bad).is_err(), "{}", bad.escape_ascii());
        }
    }
}
