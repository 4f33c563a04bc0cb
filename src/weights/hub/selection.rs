//! Which files of a repository are fetched.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS};

/// Which weights to fetch where a repository has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// The full ones, or half-precision ones where there are no others.
    Any,
    /// The half-precision ones where there are any.
    Half,
}

/// Which of the files of an SDXL repository drawing needs.
///
/// # Errors
/// The missing part.
pub(super) fn needed(files: &[String], weights: Weights) -> std::result::Result<BTreeSet<String>, String> {
    let has = |file: &str| files.iter().any(|other| other == file);
    let mut wanted = BTreeSet::new();
    let mut want = |file: String| {
        if !has(&file) {
            return Err(format!("it has no `{file}`"));
        }
        wanted.insert(file);
        Ok(())
    };
    want("model_index.json".into())
        .map_err(|lacking| format!("{lacking}, so it is no model in diffusers' layout"))?;
    want("scheduler/scheduler_config.json".into())?;
    for folder in ["tokenizer", "tokenizer_2"] {
        want(format!("{folder}/tokenizer_config.json"))?;
        if has(&format!("{folder}/tokenizer.json")) && !has(&format!("{folder}/vocab.json")) {
            want(format!("{folder}/tokenizer.json"))?;
        } else {
            want(format!("{folder}/vocab.json"))?;
            want(format!("{folder}/merges.txt"))?;
        }
    }
    let variants = match weights {
        Weights::Any => ["", ".fp16"],
        Weights::Half => [".fp16", ""],
    };
    for (folder, stem) in [
        ("unet", DIFFUSERS_WEIGHTS),
        ("vae", DIFFUSERS_WEIGHTS),
        ("text_encoder", TRANSFORMERS_WEIGHTS),
        ("text_encoder_2", TRANSFORMERS_WEIGHTS),
    ] {
        want(format!("{folder}/config.json"))?;
        let parts = variants.iter().find_map(|variant| weight_files(files, folder, stem, variant));
        let parts = parts.ok_or_else(|| {
            let pickled =
                files.iter().any(|file| file.starts_with(&format!("{folder}/")) && file.ends_with(".bin"));
            let why = if pickled { "; its `.bin` files are pickles, which are not read" } else { "" };
            format!("it has no whole `{folder}/{stem}.safetensors`{why}")
        })?;
        parts.into_iter().try_for_each(&mut want)?;
    }
    Ok(wanted)
}

/// The files of one component's weights, when all of them are there.
pub(super) fn weight_files(files: &[String], folder: &str, stem: &str, variant: &str) -> Option<Vec<String>> {
    let whole = format!("{folder}/{stem}{variant}.safetensors");
    if files.contains(&whole) {
        return Some(vec![whole]);
    }
    let index = format!("{folder}/{stem}.safetensors.index{variant}.json");
    files.contains(&index).then_some(())?;
    // diffusion_pytorch_model-00001-of-00002.safetensors, with `.fp16` before or after the numbers.
    let shard = |file: &&String| {
        let name = file.strip_prefix(&format!("{folder}/{stem}")).filter(|name| !name.contains('/'));
        name.is_some_and(|name| {
            name.contains("-of-")
                && name.ends_with(".safetensors")
                && name.contains(".fp16") != variant.is_empty()
        })
    };
    let mut shards: Vec<String> = files.iter().filter(shard).cloned().collect();
    let (_, count) = shards.first()?.split_once("-of-")?;
    let digits: String = count.chars().take_while(char::is_ascii_digit).collect();
    (digits.parse() == Ok(shards.len())).then(|| shards.push(index))?;
    Some(shards)
}

/// The files of a folder and of those in it, by their paths below it.
pub(super) fn files_of(folder: &Path) -> Vec<String> {
    let list =
        |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found = Vec::new();
    for path in list(folder) {
        let inner: Vec<PathBuf> = if path.is_dir() { list(&path).collect() } else { vec![path] };
        // Links of a cache that was cleared lead nowhere; `is_file` looks behind them.
        let inner =
            inner.iter().filter(|path| path.is_file()).filter_map(|path| path.strip_prefix(folder).ok());
        found.extend(inner.map(|path| path.to_string_lossy().replace('\\', "/")));
    }
    found
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The files of stabilityai/stable-diffusion-xl-base-1.0, in part.
    pub(in crate::weights::hub) fn listed() -> Vec<String> {
        let mut files: Vec<String> = [
            "README.md",
            "sd_xl_base_1.0.safetensors",
            "model_index.json",
            "scheduler/scheduler_config.json",
            "unet/model.onnx",
            "vae_1_0/diffusion_pytorch_model.safetensors",
        ]
        .map(String::from)
        .into();
        for folder in ["tokenizer", "tokenizer_2"] {
            for file in ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"] {
                files.push(format!("{folder}/{file}"));
            }
        }
        for (folder, stem) in [
            ("unet", DIFFUSERS_WEIGHTS),
            ("vae", DIFFUSERS_WEIGHTS),
            ("text_encoder", TRANSFORMERS_WEIGHTS),
            ("text_encoder_2", TRANSFORMERS_WEIGHTS),
        ] {
            files.push(format!("{folder}/config.json"));
            files.push(format!("{folder}/{stem}.safetensors"));
            files.push(format!("{folder}/{stem}.fp16.safetensors"));
        }
        files
    }

    #[test]
    fn only_what_drawing_needs_is_fetched() {
        let files = needed(&listed(), Weights::Any).unwrap();
        assert_eq!(files.len(), 2 + 2 * 3 + 4 * 2, "{files:?}");
        assert!(files.contains("unet/diffusion_pytorch_model.safetensors"));
        let half = needed(&listed(), Weights::Half).unwrap();
        assert_eq!(half.len(), files.len());
        assert!(half.contains("text_encoder/model.fp16.safetensors"));
        let mut without = listed();
        without.retain(|file| file != "unet/diffusion_pytorch_model.safetensors");
        assert!(
            needed(&without, Weights::Any).unwrap().contains("unet/diffusion_pytorch_model.fp16.safetensors")
        );
    }

    #[test]
    fn shards_are_fetched_with_their_index_and_only_when_all_are_there() {
        let mut files = listed();
        files.retain(|file| !file.starts_with("unet/diffusion"));
        let stem = "unet/diffusion_pytorch_model";
        files.push(format!("{stem}.safetensors.index.json"));
        files.push(format!("{stem}-00001-of-00002.safetensors"));
        assert!(needed(&files, Weights::Any).unwrap_err().contains("unet"));
        files.push(format!("{stem}-00002-of-00002.safetensors"));
        let wanted = needed(&files, Weights::Any).unwrap();
        assert_eq!(wanted.iter().filter(|file| file.starts_with(stem)).count(), 3);
    }

    #[test]
    fn what_a_repository_lacks_is_said() {
        let without = |file: &str| {
            let mut files = listed();
            files.retain(|other| other != file);
            needed(&files, Weights::Any).unwrap_err()
        };
        assert!(without("model_index.json").contains("diffusers"));
        assert!(without("vae/config.json").contains("vae/config.json"));
        let mut pickled = listed();
        pickled.retain(|file| !file.starts_with("vae/diff"));
        pickled.push("vae/diffusion_pytorch_model.bin".into());
        assert!(needed(&pickled, Weights::Any).unwrap_err().contains("pickles"));
    }
}
