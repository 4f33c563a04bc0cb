//! The settings of an image: A1111's `parameters` text in its metadata, and the JSON beside it.

use serde_json::{Value, json};

use super::lora_stack::StackedLora;
use crate::files;
use crate::named::Named;
use crate::sdxl::pipeline::Sampler;
use crate::weights::model_id::ModelId;

/// Everything that an image depends on.
pub struct Settings<'a> {
    /// Prompt.
    pub prompt: &'a str,
    /// Negative prompt.
    pub negative_prompt: Option<&'a str>,
    /// Sampling method.
    pub sampler: Sampler,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// Width and height.
    pub size: [usize; 2],
    /// Base model.
    pub base: &'a ModelId,
    /// LoRAs and their weights.
    pub loras: &'a [StackedLora],
}

impl Settings<'_> {
    /// The text that A1111 and its relatives read from an image (`modules/infotext_utils.py`,
    /// `parse_generation_parameters`).
    pub fn parameters(&self) -> String {
        let mut text = self.prompt.to_string();
        for lora in self.loras {
            text.push_str(&format!(" <lora:{}:{}>", lora.name, lora.strength.everywhere()));
        }
        if let Some(negative) = self.negative_prompt {
            text.push_str(&format!("\nNegative prompt: {negative}"));
        }
        let [width, height] = self.size;
        text.push_str(&format!(
            "\nSteps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {width}x{height}, Model hash: {}, Model: {}",
            self.steps,
            self.sampler.a1111_name(),
            self.guidance,
            self.seed,
            &self.base.sha256[..10],
            quoted(&self.base.name),
        ));
        if !self.loras.is_empty() {
            let hashes: Vec<String> =
                self.loras.iter().map(|lora| format!("{}: {}", lora.name, &lora.hash[..12])).collect();
            text.push_str(&format!(", Lora hashes: {}", quoted(&hashes.join(", "))));
        }
        text.push_str(&format!(", {}", files::version_mark()));
        text
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        let loras: Vec<Value> = self
            .loras
            .iter()
            .map(|lora| json!({ "name": lora.name, "weight": lora.strength.everywhere(), "hash": lora.hash }))
            .collect();
        json!({
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "sampler": self.sampler.name(),
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "width": self.size[0],
            "height": self.size[1],
            "model": { "name": self.base.name, "sha256": self.base.sha256 },
            "loras": loras,
            "version": env!("CARGO_PKG_VERSION"),
        })
    }
}

/// A value as A1111 writes it: in quotation marks where it holds a separator.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n', '"']) { json!(value).to_string() } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::adapter::AdapterFile;
    use crate::lora::block_weights::BlockWeights;
    use crate::lora::summary::Summary;

    #[test]
    fn settings_are_spelt_as_a1111_spells_them() {
        let base = ModelId { name: "my: model".into(), sha256: "0123456789abcdef".into() };
        let (strength, changes, report) =
            (BlockWeights::all(0.8), AdapterFile::default(), Summary::default());
        let loras = [StackedLora {
            name: "anna".into(),
            file: "anna.safetensors".into(),
            strength,
            hash: "fedcba9876543210".into(),
            changes,
            report,
        }];
        let settings = Settings {
            prompt: "a cat",
            negative_prompt: Some("blurry"),
            sampler: Sampler::Dpmpp2mKarras,
            steps: 20,
            guidance: 7.5,
            seed: 42,
            size: [1024, 768],
            base: &base,
            loras: &loras,
        };
        let wanted = format!(
            "a cat <lora:anna:0.8>\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, \
             Seed: 42, Size: 1024x768, Model hash: 0123456789, Model: \"my: model\", \
             Lora hashes: \"anna: fedcba987654\", Version: difflora {}",
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(settings.parameters(), wanted);
        assert_eq!(settings.to_json()["sampler"], "dpmpp-2m-karras");
    }
}
