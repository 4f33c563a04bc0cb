//! The program as a user runs it: arguments in, exit code, stdout and stderr out.

mod build_dataset;
mod doctor;
mod drawing;
mod eval;
mod face;
mod hostile_numbers;
mod hyperlora;
mod hypernet_dataset;
mod identity;
mod lora;
mod lora_dataset;
mod lora_files;
mod models;
mod options;
mod own_files;
mod prompts;
mod train_dit;
mod train_lae;
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

#[test]
fn a_reader_that_went_away_is_no_error() {
    for arguments in [&["models", "list"][..], &["models", "show", "tiny"], &["portraits", "--nonsense"]] {
        let closed = || std::io::pipe().unwrap().1;
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_difflora"));
        let code = |run: std::process::Output| (run.status.code(), String::from_utf8(run.stderr).unwrap());
        let (heard, told) = code(command.args(arguments).output().unwrap());
        assert_eq!(code(command.stdout(closed()).output().unwrap()), (heard, told));
        assert_eq!(code(command.stdout(closed()).stderr(closed()).output().unwrap()), (heard, String::new()));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn standard_output_on_a_full_disk_is_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_difflora"));
    let run = command.args(["models", "list"]).stdout(full).output().unwrap();
    let stderr = String::from_utf8(run.stderr).unwrap();
    assert_eq!(run.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: cannot write to the standard output"), "{stderr}");
}

#[test]
fn shells_and_man_know_every_command() {
    let commands =
        ["gen", "train-lora", "lora", "face", "models", "build-dataset", "train-lae", "train-dit", "eval"];
    for shell in ["bash", "zsh", "fish"] {
        let run = difflora(&["completions", shell]);
        assert!(
            run.code == 0 && commands.iter().all(|name| run.stdout.contains(name)),
            "{shell}: {}",
            run.stderr
        );
    }
    let page = difflora(&["man"]).stdout;
    assert!(page.contains(".TH difflora 1") && page.contains("Exit codes"), "{page}");
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(difflora(&["man", "--out", folder.path().to_str().unwrap()]).code, 0);
    for name in ["difflora", "difflora-gen", "difflora-lora-merge"] {
        let page = std::fs::read_to_string(folder.path().join(format!("{name}.1"))).unwrap();
        assert!(page.contains(&name.replace("difflora-", "")), "{name}");
    }
}
