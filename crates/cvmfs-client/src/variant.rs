//! Variant symlinks: targets with `$(NAME)` or `$(NAME:-default)` (repository format §9.6).

/// Expands the variables of a link target.
///
/// `value` looks a name up; the C++ client's environment, which is to be offered here, holds the process
/// environment and all configuration values. A name that is not set gives its default or nothing; what is not
/// closed stays as it is; expanded text is not expanded again.
pub fn expand(target: &[u8], value: &dyn Fn(&[u8]) -> Option<Vec<u8>>) -> Vec<u8> {
    let mut expanded = Vec::with_capacity(target.len());
    let mut rest = target;
    while let Some(start) = find(rest, b"$(") {
        let (before, from) = rest.split_at(start);
        let inside = from.get(2..).unwrap_or_default();
        let Some(end) = find(inside, b")") else { break };
        expanded.extend_from_slice(before);
        let (variable, after) = inside.split_at(end);
        let (name, default) = match find(variable, b":-") {
            Some(at) => (variable.get(..at).unwrap_or_default(), variable.get(at + 2..).unwrap_or_default()),
            None => (variable, &b""[..]),
        };
        match value(name) {
            Some(text) => expanded.extend_from_slice(&text),
            None => expanded.extend_from_slice(default),
        }
        rest = after.get(1..).unwrap_or_default();
    }
    expanded.extend_from_slice(rest);
    expanded
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    text.windows(pattern.len()).position(|window| window == pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_40_variables_are_replaced_once_and_open_ones_stay() {
        let value = |name: &[u8]| match name {
            b"ARCH" => Some(b"x86_64-el9".to_vec()),
            b"EMPTY" => Some(Vec::new()),
            b"LOOP" => Some(b"$(ARCH)".to_vec()),
            _ => None,
        };
        let table: [(&[u8], &[u8]); 13] = [
            (b"plain", b"plain"),
            (b"", b""),
            (b"$(ARCH)", b"x86_64-el9"),
            (b"a/$(ARCH)/b/$(ARCH)", b"a/x86_64-el9/b/x86_64-el9"),
            (b"$(UNSET)/x", b"/x"),
            (b"$(UNSET:-default)/x", b"default/x"),
            (b"$(ARCH:-default)", b"x86_64-el9"),
            (b"$(EMPTY:-default)", b""),
            (b"$(LOOP)", b"$(ARCH)"),
            (b"$(ARCH)/$(open", b"x86_64-el9/$(open"),
            (b"$ARCH", b"$ARCH"),
            (b"$()", b""),
            (b"$(UNSET:-)", b""),
        ];
        for (target, expected) in table {
            assert_eq!(expand(target, &value), expected, "{:?}", String::from_utf8_lossy(target));
        }
    }

    proptest::proptest! {
        #[test]
        fn no_target_makes_the_expansion_panic(target in proptest::collection::vec(
            proptest::sample::select(b"$():-AB".to_vec()), 0..40)
        ) {
            expand(&target, &|_| None);
        }
    }
}
