//! Wish lists in DUCC's format, version 1 (thin images §8.1).
//!
//! ```yaml
//! version: 1
//! user: robot
//! cvmfs_repo: unpacked.example.org
//! output_format: '$(scheme)://registry.example.org/thin/$(image)'
//! input:
//!   - 'https://registry.hub.docker.com/library/centos:7'
//!   - 'https://registry.hub.docker.com/atlas/analysisbase:21.2.1*'
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use registry::{Reference, ReferenceTransport};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::bounded::read_text;

/// Largest accepted wish list in bytes: a hundred thousand long names.
const MAX_RECIPE_BYTES: u64 = 16 << 20;
/// Most wishes of one list.
const MAX_WISHES: usize = 100_000;
/// Longest tag, wildcards included.
const MAX_PATTERN_BYTES: usize = 128;
/// Where DUCC puts thin images if nothing is said.
const DEFAULT_OUTPUT: &str = "$(scheme)://$(registry)/$(repository)_thin:$(tag)";
/// The keys that mean something.
const KEYS: [&str; 5] = ["version", "user", "cvmfs_repo", "output_format", "input"];

/// Why a wish list cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("wish list {}: {reason}", file.display())]
pub struct RecipeError {
    /// The list.
    pub file: PathBuf,
    /// The line or wish, and what is wrong with it.
    pub reason: String,
}

/// A wish list.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The repository that the images go into.
    pub fqrn: String,
    /// The user that pushes thin images.
    pub user: Option<String>,
    /// Where thin images go.
    pub output: OutputFormat,
    /// The wishes, each once, in the list's order.
    pub wishes: Vec<Wish>,
    /// What is odd about the list without making it useless.
    pub warnings: Vec<String>,
}

/// One line of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// As it was written.
    pub text: String,
    /// The image, or the repository of the images.
    pub reference: Reference,
    /// Which tags are wanted, if it is not the one of the reference.
    pub pattern: Option<TagPattern>,
}

/// Tags with `*` for any number of characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagPattern(String);

/// The template of a thin image's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputFormat(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(Variable),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variable {
    Scheme,
    Registry,
    Repository,
    Reference,
    Image,
    Tag,
    Digest,
}

impl Recipe {
    /// Reads a list.
    ///
    /// # Errors
    /// A file that cannot be read, is no list, or has a wish that is no image.
    pub fn read(file: &Path) -> Result<Self, RecipeError> {
        let failed = |reason: String| RecipeError { file: file.to_owned(), reason };
        let text = read_text(file, MAX_RECIPE_BYTES).map_err(failed)?;
        Self::parse(&text).map_err(failed)
    }

    /// Parses a list.
    ///
    /// # Errors
    /// The line or wish, and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Document {
            version: Option<u64>,
            user: Option<String>,
            cvmfs_repo: Option<String>,
            output_format: Option<String>,
            input: Option<Vec<String>>,
        }
        let invalid = |error: serde_saphyr::Error| {
            // The parser shows the place in the text over several lines.
            let shown = error.to_string();
            format!("is not valid: {}", shown.lines().next().unwrap_or_default())
        };
        let keys: BTreeMap<String, IgnoredAny> = serde_saphyr::from_str(text).map_err(invalid)?;
        let document: Document = serde_saphyr::from_str(text).map_err(invalid)?;
        match document.version {
            Some(1) => {}
            Some(other) => return Err(format!("has version {other}; only version 1 is known")),
            None => return Err("lacks `version: 1`".to_owned()),
        }
        let present = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        let fqrn = present(document.cvmfs_repo).ok_or("lacks `cvmfs_repo`, the repository for the layers")?;
        thin_image::Location::new(&fqrn, "layers").map_err(|rule| format!("cvmfs_repo {fqrn:?}: {rule}"))?;
        let format = present(document.output_format);
        let output = OutputFormat::parse(format.as_deref().unwrap_or(DEFAULT_OUTPUT))?;
        let input = document.input.unwrap_or_default();
        if input.len() > MAX_WISHES {
            return Err(format!("has {} wishes, more than {MAX_WISHES}", input.len()));
        }
        let mut warnings: Vec<String> = keys
            .keys()
            .filter(|key| !KEYS.contains(&key.as_str()))
            .map(|key| format!("the key {key:?} means nothing here and is ignored"))
            .collect();
        if input.is_empty() {
            warnings.push("there is no image in `input`".to_owned());
        }
        let mut wishes: Vec<Wish> = Vec::with_capacity(input.len());
        let mut seen = std::collections::HashSet::new();
        for text in &input {
            let wish = Wish::parse(text)?;
            if seen.insert((wish.reference.clone(), wish.pattern.as_ref().map(|pattern| pattern.0.clone()))) {
                wishes.push(wish);
            }
        }
        Ok(Self { fqrn, user: present(document.user), output, wishes, warnings })
    }
}

