//! The program as a user runs it: arguments in, exit code, stdout and stderr out.

mod drawing;
mod face;
mod lora;

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
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_difflora")).args(arguments).output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
