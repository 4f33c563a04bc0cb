//! `difflora gen`: photos of a person (+ prompt) → LoRA file (+ images).

mod args;
mod identity;
mod outputs;
mod person;
mod plan;
mod prompts;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

pub use self::args::Args;
use self::outputs::Outputs;
use self::person::make_lora;
use self::plan::Plan;
use crate::commands::output::{Output, print_line};
use crate::device::Precision;
use crate::files;
use crate::hypernet::hyperlora::with_trigger;
use crate::lora::block_weights::BlockWeights;
use crate::lora::embedding::Embedding;
use crate::lora::file::{self, Missing};
use crate::personal_lora::PersonalLora;
use crate::progress::{self, Stage};
use crate::registry::{BUILT_IN, Base};
use crate::sdxl::image_series::ImageSeries;
use crate::sdxl::lora_stack::LoraStack;
use crate::sdxl::pipeline::SdxlLoader;
use crate::weights::model_folder::WeightType;

/// Predicts the person's LoRA, writes it, and generates the images.
pub fn run(args: Args, output: &Output) -> Result<()> {
    let start = Instant::now();
    let (mut prompts, loras) = prompts::read(&args)?;
    let outputs = Outputs::plan(&args, &loras, output.json)?;
    let device = args.device.open()?;
    let base = args.base_options.open(&args.base)?;
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
        prompts.texts.iter_mut().for_each(|prompt| *prompt = with_trigger(prompt, words));
    }
    if let Some((plan, model)) = plan {
        if args.base == BUILT_IN {
            let side = model.native_size();
            progress::note(format_args!(
                "the built-in model `tiny` generates painted portraits of {side}×{side} pixels, to try the program; real \
                 images need SDXL (--base) and a hypernetwork for it (--hypernet)"
            ));
        }
        let clock = Stage::begin("reading LoRAs");
        let loras = lora_stack(&args, &loras, person.as_ref(), &base)?;
        clock.end();
        prompts.note_embeddings(&loras);
        report["loras"] = loras.check(&model)?;
        let series = ImageSeries {
            model: &model,
            base: &base_id,
            loras: &loras,
            prompts: &prompts,
            params: plan.params,
            size: plan.size,
            start: plan.start,
            images_per_prompt: args.num_images as usize,
            seed: args.seed,
            preview_every: args.preview.map(|every| every as usize),
            strip_columns: args.strip.map(|columns| columns as usize),
        };
        report["pictures"] = write_images(&series, &args, &outputs, output)?;
    }
    report["seconds"] = json!(start.elapsed().as_secs_f64());
    if output.json {
        print_line!("{report:#}")?;
    }
    Ok(())
}

/// The person's LoRA, and those of `--lora` and of the prompts.
fn lora_stack(
    args: &Args,
    loras: &[(PathBuf, BlockWeights)],
    person: Option<&PersonalLora>,
    base: &Base,
) -> Result<LoraStack> {
    let mut stack = LoraStack {
        loras: Vec::new(),
        mode: args.lora_mode,
        positive_only: args.lora_positive_only,
        guidance: args.sampling.guidance,
        widen: args.dtype == Precision::F32,
        missing: if args.strict { Missing::Refuse } else { Missing::Warn },
        embeddings: Vec::new(),
    };
    for path in &args.embedding {
        stack.embeddings.push((path.display().to_string(), Embedding::read(path)?));
    }
    if let Some(person) = person {
        let stem = args.lora_out.as_deref().and_then(Path::file_stem);
        let name = stem.map_or("person".into(), |stem| stem.to_string_lossy());
        let scale = args.lora_scale.unwrap_or(person.scale);
        stack.push(&person.lora, &name, scale, args.lora_format, &base.block_layout)?;
    }
    for (path, strength) in loras {
        stack.push_file(path, strength.clone(), &base.block_layout)?;
    }
    Ok(stack)
}

/// Generates and writes every image; returns the settings of each.
fn write_images(series: &ImageSeries, args: &Args, outputs: &Outputs, output: &Output) -> Result<Value> {
    let paths = &outputs.images;
    let mut written = Vec::new();
    let strip = series.generate(
        |k, preview| {
            preview.save(&outputs::preview(&paths[k]), Some(&format!("preview\n{}", files::version_mark())))
        },
        |k, image, settings| {
            let path = &paths[k];
            let text = settings.parameters();
            image.save(path, (!args.no_metadata).then_some(&text))?;
            let mut record = settings.to_json();
            record["file"] = json!(path.display().to_string());
            if output.json {
                files::write_whole(&outputs::record(path), format!("{record:#}\n").as_bytes())?;
            } else {
                print_line!("image {}", path.display())?;
            }
            written.push(record);
            Ok(())
        },
    )?;
    if let (Some(strip), Some(path)) = (strip, &outputs.strip) {
        let text = format!("denoising strip\nSteps: {}, {}", args.sampling.steps, files::version_mark());
        strip.save(path, Some(&text))?;
        if !output.json {
            print_line!("strip {}", path.display())?;
        }
    }
    Ok(written.into())
}