impl Wish {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = |reason: &dyn fmt::Display| format!("wish {text:?}: {reason}");
        let text = text.trim();
        let name_start = text.rfind('/').map_or(0, |slash| slash + 1);
        let colon = text.get(name_start..).and_then(|name| name.find(':')).map(|at| name_start + at);
        let tag = colon.and_then(|colon| text.get(colon + 1..)).filter(|tag| tag.contains('*'));
        let (name, pattern) = match (colon, tag) {
            (Some(colon), Some(tag)) => {
                (text.get(..colon).unwrap_or_default(), Some(TagPattern::parse(tag).map_err(|e| wrong(&e))?))
            }
            _ => (text, None),
        };
        let reference = name.parse::<Reference>().map_err(|error| wrong(&error.rule))?;
        Ok(Self { text: text.to_owned(), reference, pattern })
    }

    /// Whether an image of some registry may be meant.
    pub fn concerns(&self, repository: &str, tag: Option<&str>) -> bool {
        self.reference.repository == repository
            && match (&self.pattern, tag) {
                (_, None) => true,
                (Some(pattern), Some(tag)) => pattern.matches(tag),
                (None, Some(tag)) => {
                    self.reference.digest.is_none()
                        && self.reference.tag.as_deref().unwrap_or("latest") == tag
                }
            }
    }
}

