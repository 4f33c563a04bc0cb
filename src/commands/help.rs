//! `difflora help`: the options of a command, or a guide.

use anyhow::Result;

use crate::commands::output;
use crate::failure::Failure;
use crate::guides::GUIDES;

/// Arguments of `difflora help`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A command, such as `gen` or `lora merge`, or a guide. Without it, commands and guides are listed.
    #[arg(value_name = "COMMAND|TOPIC")]
    name: Vec<String>,
}

/// Prints help; `root` is the whole command line.
///
/// # Errors
/// [`Failure::Usage`] for a name that is neither a command nor a guide, with the nearest ones.
pub fn run(args: &Args, mut root: clap::Command) -> Result<()> {
    root.build();
    if args.name.is_empty() {
        return output::print(format_args!("{}", root.render_long_help()));
    }
    let topic = match &args.name[..] {
        [name] => GUIDES.iter().find(|topic| topic.name == name),
        _ => None,
    };
    let command = args.name.iter().try_fold(&mut root, |command, name| command.find_subcommand_mut(name));
    match (command, topic) {
        (None, None) => Err(unknown(&args.name.join(" "), &root).into()),
        (command, topic) => {
            if let Some(command) = command {
                output::print(format_args!("{}", command.render_long_help()))?;
            }
            topic.map_or(Ok(()), |topic| output::print(format_args!("{}", topic.plain())))
        }
    }
}

/// What `difflora --help` says below the options.
pub fn epilogue() -> String {
    let topics: String =
        GUIDES.iter().map(|topic| format!("  {:<13} {}\n", topic.name, topic.about)).collect();
    format!(
        "Guides (difflora help TOPIC):\n{topics}\n\
         Every option can be set in the environment as DIFFLORA_NAME; the command line takes precedence.\n\
         Exit codes: 0 done, 1 failed, 2 usage, 3 no face found, 4 input file unusable,\n\
         130 interrupted (Ctrl-C), 143 ended by SIGTERM, 129 by SIGHUP; training keeps its state for --resume."
    )
}

fn unknown(name: &str, root: &clap::Command) -> Failure {
    let names =
        root.get_subcommands().map(clap::Command::get_name).chain(GUIDES.iter().map(|topic| topic.name));
    let mut near: Vec<&str> = names.filter(|known| is_near(known, name)).collect();
    near.sort_unstable();
    near.dedup();
    let hint = match &near[..] {
        [] => "`difflora help` lists both".to_string(),
        near => format!("did you mean {}?", near.join(" or ")),
    };
    Failure::Usage(format!("there is no command and no guide `{name}`; {hint}"))
}

/// Whether one name contains the other, or at most a third of it differs.
fn is_near(known: &str, name: &str) -> bool {
    let name = name.to_lowercase();
    let contained = name.len() > 2 && (known.contains(&name) || name.contains(known));
    contained || strsim::levenshtein(known, &name) * 3 <= known.len().max(name.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_suggested() {
        let root = crate::cli::command();
        let hint = |name: &str| unknown(name, &root).to_string();
        assert!(hint("fases").contains("did you mean faces?"), "{}", hint("fases"));
        assert!(hint("hypernet").contains("hypernetwork"), "{}", hint("hypernet"));
        assert!(hint("quux").contains("lists both"), "{}", hint("quux"));
    }
}
