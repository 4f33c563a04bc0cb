//! `difflora help`: the options of a command, or a guide.

use anyhow::Result;

use crate::failure::Failure;
use crate::output;

/// A guide that is also module documentation.
struct Topic {
    name: &'static str,
    about: &'static str,
    text: &'static str,
}

static TOPICS: [Topic; 7] = [
    Topic {
        name: "generate",
        about: "LoRAs from photos, images from prompts, precision and memory",
        text: include_str!("../docs/generate.md"),
    },
    Topic {
        name: "lora-files",
        about: "LoRA formats, weights by part, merging and the tools",
        text: include_str!("../docs/lora-files.md"),
    },
    Topic {
        name: "faces",
        about: "reference photos, face encoders and their licences",
        text: include_str!("../docs/faces.md"),
    },
    Topic {
        name: "train-lora",
        about: "DreamBooth training, settings, many people at once",
        text: include_str!("../docs/train-lora.md"),
    },
    Topic {
        name: "hypernetwork",
        about: "the dataset of LoRAs, autoencoder, transformer, evaluation",
        text: include_str!("../docs/hypernetwork.md"),
    },
    Topic {
        name: "small-world",
        about: "the built-in models and how they were made",
        text: include_str!("../docs/small-world.md"),
    },
    Topic {
        name: "install",
        about: "cargo features, completions, folders and variables",
        text: include_str!("../docs/install.md"),
    },
];

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
        [name] => TOPICS.iter().find(|topic| topic.name == name),
        _ => None,
    };
    let command = args.name.iter().try_fold(&mut root, |command, name| command.find_subcommand_mut(name));
    match (command, topic) {
        (None, None) => Err(unknown(&args.name.join(" "), &root).into()),
        (command, topic) => {
            if let Some(command) = command {
                output::print(format_args!("{}", command.render_long_help()))?;
            }
            topic.map_or(Ok(()), |topic| output::print(format_args!("{}", plain(topic.text))))
        }
    }
}

/// What `difflora --help` says below the options.
pub fn epilogue() -> String {
    let topics: String =
        TOPICS.iter().map(|topic| format!("  {:<13} {}\n", topic.name, topic.about)).collect();
    format!(
        "Guides (difflora help TOPIC):\n{topics}\n\
         Every option can be set in the environment as DIFFLORA_NAME; the command line takes precedence.\n\
         Exit codes: 0 done, 1 failed, 2 usage, 3 no face found, 4 input file unusable,\n\
         130 interrupted (Ctrl-C), 143 ended by SIGTERM, 129 by SIGHUP; training keeps its state for --resume."
    )
}

/// Markdown without the marks around code blocks, which are indented instead.
fn plain(markdown: &str) -> String {
    let mut code = false;
    let mut text = String::with_capacity(markdown.len());
    for line in markdown.lines() {
        if line.starts_with("```") {
            code = !code;
        } else if code && !line.is_empty() {
            text.extend(["    ", line, "\n"]);
        } else {
            text.extend([line, "\n"]);
        }
    }
    text
}

fn unknown(name: &str, root: &clap::Command) -> Failure {
    let names =
        root.get_subcommands().map(clap::Command::get_name).chain(TOPICS.iter().map(|topic| topic.name));
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
    contained || edit_distance(known, &name) * 3 <= known.len().max(name.len())
}

/// Levenshtein distance in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != y)).min(above.min(row[j]) + 1);
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_suggested() {
        assert_eq!((edit_distance("faces", "fcaes"), edit_distance("gen", "")), (2, 3));
        let root = crate::cli::command();
        let hint = |name: &str| unknown(name, &root).to_string();
        assert!(hint("fases").contains("did you mean faces?"), "{}", hint("fases"));
        assert!(hint("hypernet").contains("hypernetwork"), "{}", hint("hypernet"));
        assert!(hint("quux").contains("lists both"), "{}", hint("quux"));
    }

    #[test]
    fn guides_have_a_title_and_no_measurements_in_tables_of_numbers() {
        for topic in &TOPICS {
            assert!(topic.text.starts_with("# "), "{}", topic.name);
            assert!(
                !topic.text.contains(" ± "),
                "{}: measurements belong into tests/bench/RESULTS.md",
                topic.name
            );
        }
    }
}
