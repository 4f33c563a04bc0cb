//! `difflora completions` and `difflora man`: shell completion and manual pages.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::commands::output;
use crate::files;

/// Arguments of `difflora completions`.
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// Shell.
    shell: clap_complete::Shell,
}

/// Prints the script that completes commands and options.
pub fn completions(args: &Completions, mut root: clap::Command) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut root, "difflora", &mut script);
    output::print(format_args!("{}", String::from_utf8(script)?))
}

/// Arguments of `difflora man`.
#[derive(Debug, clap::Args)]
pub struct Man {
    /// Folder to write the pages of all commands into [default: print the program's page].
    #[arg(long, value_name = "DIR", env = "DIFFLORA_OUT")]
    out: Option<PathBuf>,
}

/// Prints the manual page, or writes those of all commands.
pub fn man(args: &Man, mut command: clap::Command) -> Result<()> {
    command.build();
    match &args.out {
        Some(folder) => pages(&command, folder),
        None => output::print(format_args!("{}", page(&command)?)),
    }
}

/// `difflora.1`, `difflora-gen.1`, `difflora-lora-merge.1`, …
fn pages(command: &clap::Command, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
    let name = command.get_display_name().unwrap_or(command.get_name());
    files::write_whole(&folder.join(format!("{name}.1")), page(command)?.as_bytes())?;
    command
        .get_subcommands()
        .filter(|part| part.get_name() != "help")
        .try_for_each(|part| pages(part, folder))
}

fn page(command: &clap::Command) -> Result<String> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut text)?;
    Ok(String::from_utf8(text)?)
}