impl TagPattern {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-' | b'*');
        if text.len() > MAX_PATTERN_BYTES || !text.bytes().all(allowed) {
            return Err("a tag consists of letters, digits, '_', '.', '-' and '*', at most 128");
        }
        Ok(Self(text.to_owned()))
    }

    /// Whether the whole tag fits. Everything but `*` stands for itself.
    pub fn matches(&self, tag: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = tag.strip_prefix(first) else { return false };
        let mut parts: Vec<&str> = parts.collect();
        let Some(last) = parts.pop() else { return rest.is_empty() };
        for part in parts {
            // The leftmost place leaves most for those that follow.
            match rest.find(part).and_then(|at| rest.get(at + part.len()..)) {
                Some(after) => rest = after,
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl OutputFormat {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = |reason: String| format!("output_format {text:?}: {reason}");
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find("$(") {
            let (before, after) = rest.split_at(start);
            let Some((name, behind)) = after.get(2..).and_then(|after| after.split_once(')')) else {
                return Err(wrong("a variable lacks its ')'".to_owned()));
            };
            let variable = match name {
                "scheme" => Variable::Scheme,
                "registry" => Variable::Registry,
                "repository" => Variable::Repository,
                "reference" => Variable::Reference,
                "image" => Variable::Image,
                "tag" => Variable::Tag,
                "digest" => Variable::Digest,
                other => return Err(wrong(format!("there is no variable {other:?}"))),
            };
            parts.extend((!before.is_empty()).then(|| Part::Text(before.to_owned())));
            parts.push(Part::Variable(variable));
            rest = behind;
        }
        parts.extend((!rest.is_empty()).then(|| Part::Text(rest.to_owned())));
        let format = Self(parts);
        // What is wrong for every image is wrong in the list.
        let trial = "https://registry.example.org/group/image:1".parse::<Reference>();
        let trial = trial.map_err(|error| wrong(error.rule.to_owned()))?;
        format.expand(&trial).map_err(wrong)?;
        Ok(format)
    }

    /// The name of the thin image of an image.
    ///
    /// # Errors
    /// What the variables give is no name.
    pub fn expand(&self, image: &Reference) -> Result<Reference, String> {
        let text: String = self.0.iter().map(|part| part.text(image)).collect();
        let mut output =
            text.parse::<Reference>().map_err(|error| format!("gives {text:?}: {}", error.rule))?;
        if let Some(digest) = output.digest.take() {
            // A thin image has a digest of its own; that of the source can only be a tag.
            output.tag.get_or_insert_with(|| format!("{}-{}", digest.algorithm(), digest.hex()));
        }
        if output.registry == image.registry && output.repository == image.repository {
            return Err(format!("gives {text:?}, where the image itself is"));
        }
        Ok(output)
    }
}

impl Part {
    fn text(&self, image: &Reference) -> String {
        let reference = || match (&image.tag, &image.digest) {
            (Some(tag), _) => format!(":{tag}"),
            (None, Some(digest)) => format!("@{digest}"),
            (None, None) => ":latest".to_owned(),
        };
        match self {
            Self::Text(text) => text.clone(),
            Self::Variable(Variable::Scheme) => match image.transport {
                ReferenceTransport::Http => "http".to_owned(),
                ReferenceTransport::Auto if image.is_loopback() => "http".to_owned(),
                ReferenceTransport::Auto | ReferenceTransport::Https => "https".to_owned(),
            },
            Self::Variable(Variable::Registry) => image.registry.clone(),
            Self::Variable(Variable::Repository) => image.repository.clone(),
            Self::Variable(Variable::Reference) => reference(),
            Self::Variable(Variable::Image) => format!("{}{}", image.repository, reference()),
            Self::Variable(Variable::Tag) => match (&image.tag, &image.digest) {
                (Some(tag), _) => tag.clone(),
                (None, Some(digest)) => format!("{}-{}", digest.algorithm(), digest.hex()),
                (None, None) => "latest".to_owned(),
            },
            Self::Variable(Variable::Digest) => {
                image.digest.as_ref().map(ToString::to_string).unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(input: &str) -> Result<Recipe, String> {
        Recipe::parse(&format!("version: 1\nuser: robot\ncvmfs_repo: u.example.org\n{input}"))
    }

    #[test]
    fn a_list_of_ducc_is_read() {
        let text = "output_format: '$(scheme)://registry.example.org/thin/$(image)'\ninput:\n  \
                    - 'https://registry.hub.docker.com/library/centos:7'\n  \
                    - \"https://registry.hub.docker.com/atlas/analysisbase:21.2.1*\" # all of them\n  \
                    - 'https://registry.hub.docker.com/library/centos:7'\n";
        let recipe = parse(text).unwrap();
        assert_eq!((recipe.fqrn.as_str(), recipe.user.as_deref()), ("u.example.org", Some("robot")));
        assert_eq!(recipe.wishes.len(), 2, "each once");
        assert!(recipe.warnings.is_empty());
        let [centos, atlas] = recipe.wishes.as_slice() else { panic!() };
        assert_eq!(centos.reference.to_string(), "https://registry.hub.docker.com/library/centos:7");
        assert_eq!(centos.pattern, None);
        assert_eq!(atlas.reference.repository, "atlas/analysisbase");
        assert!(atlas.pattern.as_ref().unwrap().matches("21.2.10"));
        let output = recipe.output.expand(&centos.reference).unwrap();
        assert_eq!(output.to_string(), "https://registry.example.org/thin/library/centos:7");
    }

    #[test]
    fn wildcards_match_whole_tags_and_dots_are_dots() {
        let matches = |pattern: &str, tag: &str| TagPattern::parse(pattern).unwrap().matches(tag);
        for (pattern, tag) in [
            ("*", ""),
            ("*", "anything"),
            ("1.*", "1."),
            ("1.*", "1.2"),
            ("*-slim", "x-slim"),
            ("a*b*c", "abc"),
            ("a*b*c", "a-b-b-c"),
            ("a**c", "ac"),
            ("v*.*", "v1.2"),
            ("*ab", "aab"),
        ] {
            assert!(matches(pattern, tag), "{pattern} {tag}");
        }
        for (pattern, tag) in [
            ("1.*", "102"),
            ("1.*", "11.2"),
            ("*-slim", "x-slim2"),
            ("a*b*c", "acb"),
            ("a*a", "a"),
            ("ab*", "a"),
        ] {
            assert!(!matches(pattern, tag), "{pattern} {tag}");
        }
    }

    #[test]
    fn every_variable_has_its_value() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let expand = |format: &str, image: &str| {
            let format = OutputFormat::parse(format).unwrap();
            format.expand(&image.parse().unwrap()).unwrap().to_string()
        };
        let by_digest = format!("https://r.org/a/b@{digest}");
        assert_eq!(
            expand("$(scheme)://o.org/$(registry)/$(image)", "http://r.org/a/b:1"),
            "http://o.org/r.org/a/b:1"
        );
        assert_eq!(expand("o.org/$(repository)$(reference)", "r.org/a/b"), "o.org/a/b:latest");
        assert_eq!(
            expand("o.org/$(repository)$(reference)", &by_digest),
            format!("o.org/a/b:sha256-{}", "a".repeat(64))
        );
        assert_eq!(expand("o.org/x:$(tag)", &by_digest), format!("o.org/x:sha256-{}", "a".repeat(64)));
        assert_eq!(expand(DEFAULT_OUTPUT, "https://r.org/a/b:1"), "https://r.org/a/b_thin:1");
        assert_eq!(expand(DEFAULT_OUTPUT, "localhost:5000/b:1"), "http://localhost:5000/b_thin:1");
    }

    #[test]
    fn what_is_no_list_is_refused_with_the_place() {
        let message = |text: &str| Recipe::parse(text).unwrap_err();
        assert!(message("").contains("not valid") || message("").contains("version"));
        assert!(message("version: 2\ncvmfs_repo: a.b\n").contains("version 2"));
        assert!(message("cvmfs_repo: a.b\n").contains("version: 1"));
        assert!(message("version: 1\n").contains("cvmfs_repo"));
        assert!(message("version: 1\ncvmfs_repo: ../x\n").contains("cvmfs_repo"));
        assert!(message("version: 1\ncvmfs_repo: [\n").contains("not valid"));
        let wish = |text: &str| parse(&format!("input: ['{text}']")).unwrap_err();
        assert!(wish("https://r.org/UPPER:1").contains("UPPER:1"));
        assert!(wish("https://r.org/x:a*/b").contains("wish"));
        let format = |text: &str| parse(&format!("output_format: '{text}'\ninput: ['a:1']")).unwrap_err();
        assert!(format("$(nothing)/x").contains("no variable"));
        assert!(format("o.org/$(image").contains("')'"));
        assert!(format("o.org/UPPER/$(image)").contains("lower case"));
        assert!(format("$(scheme)://$(registry)/$(image)").contains("where the image itself is"));
    }

    #[test]
    fn unknown_keys_are_said() {
        let recipe = parse("output_fromat: x\ninput: []\n").unwrap();
        assert_eq!(recipe.warnings.len(), 2, "{:?}", recipe.warnings);
        assert!(recipe.warnings[0].contains("output_fromat"));
    }

    #[test]
    fn a_bomb_of_aliases_is_an_error() {
        let mut text = "version: 1\na: &a [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for (name, of) in
            ["b", "c", "d", "e", "f", "g", "h", "i"].iter().zip(["a", "b", "c", "d", "e", "f", "g", "h"])
        {
            let list = vec![format!("*{of}"); 10].join(",");
            text.push_str(&format!("{name}: &{name} [{list}]\n"));
        }
        assert!(Recipe::parse(&text).is_err());
    }
}
