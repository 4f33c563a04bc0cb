//! Any text: every reader of settings (TOML) and of model configs (JSON) returns or refuses; what is read can be counted.
#![no_main]

use difflora::diffusion::schedule::{NoiseSchedule, SchedulerConfig};
use difflora::limits;
use difflora::recipes::{base, dreambooth, encoder, hypernet_config, lae, lora_dataset};
use difflora::sdxl::text::ClipTextConfig;
use difflora::sdxl::unet::UNetConfig;
use difflora::sdxl::{counts, vae::VaeConfig};

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(table) = toml::from_str::<toml::Table>(text) {
        let _ = limits::check_toml(&table);
        let _ = table.clone().try_into::<base::config::Settings>();
        let _ = table.clone().try_into::<encoder::config::Settings>();
        let _ = table.clone().try_into::<hypernet_config::HypernetTrainConfig>();
        let _ = table.clone().try_into::<lae::config::Sweep>();
        let _ = table.clone().try_into::<lora_dataset::DatasetSettings>();
        if let Ok(settings) = table.try_into::<dreambooth::config::Settings>() {
            let _ = settings.check();
        }
    }
    if let Ok(config) = SchedulerConfig::from_json(text) {
        let _ = NoiseSchedule::new(&config);
    }
    let Ok(json) = serde_json::from_str::<serde_json::Value>(text) else { return };
    if limits::check_json(&json).is_err() {
        return;
    }
    if let Ok(config) = serde_json::from_value::<UNetConfig>(json.clone()) {
        let _ = counts::unet(&config, [16, 16], 77);
    }
    if let Ok(config) = serde_json::from_value::<VaeConfig>(json.clone()) {
        let _ = counts::vae(&config, [64, 64]);
    }
    if let Ok(config) = serde_json::from_value::<ClipTextConfig>(json) {
        let _ = counts::text_encoder(&config, 77);
    }
});
