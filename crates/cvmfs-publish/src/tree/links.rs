//! Where an entry of an archive goes if symbolic links are on the way to it.
//!
//! An engine unpacks a layer with the layer's directory as the root of the file system, and so follows links that
//! earlier entries made: after `bin -> usr/bin`, the entry `bin/x` is `usr/bin/x`. The same is done here, with the
//! tree in memory and with what the repository has below the base. Absolute links begin at the base, `..` ends
//! there: nothing leads out.

use layer_tar::{AbsoluteNames, LayerPath};

use super::{Child, Directory, Kind, LayerTree, MAX_DEPTH, split};
use crate::error::{PublishError, shown};

/// Links on the way to one entry. Linux follows as many.
const MAX_LINKS: usize = 40;
/// Steps on the way to one entry, those of the links included: a small archive must not keep a publisher busy for
/// long. Honest layers need a few tens.
const MAX_STEPS: usize = 4 * MAX_DEPTH;

/// What the repository has at a path below the base, before the ingest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Existing {
    Nothing,
    Directory,
    Symlink(Vec<u8>),
    Other,
}

/// Looks into the repository; the path is relative to the base.
pub(crate) type Lookup<'a> = dyn FnMut(&LayerPath) -> Result<Existing, PublishError> + 'a;

/// A directory on the way.
#[derive(Debug)]
struct Step<'t> {
    name: Vec<u8>,
    /// What the archive has of it.
    directory: Option<&'t Directory>,
    /// Whether something of the repository can show in it.
    existing: bool,
}

impl LayerTree {
    /// The path at which an entry belongs that is called `path`: no component before the last one is a symbolic link
    /// then.
    pub(crate) fn followed(
        &self,
        path: &LayerPath,
        lookup: &mut Lookup<'_>,
    ) -> Result<LayerPath, PublishError> {
        let Some((parents, name)) = split(path)? else { return Ok(path.clone()) };
        let mut walk = Walk { tree: self, path, steps: Vec::new(), links: 0, link: None, lookup };
        // The names that are still to be walked, the next one last, each with whether a link brought it.
        let mut rest: Vec<(Vec<u8>, bool)> =
            parents.iter().rev().map(|name| (name.to_vec(), false)).collect();
        let mut count = 0;
        while let Some((name, of_link)) = rest.pop() {
            count += 1;
            if count > MAX_STEPS {
                return Err(walk.refused("lies below symbolic links that lead too far"));
            }
            if let Some(target) = walk.enter(name, of_link)? {
                let names = target.split(|&byte| byte == b'/').rev();
                rest.extend(names.map(|name| (name.to_vec(), true)));
            }
        }
        if walk.links == 0 {
            return Ok(path.clone());
        }
        walk.path_of(name)
    }
}

struct Walk<'w, 'l> {
    tree: &'w LayerTree,
    path: &'w LayerPath,
    steps: Vec<Step<'w>>,
    links: usize,
    /// The link followed last, for messages: its path and target.
    link: Option<(String, String)>,
    lookup: &'w mut Lookup<'l>,
}

impl<'w> Walk<'w, '_> {
    /// Goes into `name`. If that is a symbolic link, goes to where the link begins and returns its target.
    fn enter(&mut self, name: Vec<u8>, of_link: bool) -> Result<Option<Vec<u8>>, PublishError> {
        match &name[..] {
            b"" | b"." => return Ok(None),
            b".." => {
                self.steps.pop();
                return Ok(None);
            }
            _ => {}
        }
        let (directory, existing) = match self.steps.last() {
            Some(step) => (step.directory, step.existing),
            None => (Some(&self.tree.root), true),
        };
        let child = directory.and_then(|directory| directory.children.get(&name[..]));
        let step = match child {
            Some(Child::Directory(below)) => {
                let below: &'w Directory = below;
                Step { name, directory: Some(below), existing: existing && !below.replaces }
            }
            Some(Child::Leaf(id)) => match &self.tree.leaf(*id).kind {
                Kind::Symlink(target) => return self.follow(&name, target).map(Some),
                _ => return Err(self.obstacle(&name, of_link)),
            },
            Some(Child::Link(_)) => {
                return Err(self.obstacle(&name, of_link));
            }
            None => {
                // A whiteout of the name takes what the repository has of it away.
                let hidden = directory.is_some_and(|directory| directory.whiteouts.contains_key(&name[..]));
                let found = if existing && !hidden {
                    let path = self.path_of(&name)?;
                    (self.lookup)(&path)?
                } else {
                    Existing::Nothing
                };
                match found {
                    Existing::Symlink(target) => return self.follow(&name, &target).map(Some),
                    Existing::Nothing | Existing::Other if of_link => {
                        return Err(self.obstacle(&name, of_link));
                    }
                    // What is missing is made; what is in the way in the repository is refused with it.
                    found => Step { name, directory: None, existing: found != Existing::Nothing },
                }
            }
        };
        self.steps.push(step);
        Ok(None)
    }

    fn follow(&mut self, name: &[u8], target: &[u8]) -> Result<Vec<u8>, PublishError> {
        self.links += 1;
        if self.links > MAX_LINKS {
            let reason = "lies below symbolic links that lead in a circle, or more than 40 in a row";
            return Err(self.refused(reason));
        }
        self.link = Some((self.shown(name), shown(target)));
        if target.starts_with(b"/") {
            self.steps.clear();
        }
        Ok(target.to_vec())
    }

    /// `name` in the directory that was reached.
    fn path_of(&self, name: &[u8]) -> Result<LayerPath, PublishError> {
        let mut path = Vec::new();
        for step in &self.steps {
            path.extend_from_slice(&step.name);
            path.push(b'/');
        }
        path.extend_from_slice(name);
        LayerPath::parse(&path, AbsoluteNames::Refuse).map_err(|error| {
            self.refused(&format!("lies below a symbolic link that cannot be followed: {error}"))
        })
    }

    /// The refusal for `name`, which is not a directory; for a part of a link's target the link is named.
    fn obstacle(&self, name: &[u8], of_link: bool) -> PublishError {
        match &self.link {
            Some((link, target)) if of_link => self.refused(&format!(
                "lies below {link}, a symbolic link to {target}, which is not a directory below the base"
            )),
            _ => {
                let name = self.shown(name);
                self.refused(&format!("lies below {name}, which is not a directory in this archive"))
            }
        }
    }

    /// `name` in the directory that was reached, for messages.
    fn shown(&self, name: &[u8]) -> String {
        let names = self.steps.iter().map(|step| &step.name[..]).chain([name]);
        shown(&names.collect::<Vec<_>>().join(&b'/'))
    }

    fn refused(&self, reason: &str) -> PublishError {
        PublishError::entry(self.path.as_bytes(), reason)
    }
}
