//! The prompts as --prompt-syntax reads them, and the LoRAs that they call.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::commands::r#gen::Args;
use crate::failure::Failure;
use crate::lora::block_weights::BlockWeights;
use crate::progress;
use crate::sdxl::prompt::{LoraTag, PromptSyntax, check, emphasis, lora_tags, not_supported};

/// Folders below --lora-dir that are looked through.
const DEPTH: usize = 8;

/// What the prompts say.
pub(super) struct Prompts {
    /// In the order of the command line, without LoRA tags.
    pub(super) texts: Vec<String>,
    pub(super) negative: Option<String>,
    /// The LoRAs that the prompts call, with their weights.
    pub(super) loras: Vec<(PathBuf, BlockWeights)>,
    pub(super) syntax: PromptSyntax,
}

impl Prompts {
    /// # Errors
    /// [`Failure::Usage`] for LoRA tags that are wrong, differ between the prompts, or name a file that is not there.
    pub(super) fn read(args: &Args) -> Result<Self> {
        let syntax = args.prompt_syntax;
        if syntax == PromptSyntax::Plain {
            let (texts, negative) = (args.prompt.clone(), args.negative_prompt.clone());
            return Ok(Self { texts, negative, loras: Vec::new(), syntax });
        }
        let mut tags: Option<Vec<LoraTag>> = None;
        let mut texts = Vec::new();
        for prompt in &args.prompt {
            let (text, called) = lora_tags(prompt).map_err(Failure::Usage)?;
            if tags.get_or_insert_with(|| called.clone()) != &called {
                let why = "the prompts call different LoRAs; generate these images in separate calls";
                return Err(Failure::Usage(why.into()).into());
            }
            texts.push(text);
        }
        let mut negative = None;
        if let Some(prompt) = &args.negative_prompt {
            let (text, called) = lora_tags(prompt).map_err(Failure::Usage)?;
            if let Some(tag) = called.first() {
                progress::warn(format_args!(
                    "<lora:{}> in the negative prompt is ignored: LoRAs apply to both prompts, or with \
                     --lora-positive-only to the prompt",
                    tag.name
                ));
            }
            negative = Some(text);
        }
        let mut unsupported: Vec<&str> = Vec::new();
        for text in texts.iter().chain(&negative) {
            check(text, syntax).map_err(Failure::Usage)?;
            unsupported.extend(not_supported(text, syntax));
        }
        unsupported.sort_unstable();
        unsupported.dedup();
        if !unsupported.is_empty() {
            progress::warn(format_args!(
                "not supported in prompts, and read as text: {}",
                unsupported.join(", ")
            ));
        }
        let emphasised = |text: &&String| emphasis(text, syntax).is_some();
        if let Some((word, weight)) =
            texts.iter().chain(&negative).find(emphasised).and_then(|t| emphasis(t, syntax))
        {
            progress::note(format_args!(
                "`{word}` has the weight {weight:.2} by its brackets; write \\( and \\) for brackets in the text, or use \
                 --prompt-syntax plain"
            ));
        }
        let find = |tag: &LoraTag| -> Result<(PathBuf, BlockWeights)> {
            Ok((find_lora(&tag.name, args)?, BlockWeights::te_and_unet(tag.te, tag.unet)))
        };
        let loras = tags.unwrap_or_default().iter().map(find).collect::<Result<_>>()?;
        Ok(Self { texts, negative, loras, syntax })
    }

    /// The files of --lora and of the prompts' tags, each once; a tag's weight counts where both name a file.
    pub(super) fn all_loras(&self, args: &Args) -> Result<Vec<(PathBuf, BlockWeights)>> {
        let mut all: Vec<(PathBuf, BlockWeights)> = Vec::new();
        for text in &args.lora {
            let (path, weights) = BlockWeights::split(text)?;
            if !self.loras.iter().any(|(called, _)| *called == path) {
                all.push((path, weights));
            }
        }
        all.extend(self.loras.iter().cloned());
        Ok(all)
    }
}

/// The file of a LoRA that a prompt calls by its name: one of --lora, or one in --lora-dir or below it.
fn find_lora(name: &str, args: &Args) -> Result<PathBuf> {
    for text in &args.lora {
        let (path, _) = BlockWeights::split(text)?;
        if is_named(&path, name) {
            return Ok(path);
        }
    }
    let folder = args.lora_dir.as_deref().unwrap_or(Path::new("."));
    let mut folders = vec![(folder.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        if let Some(file) = paths.iter().find(|path| is_named(path, name)) {
            return Ok(file.clone());
        }
        // Only a folder that is named is looked through: the working folder may be a home or a disk.
        if depth < DEPTH && args.lora_dir.is_some() {
            folders
                .extend(paths.into_iter().rev().filter(|path| path.is_dir()).map(|path| (path, depth + 1)));
        }
    }
    Err(Failure::Usage(format!(
        "the prompt calls the LoRA `{name}`, and there is no `{name}.safetensors` in `{}`: name its folder by --lora-dir, \
         give the file as --lora, or read the prompt as text with --prompt-syntax plain",
        folder.display()
    ))
    .into())
}

/// Whether a file is `NAME.safetensors`, or a folder is `NAME` and holds an adapter.
fn is_named(path: &Path, name: &str) -> bool {
    let is_file = path.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("safetensors"));
    if is_file {
        return path.file_stem().is_some_and(|stem| stem == name) && path.is_file();
    }
    path.file_name().is_some_and(|last| last == name) && path.join("adapter_config.json").is_file()
}
