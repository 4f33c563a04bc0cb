//! Photos of a person → a LoRA.

use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::references::References;
use super::{Args, diffusion, hyperlora};
use crate::hypernet::hyperlora::Shapes;
use crate::lora::{Lora, metadata};
use crate::progress;
use crate::recipes::dreambooth::refine::{Refinement, refine};
use crate::registry::{self, Base};
use crate::sdxl::pipeline::Sdxl;
use crate::weights::model_id::ModelId;

/// A person's LoRA and how it is used.
pub(super) struct Person {
    pub(super) lora: Lora,
    /// For `--json`.
    pub(super) report: Value,
    /// Words without which the LoRA has no effect.
    pub(super) trigger: Option<&'static str>,
    /// Its weight unless another is asked for.
    pub(super) scale: f64,
}

/// What a hypernetwork made of photos.
pub(super) struct Predicted {
    pub(super) lora: Lora,
    /// Of the hypernetwork's own, beside what every LoRA records.
    pub(super) metadata: Vec<(&'static str, String)>,
    /// The mixer's weight of the face, for each person, where there is a gate.
    pub(super) gates: Vec<f32>,
    /// Seed of what is sampled.
    pub(super) seed: u64,
    /// Whether `A` trains too in --refine.
    pub(super) own_downs: bool,
    /// What the photos show in --refine.
    pub(super) caption: &'static str,
    pub(super) trigger: Option<&'static str>,
    pub(super) scale: f64,
    /// The number type of the written factors.
    pub(super) dtype: DType,
    /// When the hypernetwork began.
    pub(super) start: Instant,
}

/// Photos → identities → LoRA, by the hypernetwork that was asked for.
pub(super) fn make_lora(args: &Args, base: &Base, base_id: &ModelId, device: &Device) -> Result<Person> {
    let files = registry::find_hypernet(&args.hypernet, args.base_options.offline)?;
    if Shapes::are_in(&files) {
        let (people, predicted) = hyperlora::predict(args, base, &files, device)?;
        return finish(args, (base, base_id), &people, predicted, device);
    }
    let (people, predicted) = diffusion::predict(args, base_id, &files, device)?;
    finish(args, (base, base_id), &people, predicted, device)
}

/// Refines the LoRA where that is asked for, and records its origin.
fn finish<C>(
    args: &Args,
    (base, base_id): (&Base, &ModelId),
    people: &[(References<C>, f64)],
    predicted: Predicted,
    device: &Device,
) -> Result<Person> {
    let Predicted { mut lora, trigger, scale, .. } = predicted;
    let mut refined = None;
    if let Some(steps) = args.identity.refine {
        let how = Refinement {
            steps,
            rate: args.identity.refine_rate,
            seed: predicted.seed,
            downs: predicted.own_downs,
            caption: predicted.caption,
        };
        let photos = people[0].0.squares()?;
        let model = Sdxl::open(&base.files, DType::F32, device)?;
        let bar = progress::bar(u64::from(steps), "refining");
        let (better, losses) = refine(&model, &lora, &photos, how, &bar)?;
        bar.finish_and_clear();
        (lora, refined) = (better, Some(losses));
    }
    for (module, layer) in &lora.layers {
        let sum = layer.up.abs()?.sum_all()?.to_scalar::<f32>()?;
        ensure!(sum.is_finite(), "the hypernetwork made NaN or infinity for `{module}`; nothing is written");
    }
    lora = lora.to(predicted.dtype, &Device::Cpu)?;
    let hashes: Vec<&str> = people
        .iter()
        .flat_map(|(references, _)| references.used.iter().map(|(_, photo)| photo.sha256.as_str()))
        .collect();
    let rank = lora.layers.values().next().map_or(0, crate::lora::LoraLayer::rank);
    let base_version = if args.base == registry::BUILT_IN { "difflora_tiny" } else { metadata::SDXL_VERSION };
    let everywhere = [
        (metadata::BASE_VERSION, base_version.to_string()),
        (metadata::TITLE, "a person, by difflora".to_string()),
        (metadata::RESOLUTION, metadata::resolution(base.native_size)),
        ("difflora.hypernet", args.hypernet.clone()),
        ("difflora.reference_sha256", hashes.join(",")),
    ];
    for (key, value) in everywhere.into_iter().chain(metadata::of_base(base_id)).chain(predicted.metadata) {
        lora.metadata.insert(key.into(), value);
    }
    if people.len() > 1 {
        let weights: Vec<String> = people.iter().map(|(_, weight)| format!("{weight:.4}")).collect();
        lora.metadata.insert("difflora.mix".into(), weights.join(","));
    }
    for (key, value) in [
        ("difflora.vary", args.identity.vary().map(|vary| vary.to_string())),
        ("difflora.refine_steps", args.identity.refine.map(|steps| steps.to_string())),
    ] {
        lora.metadata.extend(value.map(|value| (key.to_string(), value)));
    }
    let report = json!({
        "references": people.iter().flat_map(|(references, _)| references.to_json()).collect::<Vec<_>>(),
        "left_out": people
            .iter()
            .flat_map(|(references, _)| references.left_out.as_array().cloned().unwrap_or_default())
            .collect::<Vec<_>>(),
        "weights": people.iter().map(|(_, weight)| weight).collect::<Vec<_>>(),
        "gates": predicted
            .gates
            .iter()
            .map(|face| json!({ "face": face, "image": 1.0 - face }))
            .collect::<Vec<_>>(),
        "refined": refined,
        "modules": lora.layers.len(),
        "rank": rank,
        "seconds": predicted.start.elapsed().as_secs_f64(),
    });
    Ok(Person { lora, report, trigger, scale })
}
