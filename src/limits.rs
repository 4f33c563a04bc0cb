//! Bounds of the numbers in settings files and model configs, checked before anything is built or allocated from them.
//!
//! Each bound stands in one table by the number's key. They are far above what any model or training uses, and far
//! below what exhausts memory or overflows.

use std::path::Path;

use anyhow::Result;
use serde::de::DeserializeOwned;

use crate::failure::Failure;
use crate::files;

/// The largest settings file that is read, in bytes.
pub const MAX_SETTINGS: u64 = 1 << 20;

/// Bounds of numbers without an entry in [`BOUNDS`].
const OTHERS: (f64, f64) = (-1e9, 1e9);

/// Key, or `parent.key`, with the least and the greatest value.
const BOUNDS: [(&str, f64, f64); 108] = [
    // Seeds use all of u64.
    ("seed", 0.0, u64::MAX as f64),
    // Networks.
    ("addition_time_embed_dim", 2.0, 65_536.0),
    ("attention_head_dim", 1.0, 4096.0),
    ("block_out_channels", 1.0, 65_536.0),
    ("channels", 1.0, 65_536.0),
    ("clusters", 0.0, 65_536.0),
    ("components", 1.0, 65_536.0),
    ("cross_attention_dim", 1.0, 65_536.0),
    ("dense", 1.0, 1e6),
    ("depth", 1.0, 256.0),
    ("fold", 1.0, 65_536.0),
    ("group", 1.0, 65_536.0),
    ("heads", 1.0, 1024.0),
    ("hidden", 1.0, 65_536.0),
    ("hidden_size", 1.0, 65_536.0),
    ("image_size", 1.0, 8192.0),
    ("in_channels", 1.0, 4096.0),
    ("input", 1.0, 1e9),
    ("intermediate_size", 1.0, 1e6),
    ("kernel", 0.0, 65_536.0),
    ("latent", 1.0, 1e7),
    ("latent_channels", 1.0, 4096.0),
    ("layer_norm_eps", 0.0, 1.0),
    ("layers_per_block", 1.0, 64.0),
    ("max_position_embeddings", 2.0, 65_536.0),
    ("norm_eps", 0.0, 1.0),
    ("norm_num_groups", 1.0, 65_536.0),
    ("num_attention_heads", 1.0, 4096.0),
    ("num_channels", 1.0, 4096.0),
    ("num_hidden_layers", 1.0, 256.0),
    ("out", 1.0, 1e8),
    ("out_channels", 1.0, 4096.0),
    ("patch", 1.0, 1e7),
    ("patch_size", 1.0, 1024.0),
    ("projection_class_embeddings_input_dim", 1.0, 1e6),
    ("projection_dim", 1.0, 65_536.0),
    ("rank", 1.0, 4096.0),
    ("reverse_transformer_layers_per_block", 0.0, 256.0),
    ("sample_size", 1.0, 8192.0),
    ("scaling_factor", 1e-6, 1e6),
    ("stride", 1.0, 65_536.0),
    ("time_cond_proj_dim", 1.0, 65_536.0),
    ("token", 1.0, 1e7),
    ("transformer_layers_per_block", 0.0, 256.0),
    ("vocab_size", 1.0, 1e7),
    ("width", 1.0, 16_384.0),
    // Schedules.
    ("beta_end", 0.0, 1.0),
    ("beta_start", 0.0, 1.0),
    ("num_train_timesteps", 2.0, 100_000.0),
    ("original_inference_steps", 1.0, 100_000.0),
    ("steps_offset", 0.0, 100_000.0),
    ("timestep_scaling", 1e-6, 1e6),
    // Sampling.
    ("dit.steps", 1.0, 1000.0),
    ("samples.steps", 1.0, 1000.0),
    ("guidance", -1e6, 1e6),
    // Training.
    ("accumulate", 1.0, 1024.0),
    ("alpha", 1e-9, 1e9),
    ("average_last", 0.0, 1.0),
    ("batch", 1.0, 65_536.0),
    ("betas", 0.0, 1.0),
    ("checkpoint_every", 1.0, 1e9),
    ("clip", 0.0, 1e9),
    ("colour", 0.0, 1.0),
    ("condition_noise", 0.0, 1e3),
    ("drop", 0.0, 1.0),
    ("edges", 0.0, 1e6),
    ("ema", 0.0, 1.0),
    ("embedding_scale", 0.0, 1e6),
    ("empty", 0.0, 1.0),
    ("eps", 0.0, 1.0),
    ("every", 0.0, 1e9),
    ("features", 0.0, 1e6),
    ("floor", 0.0, 1.0),
    ("folds", 1.0, 1000.0),
    ("full_captions", 0.0, 1.0),
    ("head", 0.0, 1e6),
    ("latent_noise", 0.0, 1e3),
    ("loss_scale", 1e-9, 1e9),
    ("lr", 0.0, 1e3),
    ("min_snr_gamma", 0.0, 1e6),
    ("momentum", 0.0, 1.0),
    ("noise", 0.0, 1e3),
    ("noise_candidates", 1.0, 1024.0),
    ("noise_offset", -1e3, 1e3),
    ("patience", 0.0, 1e9),
    ("peak", 0.0, 1e3),
    ("penalties", 0.0, 1e9),
    ("prior_weight", 0.0, 1e6),
    ("randomise", 0.0, 1.0),
    ("rate", 0.0, 1e3),
    ("share", 0.0, 1.0),
    ("shards", 1.0, 4096.0),
    ("sheet_every", 1.0, 1e9),
    ("steps", 0.0, 1e9),
    ("steps_per_image", 0.0, 1e6),
    ("steps_per_picture", 0.0, 1e6),
    ("text_encoder_lr", 0.0, 1e3),
    ("timestep_power", 0.0, 1e3),
    ("velocity_floor", 0.0, 1e3),
    ("warmup", 0.0, 1e9),
    ("weight_decay", 0.0, 1e3),
    ("weight_preserved", 0.0, 1e6),
    // Images and people.
    ("class_images", 0.0, 1e6),
    ("class_pictures", 0.0, 1e6),
    ("resolution", 0.0, 8192.0),
    ("scenes", 1.0, 4096.0),
    ("size", 8.0, 1024.0),
    ("references", 0.0, 4096.0),
];

