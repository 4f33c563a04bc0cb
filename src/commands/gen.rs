//! `difflora gen`: photos of a person (+ prompt) → LoRA file (+ images).

mod args;
mod diffusion;
mod hyperlora;
mod identity;
mod images;
mod outputs;
mod person;
mod plan;
mod prompts;
mod references;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde_json::json;

pub use crate::commands::r#gen::args::Args;
use crate::commands::r#gen::images::Images;
use crate::commands::r#gen::outputs::Outputs;
use crate::commands::r#gen::person::{Person, make_lora};
use crate::commands::r#gen::plan::Plan;
use crate::commands::r#gen::prompts::Prompts;
use crate::device::Precision;
use crate::lora::file::{self, Missing};
use crate::output::{Output, print_line};
use crate::progress::{self, Stage};
use crate::registry::{BUILT_IN, Base};
use crate::sdxl::lora_stack::LoraStack;
use crate::sdxl::pipeline::SdxlLoader;
use crate::weights::model_folder::WeightType;

/// Predicts the person's LoRA, writes it, and generates the images.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let start = Instant::now();
    let mut prompts = Prompts::read(&args)?;
    let outputs = Outputs::plan(&args, &prompts)?;
    let device = args.device.open()?;
    let base = Base::open(&args.base, &args.base_options)?;
    let plan = match args.prompt.is_empty() {
        true => None,
        false => {
            let weights = WeightType::as_good_as(args.dtype.into(), &device);
            let model = SdxlLoader::open(&base.files, weights, &device)?;
            Some((Plan::new(&args, &model)?, model))
        }
    };
    let clock = Stage::begin("identifying the base model");
    let base_id = base.id()?;
    clock.end();

    let person = match args.has_person() {
        true => Some(make_lora(&args, &base, &base_id, &device)?),
        false => None,
    };
    let mut report = json!({});
    if let Some(person) = &person {
        report["person"] = person.report.clone();
        if let Some(path) = &outputs.lora {
            file::write(path, &person.lora, args.lora_format, &base.block_layout)?;
            report["lora"] = json!(path.display().to_string());
            if !output.json {
                print_line!("LoRA    {}", path.display())?;
            }
        }
    }
    if let Some(words) = person.as_ref().and_then(|person| person.trigger) {
        progress::note(format_args!(
            "the LoRA needs `{words}` in the prompt; `gen` puts it in front where it is not there"
        ));
        prompts.texts.iter_mut().for_each(|prompt| *prompt = hyperlora::with_trigger(prompt, words));
    }
    if let Some((plan, model)) = plan {
        if args.base == BUILT_IN {
            progress::note(
                "the built-in model `tiny` generates painted portraits of 64×64 pixels, to try the program; real \
                 images need SDXL (--base) and a hypernetwork for it (--hypernet)",
            );
        }
        let clock = Stage::begin("reading LoRAs");
        let loras = lora_stack(&args, &prompts, person.as_ref(), &base)?;
        clock.end();
        report["loras"] = loras.check(&model)?;
        let images = Images {
            args: &args,
            plan: &plan,
            prompts: &prompts,
            model: &model,
            base: &base_id,
            loras: &loras,
        };
        report["pictures"] = images.generate(&outputs.images, output)?;
    }
    report["seconds"] = json!(start.elapsed().as_secs_f64());
    if output.json {
        print_line!("{report:#}")?;
    }
    Ok(())
}

/// The person's LoRA, and those of `--lora` and of the prompts.
fn lora_stack(args: &Args, prompts: &Prompts, person: Option<&Person>, base: &Base) -> Result<LoraStack> {
    let mut stack = LoraStack {
        loras: Vec::new(),
        mode: args.lora_mode,
        positive_only: args.lora_positive_only,
        guidance: args.guidance,
        widen: args.dtype == Precision::F32,
        missing: if args.strict { Missing::Refuse } else { Missing::Warn },
    };
    if let Some(person) = person {
        let stem = args.lora_out.as_deref().and_then(Path::file_stem);
        let name = stem.map_or("person".into(), |stem| stem.to_string_lossy());
        let scale = args.lora_scale.unwrap_or(person.scale);
        stack.push(&person.lora, &name, scale, args.lora_format, &base.block_layout)?;
    }
    for (path, strength) in prompts.all_loras(args)? {
        stack.push_file(&path, strength, &base.block_layout)?;
    }
    Ok(stack)
}
