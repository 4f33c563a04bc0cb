//! The `difflora` program: parse, run, report.

use std::process::ExitCode;

use difflora::cli;
use difflora::device;
use difflora::failure::Failure;
use difflora::layers;
use difflora::progress;
use difflora::train;

fn main() -> ExitCode {
    layers::keep_freed_memory();
    // SAFETY: no thread has been started yet.
    unsafe { layers::let_waiting_threads_sleep() };
    // SAFETY: likewise.
    unsafe { cli::tidy_environment() };
    let cli = cli::Cli::read();
    if cli.command.trains_in_shards() {
        // SAFETY: likewise.
        unsafe { train::single_threaded_kernels() };
    }
    match cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = device::explained(error);
            progress::error(&error);
            Failure::exit_code(&error)
        }
    }
}
