//! `difflora models show`: what a base model costs.

use anyhow::Result;
use serde_json::json;

use crate::commands::output::{Output, print_line};
use crate::commands::run_args::BaseOptionArgs;
use crate::commands::values::pixels;
use crate::hypernet::hyperlora::{self, Shapes};
use crate::registry::{self, find_base};
use crate::sdxl::counts::{Cost, ModelCost};
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
    options: BaseOptionArgs,
}

/// Prints the table.
pub fn run(args: &Args, output: &Output) -> Result<()> {
    if let Some(files) = registry::find_hyperlora(&args.base)? {
        return show_hyperlora(args, &files, output);
    }
    let files = find_base(&args.base, &args.options.options())?;
    let ModelCost { width, height, tokens, parts } = ModelCost::of(&files, [args.width, args.height])?;
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
    let parts = hyperlora::parameters(files)?;
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
