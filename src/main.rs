//! The `difflora` program: parse, run, report.

use std::process::ExitCode;

use clap::Parser;
use difflora::{cli, failure::Failure};

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            Failure::exit_code(&error)
        }
    }
}