/// Lists with an entry for each level of a network. An image is halved from one to the next.
const LISTS_OF_LEVELS: [&str; 3] = ["block_out_channels", "down_block_types", "up_block_types"];

/// The most levels of a network.
const MAX_LEVELS: usize = 16;

/// Bounds of numbers of people and of their images, which have keys that other tables use too.
const POPULATIONS: [(&str, f64, f64); 13] = [
    ("basis.people", 1.0, 65_536.0),
    ("images.people", 1.0, 1e6),
    ("images.each", 1.0, 1000.0),
    ("people.train", 1.0, 1e7),
    ("people.held_out", 0.0, 1e7),
    ("first", 0.0, 1e9),
    ("functional.people", 1.0, 65_536.0),
    ("functional.images", 1.0, 4096.0),
    ("functional.pictures", 1.0, 4096.0),
    ("recipe.steps", 1.0, 1e9),
    ("crop_size", 1.0, 8192.0),
    ("shortest_edge", 1.0, 8192.0),
    ("people_per_batch", 1.0, 1024.0),
];

/// Bytes of memory that this process can have: the least of the machine's, the control group's, and the limit on address
/// space (`ulimit -v`). A TiB where the system tells none of them.
pub fn memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str, at: usize| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().nth(at)?.parse().ok())
    };
    let machine = field(&read("/proc/meminfo"), "MemTotal:", 0).map(|kib| kib << 10);
    let address_space = field(&read("/proc/self/limits"), "Max address space", 0);
    let groups = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let groups = groups.into_iter().filter_map(|path| read(path).trim().parse().ok());
    machine.into_iter().chain(address_space).chain(groups).min().unwrap_or(1 << 40)
}

/// Refuses what needs more memory than this process can have, before any of it is taken: `factors` multiply to bytes.
/// Single numbers have bounds; several large ones together are refused here.
///
/// # Errors
/// [`Failure::Usage`] with what needs it, how much, and the settings to lower.
pub fn require_memory(what: &str, factors: &[usize], lower: &str) -> Result<()> {
    let (needed, most) = (factors.iter().map(|factor| *factor as f64).product::<f64>(), memory() as f64);
    if needed <= most {
        return Ok(());
    }
    let gb = |bytes: f64| bytes / 1e9;
    let why = format!(
        "{what} need {:.0} GB of memory, and this process can have {:.0} GB; lower {lower}",
        gb(needed),
        gb(most)
    );
    Err(Failure::Usage(why).into())
}

/// A number of JSON or TOML, or what holds numbers.
trait Tree: Sized {
    /// Its value; infinite or NaN where it is not finite.
    fn number(&self) -> Option<f64>;
    /// What is inside, with keys; items of a list have none.
    fn inside(&self) -> Vec<(Option<&str>, &Self)>;
}

impl Tree for serde_json::Value {
    fn number(&self) -> Option<f64> {
        self.as_f64()
    }

    fn inside(&self) -> Vec<(Option<&str>, &Self)> {
        match self {
            Self::Array(items) => items.iter().map(|item| (None, item)).collect(),
            Self::Object(items) => items.iter().map(|(key, item)| (Some(key.as_str()), item)).collect(),
            _ => Vec::new(),
        }
    }
}

impl Tree for toml::Value {
    fn number(&self) -> Option<f64> {
        self.as_float().or_else(|| self.as_integer().map(|number| number as f64))
    }

