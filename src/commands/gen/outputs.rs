//! The output paths.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::commands::r#gen::Args;
use crate::failure::Failure;
use crate::files;
use crate::identity::photos::Photos;
use crate::image::{FileFormat, is_written_as_folder, numbered};
use crate::lora::block_weights::BlockWeights;
use crate::sdxl::lora_stack::LoraMode;

/// The output paths, checked before the work begins.
pub(super) struct Outputs {
    pub(super) lora: Option<PathBuf>,
    pub(super) images: Vec<PathBuf>,
    /// Of `--strip`.
    pub(super) strip: Option<PathBuf>,
}

impl Outputs {
    /// `json`: whether the settings of each image are written beside it.
    pub(super) fn plan(args: &Args, loras: &[(PathBuf, BlockWeights)], json: bool) -> Result<Self> {
        args.identity.check(!args.reference.is_empty())?;
        if !args.has_person() && args.prompt.is_empty() {
            return Err(Failure::Usage(
                "nothing to do: give --ref PHOTO for a LoRA, --prompt TEXT for an image, or both".into(),
            )
            .into());
        }
        if !args.has_person() && args.lora_out.is_some() {
            return Err(Failure::Usage("--lora-out needs --ref: the LoRA is made from a photo".into()).into());
        }
        if args.lora_positive_only && args.lora_mode == LoraMode::Merge {
            let why =
                "--lora-positive-only needs --lora-mode runtime: what is merged changes both predictions";
            return Err(Failure::Usage(why.into()).into());
        }
        if args.prompt.is_empty() && args.out.is_some() {
            return Err(Failure::Usage(
                "--out needs --prompt: without a prompt no image is generated".into(),
            )
            .into());
        }
        let lora = match &args.lora_out {
            Some(path) => Some(path.clone()),
            None => args.prompt.is_empty().then(|| PathBuf::from("difflora.safetensors")),
        };
        let count = args.prompt.len() * args.num_images as usize;
        let out = args.out.as_deref().unwrap_or(Path::new("difflora.png"));
        let images = numbered(out, count);
        let strip = args.strip.and(images.first()).map(|first| first.with_extension("strip.png"));
        let previews = images.iter().filter(|_| args.preview.is_some()).map(|path| preview(path));
        let records: Vec<PathBuf> = images.iter().filter(|_| json).map(|path| record(path)).collect();
        let beside: Vec<PathBuf> = previews.chain(records.iter().cloned()).chain(strip.clone()).collect();
        let outputs: Vec<&Path> = images.iter().chain(&lora).chain(&beside).map(PathBuf::as_path).collect();
        files::refuse_inputs(&outputs, &inputs(args, loras)?)?;
        if let Some(folder) = args.out.as_deref().filter(|out| is_written_as_folder(out)) {
            let why = || format!("cannot make the folder `{}`", folder.display());
            std::fs::create_dir_all(folder).with_context(why)?;
        }
        for path in outputs {
            files::check_writable(path)?;
        }
        records.iter().try_for_each(|path| check_record(path))?;
        for path in &images {
            FileFormat::of(path)?;
        }
        Ok(Self { lora, images, strip })
    }
}

/// Where the preview of an image is written.
pub(super) fn preview(image: &Path) -> PathBuf {
    image.with_extension("preview.png")
}

/// Where the settings of an image are written with --json.
pub(super) fn record(image: &Path) -> PathBuf {
    image.with_extension("json")
}

/// Refuses to replace a file that is no record of an image's settings.
fn check_record(path: &Path) -> Result<()> {
    let is_record = |text: String| {
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        ["sampler", "seed", "prompt"].iter().all(|key| value.get(key).is_some())
    };
    let before = std::fs::metadata(path).is_ok_and(|data| data.is_file() && data.len() > 0);
    if before && !files::may_overwrite() && !files::read_text(path, MAX_RECORD).is_ok_and(is_record) {
        let why = "it exists and holds no settings of an image; give --overwrite to replace it";
        return Err(Failure::Usage(format!("cannot write `{}`: {why}", path.display())).into());
    }
    Ok(())
}

/// The largest record of an image's settings that is read, in bytes.
const MAX_RECORD: u64 = 1 << 24;

/// The files that the command reads: photos and LoRAs.
fn inputs(args: &Args, loras: &[(PathBuf, BlockWeights)]) -> Result<Vec<PathBuf>> {
    let mut inputs: Vec<PathBuf> = args.identity.mixed()?.into_iter().map(|(photo, _)| photo).collect();
    if !args.reference.is_empty() {
        inputs.extend(Photos::find(&args.reference)?.paths().map(Path::to_path_buf));
    }
    inputs.extend(args.embedding.iter().chain(&args.init_latents).cloned());
    inputs.extend(loras.iter().map(|(path, _)| path.clone()));
    Ok(inputs)
}
