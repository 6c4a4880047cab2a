//! Repository names.

use super::ConfigError;

/// Longest repository name in bytes: it is a file name in the cache and in `config.d`.
const LONGEST: usize = 255;

/// Checks that `fqrn` is a fully qualified repository name such as `example.cern.ch`: at most 255 of the letters,
/// digits and `.`, `-`, `_`, at least one dot, and neither a dot nor a dash in front.
///
/// # Errors
/// [`ConfigError::InvalidName`] with the rule that is broken.
pub fn validate_fqrn(fqrn: &str) -> Result<(), ConfigError> {
    let invalid = |rule| Err(ConfigError::InvalidName { name: fqrn.chars().take(LONGEST).collect(), rule });
    if fqrn.is_empty() {
        return invalid("it is empty");
    }
    if fqrn.len() > LONGEST {
        return invalid("it is longer than 255 bytes");
    }
    if !fqrn.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte)) {
        return invalid("only letters, digits, '.', '-' and '_' may occur in it");
    }
    if fqrn.starts_with(['.', '-']) {
        return invalid("it must not begin with '.' or '-'");
    }
    if fqrn.ends_with('.') || fqrn.contains("..") {
        return invalid("a part between two dots is empty");
    }
    if !fqrn.contains('.') {
        return invalid("it has no domain; set CVMFS_DEFAULT_DOMAIN or give the full name");
    }
    Ok(())
}

/// Completes a name without a dot with `default_domain`, as the mount helper does (client behaviour §3.1).
///
/// # Errors
/// [`ConfigError::InvalidName`] if the completed name is not valid.
pub fn expand_fqrn(name: &str, default_domain: Option<&str>) -> Result<String, ConfigError> {
    let fqrn = match default_domain {
        Some(domain) if !name.contains('.') && !domain.is_empty() => format!("{name}.{domain}"),
        _ => name.to_owned(),
    };
    validate_fqrn(&fqrn)?;
    Ok(fqrn)
}

/// The part of a valid name after its first dot.
pub(super) fn domain(fqrn: &str) -> &str {
    fqrn.split_once('.').map_or("", |(_, domain)| domain)
}

/// The part of a valid name before its first dot, the value of `@org@`.
pub(super) fn organisation(fqrn: &str) -> &str {
    fqrn.split_once('.').map_or(fqrn, |(first, _)| first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_safe_as_file_names_are_accepted() {
        for good in ["a.b", "example.cern.ch", "my-repo_1.x.org", "basic-sha1.peer.example.org"] {
            validate_fqrn(good).unwrap();
        }
        let long = format!("{}.b", "a".repeat(254));
        for bad in [
            "", "a", ".a.b", "-a.b", "a..b", "a.b.", "a/b.c", "../etc.x", "a b.c", "a.b\n", "ä.b", "@a.b",
            &long,
        ] {
            validate_fqrn(bad).unwrap_err();
        }
    }

    #[test]
    fn a_short_name_gets_the_default_domain() {
        assert_eq!(expand_fqrn("atlas", Some("cern.ch")).unwrap(), "atlas.cern.ch");
        assert_eq!(expand_fqrn("atlas.cern.ch", Some("desy.de")).unwrap(), "atlas.cern.ch");
        assert!(expand_fqrn("atlas", None).unwrap_err().to_string().contains("CVMFS_DEFAULT_DOMAIN"));
    }
}
