//! The whole state of a run in one file: weights, moments and averages as safetensors, and in its metadata the
//! step and the settings.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::Tensor;
use safetensors::SafeTensors;
use safetensors::tensor::View;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::files;
use crate::weights;

/// Refuses `--resume` where there is none of these files to continue from.
///
/// # Errors
/// [`Failure::Usage`] with the first of them.
pub fn require_any(files: &[PathBuf]) -> Result<()> {
    match files.first() {
        Some(first) if !files.iter().any(|file| file.exists()) => Err(Failure::Usage(format!(
            "--resume: there is no state `{}`; check --out, or start anew without --resume",
            first.display()
        ))
        .into()),
        _ => Ok(()),
    }
}

/// A state that was read back.
pub struct Checkpoint {
    /// Steps made.
    pub step: u64,
    tensors: HashMap<String, Tensor>,
}

/// The metadata entry `training`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    step: u64,
    settings: Value,
    /// [`checksum`] of the file; older ones have none.
    #[serde(default)]
    sha256: Option<String>,
}

const KEY: &str = "training";

/// Writes the state after `step` steps; `parts` are groups of tensors, each with a name of its own.
///
/// The old file stays readable until the new one is whole. Of a process(crate::train::distributed) group only the first
/// process writes; all read.
pub fn save<S: Serialize>(
    path: &Path,
    step: u64,
    settings: &S,
    parts: &[(&str, BTreeMap<String, Tensor>)],
) -> Result<()> {
    if !crate::train::distributed::is_main_process() {
        return Ok(());
    }
    let tensors: BTreeMap<String, &Tensor> = parts
        .iter()
        .flat_map(|(part, tensors)| {
            tensors.iter().map(move |(name, tensor)| (format!("{part}/{name}"), tensor))
        })
        .collect();
    let settings = serde_json::to_value(settings)?;
    // As they are read back: the last digit of a float may change once.
    let read: Value = serde_json::from_str(&settings.to_string())?;
    let sha256 = checksum(step, &read, tensors.iter().map(|(name, tensor)| (name.as_str(), *tensor)));
    let header = serde_json::to_string(&Header { step, settings, sha256: Some(sha256) })?;
    // Tensor by tensor: a state is several times as large as its network.
    files::write_at(path, |beside| {
        Ok(safetensors::serialize_to_file(tensors, Some(HashMap::from([(KEY.to_string(), header)])), beside)?)
    })
}

/// Reads a state that was saved with the same settings.
///
/// # Errors
/// [`Failure::Unusable`] when the file is missing or damaged; [`Failure::Usage`] when its settings differ, with a
/// list of the differences.
pub fn load<S: Serialize>(path: &Path, settings: &S) -> Result<Checkpoint> {
    let bytes = files::read_input(path, u64::MAX)?;
    let header = header(&bytes).map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
    let stored = SafeTensors::deserialize(&bytes).map_err(|error| Failure::unusable(path, damaged(error)))?;
    let mut views = stored.tensors();
    views.sort_by(|(one, _), (other, _)| one.cmp(other));
    let found =
        checksum(header.step, &header.settings, views.iter().map(|(name, view)| (name.as_str(), view)));
    if header.sha256.is_some_and(|wanted| wanted != found) {
        return Err(Failure::unusable(path, damaged("its checksum does not match its contents")));
    }
    let mut differences = Vec::new();
    compare("", &header.settings, &serde_json::to_value(settings)?, &mut differences);
    if !differences.is_empty() {
        return Err(Failure::Usage(format!(
            "`{}` was made with other settings; start anew or set back:\n  {}",
            path.display(),
            differences.join("\n  ")
        ))
        .into());
    }
    let tensors =
        weights::read_bytes(&bytes).map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
    Ok(Checkpoint { step: header.step, tensors })
}

/// What a damaged state means for the user.
fn damaged(why: impl std::fmt::Display) -> String {
    format!("it is damaged or cut off ({why}); restore it from a copy, or start anew without --resume")
}

/// SHA-256 of step, settings, and the tensors in the order of their names: name, type, shape and values.
fn checksum<'a>(step: u64, settings: &Value, tensors: impl Iterator<Item = (&'a str, impl View)>) -> String {
    let mut hash = Sha256::new();
    hash.update(step.to_le_bytes());
    hash.update(settings.to_string());
    for (name, tensor) in tensors {
        hash.update(format!("{name} {:?} {:?} ", tensor.dtype(), tensor.shape()));
        hash.update(tensor.data());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn header(bytes: &[u8]) -> Result<Header> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| anyhow::anyhow!(damaged(error)))?;
    let text =
        metadata.metadata().as_ref().and_then(|map| map.get(KEY)).context("no state of a training run")?;
    serde_json::from_str(text).map_err(|error| anyhow::anyhow!(damaged(error)))
}

impl Checkpoint {
    /// The tensors of one group.
    pub fn part(&self, part: &str) -> HashMap<String, Tensor> {
        let prefix = format!("{part}/");
        let own = |(name, tensor): (&String, &Tensor)| {
            Some((name.strip_prefix(&prefix)?.to_string(), tensor.clone()))
        };
        self.tensors.iter().filter_map(own).collect()
    }
}

/// Adds a line for each leaf in which two settings differ: `unet.lr: 0.1, now 0.2`.
fn compare(place: &str, before: &Value, now: &Value, differences: &mut Vec<String>) {
    if let (Value::Object(before), Value::Object(now)) = (before, now) {
        let names: std::collections::BTreeSet<_> = before.keys().chain(now.keys()).collect();
        for name in names {
            let place = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
            let value = |map: &serde_json::Map<String, Value>| map.get(name).cloned().unwrap_or(Value::Null);
            compare(&place, &value(before), &value(now), differences);
        }
    } else if before != now {
        differences.push(format!("{place}: {before}, now {now}"));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_flipped_bit_and_a_missing_end_are_named_wherever_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.checkpoint.safetensors");
        let tensor = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        let settings = json!({ "lr": 0.1, "name": "two words" });
        let parts = [("weights", BTreeMap::from([("w".to_string(), tensor)]))];
        save(&path, 7, &settings, &parts).unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(load(&path, &settings).unwrap().step, 7);
        let refused = |bytes: &[u8], what: &str| {
            std::fs::write(&path, bytes).unwrap();
            let error = load(&path, &settings).err().unwrap_or_else(|| panic!("{what} is taken")).to_string();
            assert!(error.contains("a.checkpoint.safetensors"), "{what}: {error}");
        };
        for end in 0..whole.len() {
            refused(&whole[..end], &format!("an end at {end}"));
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            // Blanks that fill up the header carry nothing.
            if whole[at] != b' ' {
                refused(&bytes, &format!("a flipped bit at {at}"));
            }
        }
    }

    #[test]
    fn settings_with_a_float_of_32_bits_are_the_same_when_they_are_read() {
        #[derive(Serialize)]
        struct Settings {
            // JSON has it with more digits than its own.
            drop: f32,
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.checkpoint.safetensors");
        let tensor = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let parts = [("weights", BTreeMap::from([("w".to_string(), tensor)]))];
        save(&path, 3, &Settings { drop: 0.1 }, &parts).unwrap();
        assert_eq!(load(&path, &Settings { drop: 0.1 }).unwrap().step, 3);
    }
}
