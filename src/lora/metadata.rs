//! Metadata of LoRA files: `ss_…` of sd-scripts, `modelspec.…` of ModelSpec 1.0.1, and our own `difflora.…`.

use std::collections::BTreeMap;

use super::adapter::{Adapter, AdapterFile};
use crate::weights::model_id::ModelId;

/// Title that programs show.
pub const TITLE: &str = "modelspec.title";
/// Side of the images, `1024x1024`.
pub const RESOLUTION: &str = "modelspec.resolution";
/// Words in a prompt that call the person.
pub const TRIGGER_PHRASE: &str = "modelspec.trigger_phrase";
/// SHA-256 of the tensors' bytes, with `0x` before it.
pub const DATA_HASH: &str = "modelspec.hash_sha256";
/// Version of the base, as sd-scripts names it.
pub const BASE_VERSION: &str = "ss_base_model_version";
/// Name of the base that a LoRA of this program is for.
pub const BASE: &str = "difflora.base";
/// SHA-256 of that base's UNet weights.
pub const BASE_SHA256: &str = "difflora.base_sha256";
/// LoRAs that a model was merged with.
pub const MERGED: &str = "difflora.merged";

/// `ss_base_model_version` of SDXL.
pub const SDXL_VERSION: &str = "sdxl_base_v1-0";

/// Entries that name the base of a LoRA.
pub fn of_base(base: &ModelId) -> [(&'static str, String); 2] {
    [(BASE, base.name.clone()), (BASE_SHA256, base.sha256.clone())]
}

/// The value of [`RESOLUTION`] for square images of `side` pixels.
pub fn resolution(side: usize) -> String {
    format!("{side}x{side}")
}

/// The metadata that a file is written with: what follows from its tensors, defaults, and over these its own.
///
/// PEFT files store the scale in `up`, so that their alpha is the rank: `alpha_is_rank`.
pub(super) fn of(adapters: &AdapterFile, alpha_is_rank: bool) -> BTreeMap<String, String> {
    let one = |values: Vec<String>| {
        let same = values.windows(2).all(|pair| pair[0] == pair[1]);
        if same { values.into_iter().next().unwrap_or_default() } else { "Dynamic".to_string() }
    };
    let numbers: Vec<(usize, f32)> = adapters.modules.values().filter_map(Adapter::rank_and_alpha).collect();
    let rank = one(numbers.iter().map(|(rank, _)| rank.to_string()).collect());
    let alpha = one(numbers.iter().map(|(_, alpha)| alpha.to_string()).collect());
    let alpha = if alpha_is_rank { rank.clone() } else { alpha };
    let plain = adapters.modules.values().all(|adapter| ["LoRA", "LoCon"].contains(&adapter.kind_name()));
    let standard = [
        ("format", "pt".to_string()),
        ("ss_network_module", if plain { "networks.lora" } else { "lycoris.kohya" }.to_string()),
        ("ss_network_dim", rank),
        ("ss_network_alpha", alpha),
        (BASE_VERSION, SDXL_VERSION.to_string()),
        ("ss_v2", "False".to_string()),
        ("modelspec.sai_model_spec", "1.0.1".to_string()),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora".to_string()),
        ("modelspec.implementation", "https://github.com/Stability-AI/generative-models".to_string()),
        (TITLE, "difflora LoRA".to_string()),
        ("difflora.version", env!("CARGO_PKG_VERSION").to_string()),
        (RESOLUTION, resolution(1024)),
    ];
    let mut metadata: BTreeMap<String, String> =
        standard.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    for (key, value) in &adapters.metadata {
        // Rank and alpha follow from the tensors; `lora_adapter_metadata` describes the file that was read.
        let replaced = ["ss_network_dim", "ss_network_alpha", "lora_adapter_metadata"];
        if !replaced.contains(&key.as_str()) {
            metadata.insert(key.clone(), value.clone());
        }
    }
    metadata
}
