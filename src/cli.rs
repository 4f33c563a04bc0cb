//! The command line. Doc comments here and in [`crate::commands`] are the help text.

use anyhow::Result;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::commands::output::Output;
use crate::{commands, files, image, progress};

/// From one photo of a face to a personal SDXL LoRA, and images generated with it.
#[derive(Debug, Parser)]
#[command(
    name = "difflora",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = commands::help::epilogue()
)]
pub struct Cli {
    #[command(flatten)]
    /// Options of every command.
    pub output: Output,
    #[command(subcommand)]
    /// The subcommand.
    pub command: Command,
}

/// The subcommands; each has a file in `commands/`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a LoRA from photos of a person, and generate images with it.
    Gen(Box<commands::r#gen::Args>),
    /// Train a LoRA on images of one person (DreamBooth), or of many people at once.
    TrainLora(Box<commands::train_lora::Args>),
    /// Inspect, convert, merge, resize, extract, mix and compare LoRA files.
    Lora(commands::lora::Args),
    /// Detect, embed, compare, crop and group faces.
    Face(commands::face::Args),
    /// List, download, verify and measure base models.
    Models(commands::models::Args),
    /// Build the dataset of LoRAs of painted people that a hypernetwork learns from.
    BuildDataset(commands::build_dataset::Args),
    /// Train the LoRA autoencoder (LAE).
    TrainLae(commands::train_lae::Args),
    /// Train the mixer and the diffusion transformer: from a person to a LoRA.
    TrainDit(commands::train_dit::Args),
    /// Evaluate a hypernetwork on held-out people, or a base model alone.
    Eval(Box<commands::eval::Args>),
    /// Paint people of the small world.
    Portraits(commands::portraits::Args),
    /// Train a small SDXL from scratch on painted portraits.
    TrainBase(commands::train_base::Args),
    /// Train the small image encoder, or the attribute classifier.
    TrainEncoder(commands::train_encoder::Args),
    /// Check this build and this machine: features, CPU kernels, GPUs, folders, models.
    Doctor(commands::doctor::Args),
    /// Print the help of a command, or a guide.
    Help(commands::help::Args),
    /// Print a completion script for a shell.
    Completions(commands::shell::Completions),
    /// Print the manual page, or write those of all commands.
    Man(commands::shell::Man),
}

impl Command {
    /// Whether each thread works on a shard of the batch, or on a person, so that kernels must not have threads of
    /// their own.
    pub fn trains_in_shards(&self) -> bool {
        match self {
            Self::BuildDataset(_) | Self::Eval(_) | Self::TrainBase(_) | Self::TrainEncoder(_) => true,
            Self::TrainLora(args) => args.trains_in_groups(),
            Self::TrainLae(args) => args.trains_in_shards(),
            Self::TrainDit(args) => args.trains_in_shards(),
            _ => false,
        }
    }
}

/// Environment variables of earlier versions and their present names.
const RENAMED_VARIABLES: [(&str, &str); 7] = [
    ("DIFFLORA_PICTURES", "DIFFLORA_IMAGES"),
    ("DIFFLORA_STEPS_PER_PICTURE", "DIFFLORA_STEPS_PER_IMAGE"),
    ("DIFFLORA_CLASS_PICTURES", "DIFFLORA_CLASS_IMAGES"),
    ("DIFFLORA_NUM_CLASS_PICTURES", "DIFFLORA_NUM_CLASS_IMAGES"),
    ("DIFFLORA_WHOLE_PICTURE", "DIFFLORA_WHOLE_IMAGE"),
    ("DIFFLORA_SIGNAL", "DIFFLORA_REPEATABILITY"),
    ("DIFFLORA_SIGNAL_ONLY", "DIFFLORA_REPEATABILITY_ONLY"),
];

/// Brings the environment into its present form: variables that are set under an old name get their new one, unless
/// that is set too, and empty ones count as unset.
///
/// # Safety
/// No other thread may run yet: the environment is changed.
pub unsafe fn tidy_environment() {
    for (old, new) in RENAMED_VARIABLES {
        if let (Some(value), None) = (std::env::var_os(old), std::env::var_os(new)) {
            // SAFETY: the caller promises that no other thread reads the environment meanwhile.
            unsafe { std::env::set_var(new, value) };
        }
    }
    for (name, value) in std::env::vars_os() {
        let ours = name.to_str().is_some_and(|name| name.starts_with("DIFFLORA_") || name.starts_with("HF_"));
        if ours && value.is_empty() {
            // SAFETY: likewise.
            unsafe { std::env::remove_var(name) };
        }
    }
}

