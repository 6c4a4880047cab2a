//! PAX records: `LENGTH KEY=VALUE\n`, read by length because values are binary.

/// Key and value.
pub(crate) type Record<'a> = (&'a [u8], &'a [u8]);

/// Splits the data of an extended header into records. Any byte that is not part of a record is an error:
/// the parser underneath would silently stop there and lose what follows.
pub(crate) fn records(mut data: &[u8]) -> Result<Vec<Record<'_>>, &'static str> {
    let mut records = Vec::new();
    while !data.is_empty() {
        let (record, rest) = first_record(data).ok_or("has a malformed record")?;
        records.push(record);
        data = rest;
    }
    Ok(records)
}

fn first_record(data: &[u8]) -> Option<(Record<'_>, &[u8])> {
    // Seven digits count to ten million, ten times the largest extended header that is admitted.
    let space = data.iter().take(8).position(|&byte| byte == b' ')?;
    let digits = &data[..space];
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let length = digits.iter().fold(0usize, |length, digit| length * 10 + usize::from(digit - b'0'));
    let body = data.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&byte| byte == b'=')?;
    let key = &body[..equals];
    if key.is_empty() {
        return None;
    }
    Some(((key, &body[equals + 1..]), &data[length..]))
}

/// Appends one record.
pub(crate) fn append(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // " ", "=" and "\n" are three bytes; the length counts its own digits too.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

const XATTR: &[u8] = b"SCHILY.xattr.";

/// The extended attribute that a record's key stands for. GNU tar writes `=` and `%` of attribute names as
/// `%3D` and `%25`.
pub(crate) fn xattr_name(key: &[u8]) -> Option<Vec<u8>> {
    let mut encoded = key.strip_prefix(XATTR)?;
    let mut name = Vec::with_capacity(encoded.len());
    while let Some((&first, rest)) = encoded.split_first() {
        let (byte, rest) = match rest.get(..2) {
            Some(b"3D") if first == b'%' => (b'=', &rest[2..]),
            Some(b"25") if first == b'%' => (b'%', &rest[2..]),
            _ => (first, rest),
        };
        name.push(byte);
        encoded = rest;
    }
    Some(name)
}

/// The key under which an extended attribute is stored; see [`xattr_name`].
pub(crate) fn xattr_key(name: &[u8]) -> Vec<u8> {
    let mut key = XATTR.to_vec();
    for &byte in name {
        match byte {
            b'=' => key.extend_from_slice(b"%3D"),
            b'%' => key.extend_from_slice(b"%25"),
            _ => key.push(byte),
        }
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_split_by_length_whatever_their_values_hold() {
        let mut data = Vec::new();
        append(&mut data, b"SCHILY.xattr.user.bin", b"\0a=b\n12 x=y\n");
        append(&mut data, b"path", &[b'p'; 300]);
        append(&mut data, b"comment", b"");
        let split = records(&data).unwrap();
        assert_eq!(split[0], (&b"SCHILY.xattr.user.bin"[..], &b"\0a=b\n12 x=y\n"[..]));
        assert_eq!(split[1], (&b"path"[..], &[b'p'; 300][..]));
        assert_eq!(split[2], (&b"comment"[..], &b""[..]));
    }

    #[test]
    fn the_length_counts_its_own_digits() {
        for size in 0..1200 {
            let mut data = Vec::new();
            append(&mut data, b"k", &vec![b'v'; size]);
            assert!(data.starts_with(format!("{} ", data.len()).as_bytes()));
            assert_eq!(records(&data).unwrap().len(), 1);
        }
    }

    #[test]
    fn anything_between_records_is_an_error() {
        assert!(records(b"6 a=b\n").is_ok());
        for bad in [
            &b"x"[..],
            b"7 a=b\n",
            b"5 a=b\n",
            b"0 a=b\n",
            b"6 a=b\n\0",
            b"99999999 a=b\n",
            b"5 =b\n",
            b"5 ab\n",
            b" a=b\n",
        ] {
            assert!(records(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn attribute_names_survive_the_equals_sign() {
        for name in [&b"user.plain"[..], b"user.a=b", b"user.100%", b"user.%3D"] {
            assert_eq!(xattr_name(&xattr_key(name)).unwrap(), name);
        }
        assert_eq!(xattr_name(b"mtime"), None);
    }
}
