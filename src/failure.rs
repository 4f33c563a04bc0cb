//! Failures that a script can tell apart by the exit code.

use std::process::ExitCode;

/// A failure with an exit code of its own; every other error exits with 1.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line asks for something that cannot be (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// No face was found in an image that needs one (exit code 3).
    #[error("{0}")]
    NoFace(String),
    /// An input file cannot be used: missing, truncated, of another kind or shape (exit code 4).
    #[error("{0}")]
    Unusable(String),
    /// A signal of this number asked the program to end: 2 for Ctrl-C (exit code 130), 15 for SIGTERM (143), 1 for
    /// SIGHUP (129).
    #[error(
        "interrupted{}{}",
        match .signal { 15 => " by SIGTERM", 1 => " by SIGHUP", _ => "" },
        .hint.as_deref().map(|hint| format!("; {hint}")).unwrap_or_default()
    )]
    Interrupted {
        /// Its number.
        signal: u8,
        /// What is kept, and how to continue.
        hint: Option<String>,
    },
}

impl Failure {
    /// The process exit code that stands for `error`, which may carry a [`Failure`] anywhere in its chain.
    pub fn exit_code(error: &anyhow::Error) -> ExitCode {
        let code = match error.chain().find_map(|cause| cause.downcast_ref::<Failure>()) {
            Some(Failure::Usage(_)) => 2,
            Some(Failure::NoFace(_)) => 3,
            Some(Failure::Unusable(_)) => 4,
            Some(Failure::Interrupted { signal, .. }) => 128 + signal,
            None => 1,
        };
        ExitCode::from(code)
    }

    /// `error` with a hint how to continue, where it is an interruption without one.
    pub fn with_hint(error: anyhow::Error, hint: &str) -> anyhow::Error {
        match error.downcast_ref() {
            Some(Self::Interrupted { signal, hint: None }) => {
                Self::Interrupted { signal: *signal, hint: Some(hint.into()) }.into()
            }
            _ => error,
        }
    }

    /// An input file that cannot be used, as an error: `cannot use PATH: why`.
    pub fn unusable(path: &std::path::Path, why: impl std::fmt::Display) -> anyhow::Error {
        Failure::Unusable(format!("cannot use `{}`: {why}", path.display())).into()
    }
}
