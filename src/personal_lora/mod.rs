//! Photos of a person → their LoRA, by DiffLoRA's hypernetwork ([`diffusion`]) or HyperLoRA's ([`hyperlora`]).
//!
//! ```text
//! photos ──► look: References ──► predict: Predicted ──► finish: refined, recorded ──► PersonalLora
//! ```

pub mod diffusion;
pub mod hyperlora;

use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{DType, Device};
use serde_json::{Value, json};

use crate::identity::photos::left_out_json;
use crate::identity::references::References;
use crate::lora::{Lora, LoraLayer, metadata};
use crate::progress;
use crate::recipes::dreambooth::refine::{Refinement, refine};
use crate::registry::{self, Base};
use crate::sdxl::pipeline::Sdxl;
use crate::weights::model_id::ModelId;

/// The LoRA that a hypernetwork predicted, before it is refined and its origin recorded.
pub struct Predicted {
    /// The LoRA.
    pub lora: Lora,
    /// Metadata of the hypernetwork's own, beside what every LoRA records.
    pub metadata: Vec<(&'static str, String)>,
    /// The mixer's weight of the face, for each person, where there is a gate.
    pub gates: Vec<f32>,
    /// Seed of what was sampled, and of refining.
    pub seed: u64,
    /// Whether `A` trains too when the LoRA is refined; not where all LoRAs share it.
    pub own_downs: bool,
    /// Caption of the photos when the LoRA is refined.
    pub caption: &'static str,
    /// Words without which the LoRA has no effect.
    pub trigger: Option<&'static str>,
    /// Its weight unless another is asked for.
    pub scale: f64,
    /// The number type of the written factors.
    pub dtype: DType,
}

/// How a predicted LoRA becomes that of a person.
pub struct Origin<'a> {
    /// The hypernetwork, as the user named it.
    pub hypernet: &'a str,
    /// The base model.
    pub base: &'a Base,
    /// Its name and hash.
    pub base_id: &'a ModelId,
    /// How far the LoRA was moved from the person, see [`crate::hypernet::Hypernet::vary`].
    pub vary: Option<f64>,
    /// Steps and learning rate of fine-tuning on the photos.
    pub refine: Option<(u32, f64)>,
    /// Where it is fine-tuned.
    pub device: &'a Device,
    /// When the hypernetwork began, for the report.
    pub start: Instant,
}

/// A person's LoRA and how it is used.
pub struct PersonalLora {
    /// The LoRA with its metadata.
    pub lora: Lora,
    /// Photos, weights and sizes, for programs.
    pub report: Value,
    /// Words without which the LoRA has no effect.
    pub trigger: Option<&'static str>,
    /// Its weight unless another is asked for.
    pub scale: f64,
}

impl Predicted {
    /// Refines the LoRA on the photos of the first person where that is asked for, and records its origin.
    ///
    /// # Errors
    /// NaN or infinity in the LoRA, with the module.
    pub fn finish<C>(self, people: &[References<C>], origin: &Origin) -> Result<PersonalLora> {
        let Self { mut lora, trigger, scale, .. } = self;
        let mut refined = None;
        if let Some((steps, rate)) = origin.refine {
            let how =
                Refinement { steps, rate, seed: self.seed, downs: self.own_downs, caption: self.caption };
            let photos = people[0].squares()?;
            let model = Sdxl::open(&origin.base.files, DType::F32, origin.device)?;
            let bar = progress::bar(u64::from(steps), "refining");
            let (better, losses) = refine(&model, &lora, &photos, how, &bar)?;
            bar.finish_and_clear();
            (lora, refined) = (better, Some(losses));
        }
        for (module, layer) in &lora.layers {
            let sum = layer.up.abs()?.sum_all()?.to_scalar::<f32>()?;
            ensure!(
                sum.is_finite(),
                "the hypernetwork made NaN or infinity for `{module}`; nothing is written"
            );
        }
        lora = lora.to(self.dtype, &Device::Cpu)?;
        record(&mut lora, people, origin, self.metadata);
        let left_out = people.iter().flat_map(|person| person.left_out.clone()).collect::<Vec<_>>();
        let gates = self.gates.iter().map(|face| json!({ "face": face, "image": 1.0 - face }));
        let report = json!({
            "references": people.iter().flat_map(References::to_json).collect::<Vec<_>>(),
            "left_out": left_out_json(&left_out),
            "weights": people.iter().map(|person| person.weight).collect::<Vec<_>>(),
            "gates": gates.collect::<Vec<_>>(),
            "refined": refined,
            "modules": lora.layers.len(),
            "rank": lora.layers.values().next().map_or(0, LoraLayer::rank),
            "seconds": origin.start.elapsed().as_secs_f64(),
        });
        Ok(PersonalLora { lora, report, trigger, scale })
    }
}

/// Writes the origin of a LoRA into its metadata.
fn record<C>(
    lora: &mut Lora,
    people: &[References<C>],
    origin: &Origin,
    of_hypernet: Vec<(&'static str, String)>,
) {
    let photos = people.iter().flat_map(|person| &person.used);
    let hashes: Vec<&str> = photos.map(|(_, photo)| photo.sha256.as_str()).collect();
    let version = match origin.base.name == registry::BUILT_IN {
        true => "difflora_tiny",
        false => metadata::SDXL_VERSION,
    };
    let everywhere = [
        (metadata::BASE_VERSION, version.to_string()),
        (metadata::TITLE, "a person, by difflora".to_string()),
        (metadata::RESOLUTION, metadata::resolution(origin.base.native_size)),
        ("difflora.hypernet", origin.hypernet.to_string()),
        ("difflora.reference_sha256", hashes.join(",")),
    ];
    let weights: Vec<String> = people.iter().map(|person| format!("{:.4}", person.weight)).collect();
    let sometimes = [
        ("difflora.mix", (people.len() > 1).then(|| weights.join(","))),
        ("difflora.vary", origin.vary.map(|vary| vary.to_string())),
        ("difflora.refine_steps", origin.refine.map(|(steps, _)| steps.to_string())),
    ];
    let sometimes = sometimes.into_iter().filter_map(|(key, value)| Some((key, value?)));
    let all = everywhere.into_iter().chain(metadata::of_base(origin.base_id)).chain(of_hypernet);
    lora.metadata.extend(all.chain(sometimes).map(|(key, value)| (key.to_string(), value)));
}
