//! From wishes to images: wildcards are held against the registry's tags.

use std::collections::{HashMap, HashSet};

use registry::{Client, Reference};

use super::parallel::in_parallel;
use super::recipe::{Recipe, Wish};
use crate::failure::ConvertError;

/// Most images of one list, wildcards resolved.
const MAX_IMAGES: usize = 100_000;

/// One image that is wished for.
#[derive(Debug, Clone)]
pub(super) struct WishedImage {
    pub(super) reference: Reference,
    /// The name of its thin image, if one is wanted.
    pub(super) output: Option<Reference>,
}

/// A wish whose images are not known.
#[derive(Debug)]
pub(super) struct Unresolved<'a> {
    pub(super) wish: &'a Wish,
    pub(super) error: ConvertError,
}

/// All images of a list.
#[derive(Debug, Default)]
pub(super) struct Expanded<'a> {
    /// Each image once.
    pub(super) images: Vec<WishedImage>,
    /// Wishes that could not be resolved: what they stood for before must not be taken
    /// for unwished.
    pub(super) unresolved: Vec<Unresolved<'a>>,
}

/// Resolves the wishes that `concerned` accepts.
pub(super) fn expand<'a>(
    recipe: &'a Recipe,
    with_thin_images: bool,
    client: &Client,
    workers: usize,
    concerned: impl Fn(&Wish) -> bool,
) -> Expanded<'a> {
    let wishes: Vec<&Wish> = recipe.wishes.iter().filter(|wish| concerned(wish)).collect();
    let found = in_parallel(&wishes, workers, |wish| images_of(wish, client));
    let mut expanded = Expanded::default();
    let mut seen = HashSet::new();
    let mut outputs: HashMap<String, String> = HashMap::new();
    for (wish, images) in wishes.into_iter().zip(found) {
        let images = match images {
            Ok(images) if seen.len() + images.len() > MAX_IMAGES => {
                let error = ConvertError::Usage(format!("the list means more than {MAX_IMAGES} images"));
                expanded.unresolved.push(Unresolved { wish, error });
                continue;
            }
            Ok(images) => images,
            Err(error) => {
                expanded.unresolved.push(Unresolved { wish, error });
                continue;
            }
        };
        for reference in images {
            if !seen.insert(reference.to_string()) {
                continue;
            }
            match with_thin_images.then(|| recipe.output.expand(&reference)).transpose() {
                Ok(output) => {
                    let name = output.as_ref().map(ToString::to_string);
                    let taken = name.as_ref().and_then(|name| outputs.get(name));
                    if let (Some(name), Some(other)) = (&name, taken) {
                        let reason =
                            format!("{reference} and {other} would both become {name}: change output_format");
                        expanded.unresolved.push(Unresolved { wish, error: ConvertError::Usage(reason) });
                        continue;
                    }
                    outputs.extend(name.map(|name| (name, reference.to_string())));
                    expanded.images.push(WishedImage { reference, output });
                }
                Err(reason) => {
                    let error = ConvertError::Usage(format!("output_format for {reference}: {reason}"));
                    expanded.unresolved.push(Unresolved { wish, error });
                }
            }
        }
    }
    expanded
}

fn images_of(wish: &Wish, client: &Client) -> Result<Vec<Reference>, ConvertError> {
    let Some(pattern) = &wish.pattern else { return Ok(vec![wish.reference.clone()]) };
    let mut tags = client.tags(&wish.reference)?;
    tags.sort();
    let with = |tag: String| Reference { tag: Some(tag), digest: None, ..wish.reference.clone() };
    // What the registry says is parsed like everything else from outside.
    let valid = |image: &Reference| image.to_string().parse::<Reference>().is_ok();
    Ok(tags.into_iter().filter(|tag| pattern.matches(tag)).map(with).filter(valid).collect())
}
