//! The documents keep up with the code: tests that ARCHITECTURE.md names exist, and links lead somewhere.

#![allow(clippy::unwrap_used, reason = "a story that cannot go on has failed")]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use testkit::workspace_root;

fn files(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            if name != "target" && name != ".git" {
                files(&path, extension, found);
            }
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}

#[test]
fn every_test_that_the_architecture_names_exists() {
    let mut sources = Vec::new();
    files(workspace_root(), "rs", &mut sources);
    let mut functions = HashSet::new();
    for source in sources {
        let text = std::fs::read_to_string(source).unwrap();
        let names = text.lines().filter_map(|line| line.trim_start().strip_prefix("fn ")?.split('(').next());
        functions.extend(names.map(str::to_owned));
    }
    let text = std::fs::read_to_string(workspace_root().join("ARCHITECTURE.md")).unwrap();
    let invariants = text.split("## Invariants").nth(1).unwrap().split("\n## ").next().unwrap();
    let named: Vec<_> = invariants.split('`').skip(1).step_by(2).filter(|name| name.contains('_')).collect();
    assert!(named.len() > 10, "{named:?}");
    let missing: Vec<_> = named.into_iter().filter(|name| !functions.contains(*name)).collect();
    assert!(missing.is_empty(), "no such tests: {missing:?}");
}

#[test]
fn links_of_the_documents_lead_to_files() {
    let mut documents = Vec::new();
    files(workspace_root(), "md", &mut documents);
    for document in documents {
        let text = std::fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !link.starts_with("http") && !link.starts_with('#') {
                let target = document.parent().unwrap().join(link.split('#').next().unwrap());
                assert!(target.exists(), "{}: {link}", document.display());
            }
        }
    }
}
