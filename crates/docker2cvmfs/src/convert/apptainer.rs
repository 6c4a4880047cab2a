//! What Apptainer looks for in a directory image: environment, run script, actions.

use serde_json::Value;

use super::members::{Member, Members};

/// The directory of all of it.
pub(super) const DIRECTORY: &str = ".singularity.d";

/// The files and links for an image with this configuration.
pub(super) fn members(config: &Value) -> Members {
    let config = &config["config"];
    let mut members = Members::default();
    let mut script = |name: &str, text: String| {
        members.add(&format!("{DIRECTORY}/{name}"), Member::Program(text.into_bytes()));
    };
    script("env/10-docker2singularity.sh", environment(&words(&config["Env"])));
    script("env/90-environment.sh", "#!/bin/sh\n# Settings of the site go here.\n".to_owned());
    script("runscript", run_script(&words(&config["Entrypoint"]), &words(&config["Cmd"])));
    script("startscript", "#!/bin/sh\n".to_owned());
    let action = |then: &str| {
        format!(
            "#!/bin/sh\nfor part in /{DIRECTORY}/env/*.sh; do\n    if [ -f \"$part\" ]; then . \"$part\"; fi\ndone\n{then}\n"
        )
    };
    script("actions/exec", action("exec \"$@\""));
    script("actions/run", action(&format!("exec /{DIRECTORY}/runscript \"$@\"")));
    script("actions/shell", action("exec /bin/sh \"$@\""));
    script("actions/start", action(&format!("exec /{DIRECTORY}/startscript \"$@\"")));
    script("actions/test", action("exit 0"));
    for (link, target) in [
        (".exec", "actions/exec"),
        (".run", "actions/run"),
        (".shell", "actions/shell"),
        (".test", "actions/test"),
        ("environment", "env/90-environment.sh"),
        ("singularity", "runscript"),
    ] {
        members.add(link, Member::Link(format!("{DIRECTORY}/{target}")));
    }
    members
}

fn words(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Variables with names that a shell does not take are left out, as engines' shells do.
fn environment(variables: &[&str]) -> String {
    let mut text = "#!/bin/sh\n".to_owned();
    for (name, value) in variables.iter().filter_map(|variable| variable.split_once('=')) {
        let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        if !name.is_empty() && name.bytes().all(is_word) && !name.starts_with(|c: char| c.is_ascii_digit()) {
            text.push_str(&format!("export {name}={}\n", quoted(value)));
        }
    }
    text
}

/// Arguments replace the command, and the entry point stays, as with `docker run`.
fn run_script(entrypoint: &[&str], command: &[&str]) -> String {
    let join = |words: &[&str]| words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    let (entrypoint, command) = (join(entrypoint), join(command));
    let command = if entrypoint.is_empty() && command.is_empty() { "/bin/sh".to_owned() } else { command };
    format!("#!/bin/sh\nif [ $# -eq 0 ]; then\n    set -- {command}\nfi\nexec {entrypoint} \"$@\"\n")
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