impl Cli {
    /// Reads the process's arguments; exits after `--help`, `--version` and usage errors.
    pub fn read() -> Self {
        match command().try_get_matches().and_then(|matches| Self::from_arg_matches(&matches)) {
            Ok(cli) => cli,
            Err(error) => {
                if let Some(origin) = origin(&error) {
                    eprintln!("note: {origin}");
                }
                error.exit()
            }
        }
    }
}

/// Where a refused value comes from, if clap does not say: a variable of the environment, or an argument that is not UTF-8.
fn origin(error: &clap::Error) -> Option<String> {
    if error.kind() == ErrorKind::InvalidUtf8 {
        let odd = std::env::args_os().find(|argument| argument.to_str().is_none())?;
        return Some(format!("{odd:?} is not UTF-8, which only options that name nothing but a file take"));
    }
    let (Some(ContextValue::String(option)), Some(ContextValue::String(value))) =
        (error.get(ContextKind::InvalidArg), error.get(ContextKind::InvalidValue))
    else {
        return None;
    };
    let long = option.strip_prefix("--")?.split(' ').next()?;
    let given = |argument: std::ffi::OsString| {
        let argument = argument.to_string_lossy().into_owned();
        argument.strip_prefix("--").is_some_and(|rest| rest == long || rest.starts_with(&format!("{long}=")))
    };
    if std::env::args_os().any(given) {
        return None;
    }
    fn variables(command: &clap::Command, long: &str) -> Vec<String> {
        let own = command.get_arguments().filter(|arg| arg.get_long() == Some(long));
        let own = own.filter_map(|arg| Some(arg.get_env()?.to_string_lossy().into_owned()));
        own.chain(command.get_subcommands().flat_map(|inner| variables(inner, long))).collect()
    }
    let is_it = |name: &String| std::env::var(name).is_ok_and(|set| set == *value);
    let name = variables(&command(), long).into_iter().find(is_it)?;
    Some(format!("the value is that of the environment variable {name}"))
}

/// The command line. Its help omits the environment variables: their names follow from those of the options.
pub fn command() -> clap::Command {
    fn hide_variables(command: clap::Command) -> clap::Command {
        command.mut_args(|arg| switch(arg).hide_env(true)).mut_subcommands(hide_variables)
    }
    // Variables of switches are 1 or 0, true or false, yes or no, on or off.
    fn switch(arg: clap::Arg) -> clap::Arg {
        match arg.get_action() {
            clap::ArgAction::SetTrue => arg.value_parser(clap::builder::BoolishValueParser::new()),
            _ => arg,
        }
    }
    hide_variables(Cli::command())
}

/// Runs the command that was asked for.
pub fn run(cli: Cli) -> Result<()> {
    progress::set_quiet(cli.output.quiet);
    progress::set_verbose(cli.output.verbose);
    files::set_overwrite(cli.output.overwrite);
    image::set_max_megapixels(cli.output.max_megapixels);
    progress::catch_interrupts()?;
    match cli.command {
        Command::Gen(args) => commands::r#gen::run(*args, &cli.output),
        Command::TrainLora(args) => commands::train_lora::run(*args, &cli.output),
        Command::Lora(args) => commands::lora::run(args, &cli.output),
        Command::Face(args) => commands::face::run(args, &cli.output),
        Command::Models(args) => commands::models::run(args, &cli.output),
        Command::BuildDataset(args) => commands::build_dataset::run(args, &cli.output),
        Command::TrainLae(args) => commands::train_lae::run(args, &cli.output),
        Command::TrainDit(args) => commands::train_dit::run(args, &cli.output),
        Command::Eval(args) => commands::eval::run(*args, &cli.output),
        Command::Portraits(args) => commands::portraits::run(args, &cli.output),
        Command::TrainBase(args) => commands::train_base::run(args, &cli.output),
        Command::TrainEncoder(args) => commands::train_encoder::run(args, &cli.output),
        Command::Doctor(args) => commands::doctor::run(&args, &cli.output),
        Command::Help(args) => commands::help::run(&args, command()),
        Command::Completions(args) => commands::shell::completions(&args, command()),
        Command::Man(args) => commands::shell::man(&args, command()),
    }
}
