//! The LoRAs of --lora and those that the prompts call.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::commands::r#gen::Args;
use crate::failure::Failure;
use crate::lora::block_weights::BlockWeights;
use crate::lora::named;
use crate::sdxl::prompt::LoraTag;
use crate::sdxl::prompt_set::PromptSet;

/// The prompts as --prompt-syntax reads them, and all LoRAs with their weights, each once; a prompt's weight counts
/// where --lora names the same file.
///
/// # Errors
/// [`Failure::Usage`] as [`PromptSet::read`], and for a tag that names a file that is not there.
pub(super) fn read(args: &Args) -> Result<(PromptSet, Vec<(PathBuf, BlockWeights)>)> {
    let prompts = PromptSet::read(&args.prompt, args.negative_prompt.as_deref(), args.prompt_syntax)?;
    let find = |tag: &LoraTag| Ok((find_lora(&tag.name, args)?, BlockWeights::te_and_unet(tag.te, tag.unet)));
    let called: Vec<(PathBuf, BlockWeights)> = prompts.loras.iter().map(find).collect::<Result<_>>()?;
    let mut all = Vec::new();
    for text in &args.lora {
        let (path, weights) = BlockWeights::split(text)?;
        if !called.iter().any(|(called, _)| *called == path) {
            all.push((path, weights));
        }
    }
    all.extend(called);
    Ok((prompts, all))
}

/// The file of a LoRA that a prompt calls by its name: one of --lora, or one in --lora-dir or below it.
fn find_lora(name: &str, args: &Args) -> Result<PathBuf> {
    for text in &args.lora {
        let (path, _) = BlockWeights::split(text)?;
        if named::is_named(&path, name) {
            return Ok(path);
        }
    }
    // Only a folder that is named is looked through: the working folder may be a home or a disk.
    let folder = args.lora_dir.as_deref().unwrap_or(Path::new("."));
    named::find(name, folder, args.lora_dir.is_some()).ok_or_else(|| {
        Failure::Usage(format!(
            "the prompt calls the LoRA `{name}`, and there is no `{name}.safetensors` in `{}`: name its folder by \
             --lora-dir, give the file as --lora, or read the prompt as text with --prompt-syntax plain",
            folder.display()
        ))
        .into()
    })
}
