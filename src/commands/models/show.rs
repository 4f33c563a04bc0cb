//! `difflora models show`: what a base model costs.

use anyhow::Result;
use serde_json::json;

use crate::commands::values::pixels;
use crate::failure::Failure;
use crate::hypernet::hyperlora::{FILES, Shapes};
use crate::output::Output;
use crate::output::print_line;
use crate::registry::{self, BaseOptions, find_base};
use crate::sdxl::architecture;
use crate::sdxl::counts::{self, Cost};
use crate::sdxl::text::ClipTextConfig;
use crate::sdxl::unet::UNetConfig;
use crate::sdxl::vae::VaeConfig;
use crate::weights::model_folder::ModelFiles;

/// Arguments of `difflora models show`.
///
/// For HyperLoRA only the parameters are counted. Reads only configs and the headers of weights. Multiply-adds are those of convolutions and linear layers for one prompt, one step without
/// guidance and one image; the last column adds the matrix products of attention.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A folder, a file, owner/name[@revision], or a name.
    base: String,
    /// Width in pixels [default: the model's native size].
    #[arg(long, value_name = "PX", value_parser = pixels)]
    width: Option<usize>,
    /// Height in pixels [default: the model's native size].
    #[arg(long, value_name = "PX", value_parser = pixels)]
    height: Option<usize>,
    #[command(flatten)]
    options: BaseOptions,
}

/// Prints the table.
pub fn run(args: &Args, output: &Output) -> Result<()> {
    if let Some(files) = registry::find_hyperlora(&args.base)? {
        return show_hyperlora(args, &files, output);
    }
    let files = find_base(&args.base, &args.options)?;
    architecture::require_sdxl(&files)?;
    let unet: UNetConfig = files.config("unet/config.json")?;
    let vae: VaeConfig = files.config("vae/config.json")?;
    let one: ClipTextConfig = files.config("text_encoder/config.json")?;
    let two: ClipTextConfig = files.config("text_encoder_2/config.json")?;

    let factor = vae.factor();
    let own = unet.sample_size * factor;
    let (width, height) = (args.width.unwrap_or(own), args.height.unwrap_or(own));
    if width == 0 || height == 0 || !width.is_multiple_of(factor) || !height.is_multiple_of(factor) {
        let why = format!("{width}×{height} pixels: this model needs multiples of {factor}");
        return Err(Failure::Usage(why).into());
    }
    let tokens = one.max_position_embeddings as u64;
    let latents = [(height / factor) as u64, (width / factor) as u64];
    let unusable = |file: &str, error: anyhow::Error| files.unusable(file, format!("{error:#}"));
    let text = |config: &ClipTextConfig, folder: &str| {
        counts::text_encoder(config, tokens)
            .map_err(|error| unusable(&format!("{folder}/config.json"), error))
    };
    let [encoder, decoder] = counts::vae(&vae, [height as u64, width as u64])
        .map_err(|error| unusable("vae/config.json", error))?;
    let parts = [
        ("text_encoder", text(&one, "text_encoder")?),
        ("text_encoder_2", text(&two, "text_encoder_2")?),
        ("unet", counts::unet(&unet, latents, tokens).map_err(|error| unusable("unet/config.json", error))?),
        ("vae decoder", decoder),
        ("vae encoder", encoder),
    ];
    let parameters: u64 = parts.iter().map(|(_, cost)| cost.parameters).sum();

    if output.json {
        let part = |(name, cost): &(&str, Cost)| {
            json!({
                "part": name,
                "parameters": cost.parameters,
                "multiply_adds": cost.multiply_adds,
                "multiply_adds_with_attention": cost.with_attention(),
            })
        };
        let report = json!({
            "base": args.base, "width": width, "height": height, "tokens": tokens, "parameters": parameters,
            "parts": parts.iter().map(part).collect::<Vec<_>>(),
        });
        print_line!("{report:#}")?;
        return Ok(());
    }
    print_line!("{} at {width}×{height} pixels, {tokens} tokens, one step without guidance", args.base)?;
    print_line!("{:<15} {:>14} {:>16} {:>16}", "part", "parameters", "multiply-adds", "with attention")?;
    for (name, cost) in &parts {
        let giga = |count: u64| format!("{:.2} G", count as f64 / 1e9);
        print_line!(
            "{name:<15} {:>14} {:>16} {:>16}",
            grouped(cost.parameters),
            giga(cost.multiply_adds),
            giga(cost.with_attention())
        )?;
    }
    print_line!("{:<15} {:>14}", "all", grouped(parameters))?;
    Ok(())
}

/// Prints the parameters of HyperLoRA's files.
fn show_hyperlora(args: &Args, files: &ModelFiles, output: &Output) -> Result<()> {
    let shapes = Shapes::read(files)?;
    let mut parts = Vec::new();
    for file in FILES.into_iter().filter_map(|file| file.strip_suffix(".safetensors")) {
        let stored = files.reader("", file)?;
        let sizes =
            stored.names().into_iter().map(|name| Ok(stored.shape(&name)?.iter().product::<usize>() as u64));
        parts.push((file, sizes.sum::<Result<u64>>()?));
    }
    let (layers, rank) = (shapes.layers().count(), shapes.rank());
    let parameters: u64 = parts.iter().map(|(_, count)| count).sum();
    if output.json {
        let part = |(name, count): &(&str, u64)| json!({ "part": name, "parameters": count });
        let report = json!({
            "hypernet": args.base, "layers": layers, "rank": rank, "parameters": parameters,
            "parts": parts.iter().map(part).collect::<Vec<_>>(),
        });
        return print_line!("{report:#}");
    }
    print_line!("{}: HyperLoRA, a LoRA of {layers} layers and rank {rank}", args.base)?;
    for (name, count) in parts.iter().chain(&[("all", parameters)]) {
        print_line!("{name:<18} {:>14}", grouped(*count))?;
    }
    Ok(())
}

/// `2567463684` → `2,567,463,684`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
