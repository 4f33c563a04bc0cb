//! The whole state of a run in one file: weights, moments and averages as safetensors, and in its metadata the
//! step and the settings.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::Failure;
use crate::files;
use crate::weights;

/// A state that was read back.
pub struct Checkpoint {
    /// Steps made.
    pub step: u64,
    tensors: HashMap<String, Tensor>,
}

/// The metadata entry `training`.
#[derive(Serialize, Deserialize)]
struct Header {
    step: u64,
    settings: Value,
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
    let header = serde_json::to_string(&Header { step, settings: serde_json::to_value(settings)? })?;
    let tensors: BTreeMap<String, &Tensor> = parts
        .iter()
        .flat_map(|(part, tensors)| {
            tensors.iter().map(move |(name, tensor)| (format!("{part}/{name}"), tensor))
        })
        .collect();
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
    let bytes = std::fs::read(path).map_err(|error| Failure::unusable(path, error))?;
    let header = header(&bytes).map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
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

fn header(bytes: &[u8]) -> Result<Header> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).context("not a readable safetensors file")?;
    let text =
        metadata.metadata().as_ref().and_then(|map| map.get(KEY)).context("no state of a training run")?;
    serde_json::from_str(text).context("the state of the run is damaged")
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
