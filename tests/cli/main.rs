//! The program as a user runs it: arguments in, exit code, stdout and stderr out.

mod drawing;
mod face;
mod identity;
mod lora;
mod models;
mod train_lora;

/// What a run of the program left behind.
pub struct Run {
    /// Exit code; −1 when a signal ended it.
    pub code: i32,
    /// Results.
    pub stdout: String,
    /// Progress, notes and errors.
    pub stderr: String,
}

/// Runs the program in the repository's folder.
pub fn difflora(arguments: &[&str]) -> Run {
    difflora_with(&[], arguments)
}

/// Runs it with variables in the environment.
pub fn difflora_with(environment: &[(&str, &str)], arguments: &[&str]) -> Run {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_difflora"));
    let output = command.args(arguments).envs(environment.iter().copied()).output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