    fn inside(&self) -> Vec<(Option<&str>, &Self)> {
        match self {
            Self::Array(items) => items.iter().map(|item| (None, item)).collect(),
            Self::Table(items) => items.iter().map(|(key, item)| (Some(key.as_str()), item)).collect(),
            _ => Vec::new(),
        }
    }
}

/// Checks every number inside `tree`, which stands at `place`.
fn check(tree: &impl Tree, place: &mut Vec<String>) -> Result<(), String> {
    if let Some(number) = tree.number() {
        let (least, most) = bounds(place);
        if number.is_finite() && (least..=most).contains(&number) {
            return Ok(());
        }
        return Err(format!("`{}` is {number}; it goes from {least} to {most}", place.join(".")));
    }
    let (inside, levels) =
        (tree.inside(), LISTS_OF_LEVELS.iter().any(|key| place.last().is_some_and(|at| at == key)));
    if levels && inside.len() > MAX_LEVELS {
        let (name, count) = (place.join("."), inside.len());
        return Err(format!(
            "`{name}` has {count} entries; networks of at most {MAX_LEVELS} levels are built"
        ));
    }
    for (key, item) in inside {
        place.extend(key.map(String::from));
        check(item, place)?;
        if key.is_some() {
            place.pop();
        }
    }
    Ok(())
}

/// The least and the greatest value of the number at `place`: by its key and the one above, else by its key.
fn bounds(place: &[String]) -> (f64, f64) {
    let key = place.last().map_or("", String::as_str);
    let two = place.len().checked_sub(2).map(|at| format!("{}.{key}", place[at]));
    let find = |wanted: &str| {
        let entry = BOUNDS.iter().chain(&POPULATIONS).find(|(key, ..)| *key == wanted);
        entry.map(|(_, least, most)| (*least, *most))
    };
    two.and_then(|two| find(&two)).or_else(|| find(key)).unwrap_or(OTHERS)
}

/// Checks every number of a JSON config.
///
/// # Errors
/// The first that is out of its bounds, with its key and these.
pub fn check_json(value: &serde_json::Value) -> Result<(), String> {
    check(value, &mut Vec::new())
}

/// Checks every number of TOML settings.
///
/// # Errors
/// As [`check_json`]; NaN and infinity too, which TOML can write.
pub fn check_toml(table: &toml::Table) -> Result<(), String> {
    check(&toml::Value::Table(table.clone()), &mut Vec::new())
}

/// Reads a settings file.
///
/// # Errors
/// [`Failure::Unusable`] with the file and the line or the key: missing, a device or a pipe, over [`MAX_SETTINGS`],
/// not TOML, unknown keys, numbers out of bounds.
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = files::read_text(path, MAX_SETTINGS)?;
    let table = toml::from_str(&text).map_err(|error| Failure::unusable(path, error))?;
    check_toml(&table).map_err(|why| Failure::unusable(path, why))?;
    toml::from_str(&text).map_err(|error| Failure::unusable(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_bounds_are_named_by_their_place() {
        let refused = |text: &str| check_toml(&toml::from_str(text).unwrap()).unwrap_err();
        assert_eq!(refused("[lae.plan]\nbatch = 0"), "`lae.plan.batch` is 0; it goes from 1 to 65536");
        assert!(refused("[basis]\npeople = 0").starts_with("`basis.people` is 0"));
        assert!(refused("[a]\nunknown = nan").contains("NaN"));
        assert!(refused("[a]\nunknown = [1, -inf]").contains("-inf"));
        assert!(
            check_toml(&toml::from_str("seed = 9223372036854775807\n[people]\nseed = 1").unwrap()).is_ok()
        );
        let config = serde_json::json!({ "transformer_layers_per_block": [[1, 2], [3, 1_000_000_000]] });
        assert!(check_json(&config).unwrap_err().contains("transformer_layers_per_block"));
        let config = serde_json::json!({ "block_out_channels": vec![4; 100] });
        assert!(check_json(&config).unwrap_err().contains("100 entries"));
    }

    #[test]
    fn products_beyond_memory_are_refused() {
        assert!(memory() > 1 << 28);
        assert!(require_memory("images", &[1000, 64, 64, 3, 4], "`people`").is_ok());
        let error = require_memory("images", &[1 << 20, 1 << 20, 1 << 20, 1 << 20], "`people`").unwrap_err();
        assert!(error.to_string().contains("images need 1208925819614629 GB"), "{error}");
        assert!(error.to_string().ends_with("lower `people`"), "{error}");
    }

    #[test]
    fn every_key_has_one_bound() {
        let keys: std::collections::BTreeSet<_> =
            BOUNDS.iter().chain(&POPULATIONS).map(|(key, ..)| key).collect();
        assert_eq!(keys.len(), BOUNDS.len() + POPULATIONS.len());
    }
}
