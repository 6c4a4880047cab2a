//! The inputs of `ingest`: several archives and trees, each below the base that was named before it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::ValueParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};

const BASE: &str = "base";
const TAR: &str = "tar";
const TREE: &str = "tree";

/// Archives and trees in the order of the command line.
#[derive(Debug, Default)]
pub(crate) struct Inputs(pub(crate) Vec<Input>);

/// What to publish, and where.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Input {
    /// Directory in the repository.
    pub(crate) base: OsString,
    pub(crate) source: Source,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// An archive; `-` is standard input.
    Tar(PathBuf),
    Tree(PathBuf),
}

impl Args for Inputs {
    fn augment_args(command: Command) -> Command {
        let option = |name: &'static str, value: &'static str, help: &'static str| {
            Arg::new(name)
                .long(name)
                .value_name(value)
                .help(help)
                .action(ArgAction::Append)
                .value_parser(ValueParser::path_buf())
        };
        command
            .arg(option(
                BASE,
                "PATH",
                "Directory in the repository for the inputs that follow, made with its parents if missing, otherwise \
                 merged; if it is named once it may also stand last",
            ))
            .arg(
                option(TAR, "FILE", "Archive to publish, plain, gzip or zstd; - for standard input; may be repeated")
                    .requires(BASE),
            )
            .arg(option(TREE, "DIR", "Local directory whose content to publish; may be repeated").requires(BASE))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Inputs::augment_args(command)
    }
}

impl FromArgMatches for Inputs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Inputs, Error> {
        let bases = values(matches, BASE);
        let mut found: Vec<(usize, Source)> =
            values(matches, TAR).into_iter().map(|(index, path)| (index, Source::Tar(path))).collect();
        found.extend(values(matches, TREE).into_iter().map(|(index, path)| (index, Source::Tree(path))));
        found.sort_by_key(|(index, _)| *index);
        let is_stdin = |source: &Source| matches!(source, Source::Tar(path) if path.as_os_str() == "-");
        if found.iter().filter(|(_, source)| is_stdin(source)).count() > 1 {
            return Err(Error::raw(ErrorKind::ArgumentConflict, "--tar - can be given only once\n"));
        }
        let mut inputs = Vec::new();
        for (index, source) in found {
            let before = bases.iter().rev().find(|(base, _)| *base < index);
            let Some((_, base)) = before.or(bases.first().filter(|_| bases.len() == 1)) else {
                let message = "an input comes before the first of several --base\n";
                return Err(Error::raw(ErrorKind::MissingRequiredArgument, message));
            };
            inputs.push(Input { base: base.clone().into_os_string(), source });
        }
        Ok(Inputs(inputs))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Inputs::from_arg_matches(matches)?;
        Ok(())
    }
}

fn values(matches: &ArgMatches, name: &str) -> Vec<(usize, PathBuf)> {
    let indices = matches.indices_of(name).into_iter().flatten();
    let values = matches.get_many::<PathBuf>(name).into_iter().flatten().cloned();
    indices.zip(values).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Vec<(String, Source)>, Error> {
        let command = Inputs::augment_args(Command::new("test").no_binary_name(true));
        let matches = command.try_get_matches_from(line.split_whitespace())?;
        let inputs = Inputs::from_arg_matches(&matches)?;
        Ok(inputs
            .0
            .into_iter()
            .map(|input| (input.base.into_string().unwrap_or_default(), input.source))
            .collect())
    }

    #[test]
    fn each_input_goes_below_the_base_before_it() {
        let tar = |name: &str| Source::Tar(name.into());
        let tree = |name: &str| Source::Tree(name.into());
        let one = parse("--base a --tar x --tree t --base b --tar y --tar -").ok();
        let expected = [("a", tar("x")), ("a", tree("t")), ("b", tar("y")), ("b", tar("-"))];
        assert_eq!(one, Some(expected.map(|(base, source)| (base.to_owned(), source)).into()));
        assert_eq!(parse("--tar x --base a").ok(), Some(vec![("a".to_owned(), tar("x"))]));
        for bad in ["--tar x", "--tar x --base a --base b", "--base a --tar - --tar -"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
