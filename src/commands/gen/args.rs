//! Arguments of `difflora gen`.

use std::path::PathBuf;

use super::identity::IdentityOptions;
use crate::commands::run_args::{BaseOptionArgs, DeviceArgs, SamplingArgs};
use crate::commands::values::{named, number, pixels, seed};
use crate::device::Precision;
use crate::lora::file::Format;
use crate::registry::BUILT_IN;
use crate::sdxl::lora_stack::LoraMode;
use crate::sdxl::pipeline::Tiling;
use crate::sdxl::prompt::PromptSyntax;

/// Arguments of `difflora gen`.
///
/// With neither --ref nor --lora, images come from the base model alone. The built-in model `tiny` generates painted
/// portraits of 128×128 pixels, to try the program. Guide: difflora help generate.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Photos of one person: files, patterns such as 'me/*.jpg', or folders. Photos of other people are left out.
    #[arg(help_heading = "Input", long = "ref", value_name = "PHOTO|DIR", num_args = 1.., env = "DIFFLORA_REF")]
    pub(super) reference: Vec<PathBuf>,
    /// Face to use in each photo, 1 for the largest [default: 1; with HyperLoRA the one with the highest score].
    #[arg(help_heading = "Input", long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), env = "DIFFLORA_FACE")]
    pub(super) face: Option<u32>,
    /// Prompts, one or more images each. Without a prompt only the LoRA is made.
    #[arg(help_heading = "Input", long, value_name = "TEXT", num_args = 1.., env = "DIFFLORA_PROMPT")]
    pub(super) prompt: Vec<String>,
    /// Negative prompt.
    #[arg(help_heading = "Input", long, value_name = "TEXT", env = "DIFFLORA_NEGATIVE_PROMPT")]
    pub(super) negative_prompt: Option<String>,
    /// Syntax of the prompts: a1111 reads (word:1.2), [word], BREAK and <lora:NAME:WEIGHT>; plain reads text.
    #[arg(help_heading = "Input", long, value_parser = named::<PromptSyntax>(), default_value = "a1111", env = "DIFFLORA_PROMPT_SYNTAX")]
    pub(super) prompt_syntax: PromptSyntax,
    /// Folder of the LoRAs that prompts call as <lora:NAME:WEIGHT> [default: the working folder].
    #[arg(help_heading = "Model", long, value_name = "DIR", env = "DIFFLORA_LORA_DIR")]
    pub(super) lora_dir: Option<PathBuf>,
    /// Hypernetwork: tiny (built in), hyperlora or hyperlora:edit (HyperLoRA's released weights for SDXL, after `difflora
    /// models pull`), a folder, or a hub repository owner/name[@revision].
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR|REPO", default_value = BUILT_IN, env = "DIFFLORA_HYPERNET")]
    pub(super) hypernet: String,
    /// Base model: tiny (built in), sdxl, a diffusers folder, a `.safetensors` in LDM layout, or a hub repository
    /// owner/name[@revision][:file.safetensors].
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR|FILE|REPO", default_value = BUILT_IN, env = "DIFFLORA_BASE")]
    pub(super) base: String,
    #[command(flatten)]
    pub(super) base_options: BaseOptionArgs,
    /// CLIP image encoder that the hypernetwork was trained with [default: tiny; with HyperLoRA OpenAI's ViT-L/14].
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", env = "DIFFLORA_IMAGE_ENCODER")]
    pub(super) image_encoder: Option<String>,
    /// Face encoder that the hypernetwork was trained with [default: the one it names].
    #[arg(help_heading = "Model", long, value_name = "NAME|DIR", env = "DIFFLORA_FACE_ENCODER")]
    pub(super) face_encoder: Option<String>,
    /// LoRA files or PEFT folders with optional weights: FILE:0.8, or by part, FILE:unet=0.8,te=0.4,down.1=0.5 (parts: unet, te, te1,
    /// te2, down, down.N, mid, up, up.N).
    #[arg(help_heading = "Model", long, value_name = "FILE[:WEIGHT]", num_args = 1.., env = "DIFFLORA_LORA")]
    pub(super) lora: Vec<String>,
    /// Textual inversion for SDXL (a `.safetensors` with clip_l and clip_g): prompts call it by the file's name.
    #[arg(help_heading = "Model", long, value_name = "FILE", num_args = 1.., env = "DIFFLORA_EMBEDDING")]
    pub(super) embedding: Vec<PathBuf>,
    /// Fail where a part of a LoRA cannot be used, or where HyperLoRA's own search shows no face, instead of a warning.
    #[arg(help_heading = "Model", long, env = "DIFFLORA_STRICT")]
    pub(super) strict: bool,
    /// Weight of the person's LoRA [default: 1; with HyperLoRA 0.8].
    #[arg(
        help_heading = "Model",
        long,
        value_name = "F",
        allow_negative_numbers = true,
        env = "DIFFLORA_LORA_SCALE", value_parser = number)]
    pub(super) lora_scale: Option<f64>,
    /// How LoRAs are applied.
    #[arg(help_heading = "Model", long, value_parser = named::<LoraMode>(), default_value = "merge", env = "DIFFLORA_LORA_MODE")]
    pub(super) lora_mode: LoraMode,
    /// Apply LoRAs to the prompt only, not to the negative prompt; requires --lora-mode runtime.
    #[arg(help_heading = "Model", long, env = "DIFFLORA_LORA_POSITIVE_ONLY")]
    pub(super) lora_positive_only: bool,
    #[command(flatten)]
    pub(super) sampling: SamplingArgs,
    /// Width in pixels, a multiple of 8 (small models: of their VAE's factor) [default: the base's native size].
    #[arg(help_heading = "Sampling", long, value_name = "PX", value_parser = pixels, env = "DIFFLORA_WIDTH")]
    pub(super) width: Option<usize>,
    /// Height in pixels, likewise [default: the base's native size].
    #[arg(help_heading = "Sampling", long, value_name = "PX", value_parser = pixels, env = "DIFFLORA_HEIGHT")]
    pub(super) height: Option<usize>,
    /// SDXL's `original_size` conditioning [default: output size]. Small values imitate upscaled images.
    #[arg(help_heading = "Sampling", long, value_name = "WxH", value_parser = width_and_height, env = "DIFFLORA_ORIGINAL_SIZE")]
    pub(super) original_size: Option<[usize; 2]>,
    /// SDXL's `target_size` conditioning [default: output size].
    #[arg(help_heading = "Sampling", long, value_name = "WxH", value_parser = width_and_height, env = "DIFFLORA_TARGET_SIZE")]
    pub(super) target_size: Option<[usize; 2]>,
    /// SDXL's `crop_coords_top_left` conditioning; 0,0 centres the subject.
    #[arg(help_heading = "Sampling", long, value_name = "TOP,LEFT", value_parser = top_and_left, default_value = "0,0", env = "DIFFLORA_CROP")]
    pub(super) crop: [usize; 2],
    /// Decode in strips: the same image with less memory.
    #[arg(help_heading = "Advanced", long, value_parser = named::<Tiling>(), default_value = "auto", env = "DIFFLORA_VAE_TILING")]
    pub(super) vae_tiling: Tiling,
    /// Images per prompt.
    #[arg(help_heading = "Sampling", long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000), env = "DIFFLORA_NUM_IMAGES")]
    pub(super) num_images: u32,
    /// Seed of the images' noise; image k of the command uses seed + k. -1 takes a random one.
    #[arg(help_heading = "Sampling", long, default_value_t = 0, allow_negative_numbers = true, value_parser = seed, env = "DIFFLORA_SEED")]
    pub(super) seed: u64,
    /// Initial noise instead of the seed's: tensor `latents` (1, C, height/8, width/8) of a safetensors file, unit
    /// normal.
    #[arg(help_heading = "Input", long, value_name = "FILE", env = "DIFFLORA_INIT_LATENTS")]
    pub(super) init_latents: Option<PathBuf>,
    #[command(flatten)]
    pub(super) identity: IdentityOptions,
    /// Number type of the base model's weights.
    #[arg(help_heading = "Advanced", long, value_parser = named::<Precision>(), default_value = "f32", env = "DIFFLORA_DTYPE")]
    pub(super) dtype: Precision,
    /// Where to compute.
    #[command(flatten)]
    pub(super) device: DeviceArgs,
    /// Image to write (.png, .jpg, .webp), or a folder for several [default: difflora.png]. With --json the settings
    /// of each image are written beside it (.json).
    #[arg(help_heading = "Output", long, value_name = "FILE|DIR", env = "DIFFLORA_OUT")]
    pub(super) out: Option<PathBuf>,
    /// Omit prompt and settings from image metadata.
    #[arg(help_heading = "Output", long, env = "DIFFLORA_NO_METADATA")]
    pub(super) no_metadata: bool,
    /// Write a rough preview every N steps: `me.preview.png` beside `me.png`.
    #[arg(help_heading = "Output", long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), env = "DIFFLORA_PREVIEW")]
    pub(super) preview: Option<u32>,
    /// Write `me.strip.png` beside the first image: for each prompt's first image N steps on its way from noise, above the
    /// noisy latents and below the predicted x_0.
    #[arg(help_heading = "Output", long, value_name = "N", requires = "prompt", value_parser = clap::value_parser!(u32).range(1..=64), env = "DIFFLORA_STRIP")]
    pub(super) strip: Option<u32>,
    /// LoRA to write [default without --prompt: difflora.safetensors].
    #[arg(help_heading = "Output", long, value_name = "FILE.safetensors", env = "DIFFLORA_LORA_OUT")]
    pub(super) lora_out: Option<PathBuf>,
    /// Key names of the written LoRA.
    #[arg(help_heading = "Output", long, value_parser = named::<Format>(), default_value = "kohya", env = "DIFFLORA_LORA_FORMAT")]
    pub(super) lora_format: Format,
}

impl Args {
    /// Whether a person's LoRA is predicted.
    pub(super) fn has_person(&self) -> bool {
        !self.reference.is_empty() || self.identity.mixes()
    }
}

/// `1024x768` → width and height.
fn width_and_height(text: &str) -> std::result::Result<[usize; 2], String> {
    two_numbers(text, 'x')
        .filter(|size| !size.contains(&0))
        .ok_or("write WIDTHxHEIGHT, for example 1024x768".into())
}

/// `0,128` → top and left.
fn top_and_left(text: &str) -> std::result::Result<[usize; 2], String> {
    two_numbers(text, ',').ok_or("write TOP,LEFT, for example 0,128".into())
}

fn two_numbers(text: &str, between: char) -> Option<[usize; 2]> {
    let (first, second) = text.split_once(between)?;
    let number = |text: &str| text.trim().parse().ok().filter(|number| *number <= 1_000_000);
    Some([number(first)?, number(second)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_pairs() {
        assert_eq!(width_and_height("1024x768"), Ok([1024, 768]));
        assert_eq!(top_and_left("0, 128"), Ok([0, 128]));
        assert!(width_and_height("0x768").is_err() && width_and_height("12").is_err());
        assert!(top_and_left("-1,0").is_err());
    }
}
