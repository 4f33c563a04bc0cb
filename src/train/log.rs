//! The course of a run as a file of JSON lines, one a step that is reported.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::files;
use crate::progress;

/// An open log.
pub struct Log {
    /// None where another process of the group writes.
    file: Option<File>,
    /// The last line was not written, or in part.
    torn: bool,
}

impl Log {
    /// Opens `path` for a run that continues after `step`; lines of later steps, left by a run that was killed
    /// after its last checkpoint, are dropped.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if !crate::train::distributed::is_main_process() {
            return Ok(Self { file: None, torn: false });
        }
        let open = || -> Result<File> {
            let mut kept = String::new();
            if path.exists() && step > 0 {
                for line in BufReader::new(File::open(path)?).lines() {
                    let line = line?;
                    let value: Option<Value> = serde_json::from_str(&line).ok();
                    if value.and_then(|value| value.get("step")?.as_u64()).is_some_and(|of| of <= step) {
                        kept.push_str(&line);
                        kept.push('\n');
                    }
                }
            }
            files::write_whole(path, kept.as_bytes())?;
            Ok(OpenOptions::new().append(true).open(path)?)
        };
        let file = open().with_context(|| format!("cannot open the log `{}`", path.display()))?;
        Ok(Self { file: Some(file), torn: false })
    }

    /// Adds `{"step": step, name: value, …}`. A line that cannot be written, on a full disk, is lost with a warning:
    /// the run matters more.
    pub fn write(&mut self, step: u64, figures: &[(&str, f64)]) {
        let Some(file) = &mut self.file else { return };
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        for (name, value) in figures {
            // Six digits tell everything that a curve can show.
            line.insert((*name).into(), format!("{value:.6e}").parse::<f64>().unwrap_or(f64::NAN).into());
        }
        let start = if self.torn { "\n" } else { "" };
        let written = writeln!(file, "{start}{}", Value::Object(line));
        if let (Err(error), false) = (&written, self.torn) {
            progress::warn(format_args!("cannot write the log: {error}; training continues"));
        }
        self.torn = written.is_err();
    }
}
