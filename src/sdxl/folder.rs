//! An SDXL model of our own making, written as the folder that diffusers' `StableDiffusionXLPipeline` opens.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::text::ClipTextConfig;
use super::unet::UNetConfig;
use super::vae::VaeConfig;
use crate::files::write_whole;
use crate::weights::model_folder::{DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, save_component, save_json};

/// Weights by their names in diffusers or transformers.
pub type Weights = BTreeMap<String, Tensor>;

/// Everything that such a folder holds.
pub struct SdxlParts<'a> {
    /// The first text encoder, without projection.
    pub text_encoder: (&'a ClipTextConfig, &'a Weights),
    /// The second, with projection.
    pub text_encoder_2: (&'a ClipTextConfig, &'a Weights),
    /// The denoiser.
    pub unet: (&'a UNetConfig, &'a Weights),
    /// The codec between images and latents.
    pub vae: (&'a VaeConfig, &'a Weights),
    /// `vocab.json` and `merges.txt`, the same for both tokenizers;
    /// [`build_vocabulary`](super::tokenizer::build_vocabulary) makes them.
    pub vocabulary: (&'a str, &'a str),
    /// `scheduler_config.json`; its `_class_name` says which scheduler diffusers takes.
    pub scheduler: &'a Value,
}

impl SdxlParts<'_> {
    /// Writes the folder `root`, weights as `dtype`. `model_index.json` comes last: where it is, the model is whole.
    pub fn write(&self, root: &Path, dtype: DType) -> Result<()> {
        let class =
            self.scheduler["_class_name"].as_str().context("the scheduler's `_class_name` is missing")?;
        for (folder, (config, weights)) in
            [("text_encoder", self.text_encoder), ("text_encoder_2", self.text_encoder_2)]
        {
            save_component(root, folder, TRANSFORMERS_WEIGHTS, &config.to_json(), weights, dtype)?;
        }
        let (config, weights) = self.unet;
        let mut config = json!(config);
        config["_class_name"] = json!("UNet2DConditionModel");
        save_component(root, "unet", DIFFUSERS_WEIGHTS, &config, weights, dtype)?;
        let (config, weights) = self.vae;
        save_component(root, "vae", DIFFUSERS_WEIGHTS, &config.to_json(), weights, dtype)?;
        let length = self.text_encoder.0.max_position_embeddings;
        // SDXL pads its two prompts differently, and so do we: the second with the token `!`, number 0.
        self.write_tokenizer(&root.join("tokenizer"), length, "<|endoftext|>")?;
        self.write_tokenizer(&root.join("tokenizer_2"), length, "!")?;
        make_folder(&root.join("scheduler"))?;
        save_json(&root.join("scheduler/scheduler_config.json"), self.scheduler)?;
        let index = json!({
            "_class_name": "StableDiffusionXLPipeline",
            "feature_extractor": [null, null],
            "force_zeros_for_empty_prompt": false,
            "image_encoder": [null, null],
            "scheduler": ["diffusers", class],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        });
        save_json(&root.join("model_index.json"), &index)
    }

    fn write_tokenizer(&self, folder: &Path, length: usize, pad: &str) -> Result<()> {
        make_folder(folder)?;
        let (vocab, merges) = self.vocabulary;
        write_whole(&folder.join("vocab.json"), vocab.as_bytes())?;
        write_whole(&folder.join("merges.txt"), merges.as_bytes())?;
        let config = json!({
            "add_prefix_space": false,
            "bos_token": "<|startoftext|>",
            "do_lower_case": true,
            "eos_token": "<|endoftext|>",
            "errors": "replace",
            "model_max_length": length,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": "<|endoftext|>",
        });
        save_json(&folder.join("tokenizer_config.json"), &config)
    }
}

fn make_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::text::{ClipTextModel, TextEncoders};
    use super::super::tokenizer::build_vocabulary;
    use super::super::unet::UNet;
    use super::super::vae::Vae;
    use super::*;
    use crate::weights::Trainable;
    use crate::weights::model_folder::{ModelFiles, WeightType};

    /// Random weights for a network, by name.
    fn random<T>(seed: u64, build: impl FnOnce(candle_nn::VarBuilder) -> Result<T>) -> Weights {
        let trainable = Trainable::new(seed);
        build(trainable.builder(&Device::Cpu)).unwrap();
        trainable.vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect()
    }

    fn write(root: &Path, dtype: DType) {
        let (vocab, merges) = build_vocabulary(&["a", "photo", "of", "person"]).unwrap();
        let tokens = serde_json::from_str::<BTreeMap<String, u32>>(&vocab).unwrap().len();
        let text = |kind: &str| ClipTextConfig {
            architectures: vec![kind.into()],
            vocab_size: tokens,
            hidden_size: 16,
            intermediate_size: 32,
            projection_dim: 12,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            max_position_embeddings: 32,
            eos_token_id: tokens as u32 - 1,
            ..ClipTextConfig::default()
        };
        let (one, two) = (text("CLIPTextModel"), text("CLIPTextModelWithProjection"));
        let unet: UNetConfig = serde_json::from_value(json!({
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [8, 16], "cross_attention_dim": 32, "transformer_layers_per_block": [1, 1],
            "attention_head_dim": [1, 2], "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 60, "addition_embed_type": "text_time",
            "use_linear_projection": true,
        }))
        .unwrap();
        let vae = VaeConfig { sample_size: 16, scaling_factor: 0.5, ..VaeConfig::sized(&[8, 8], 1, 4) };
        SdxlParts {
            text_encoder: (&one, &random(1, |vb| ClipTextModel::new(&one, vb))),
            text_encoder_2: (&two, &random(2, |vb| ClipTextModel::new(&two, vb))),
            unet: (&unet, &random(3, |vb| UNet::new(&unet, vb))),
            vae: (&vae, &random(4, |vb| Vae::new(&vae, vb))),
            vocabulary: (&vocab, &merges),
            scheduler: &json!({ "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000 }),
        }
        .write(root, dtype)
        .unwrap();
    }

    #[test]
    fn weights_that_stay_f16_give_what_they_give_in_f32() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), DType::F16);
        let files = ModelFiles::folder(root.path()).unwrap();
        let halves = WeightType::as_good_as(DType::F32, &Device::Cpu);
        let vae: VaeConfig = files.config("vae/config.json").unwrap();
        let z = Tensor::ones((1, 4, 4, 4), DType::F32, &Device::Cpu).unwrap();
        let results = |weights: WeightType| {
            let text = TextEncoders::open(&files, weights, &Device::Cpu).unwrap();
            let context = text.encode_prompts(&["a photo"]).unwrap().context;
            let vae = files.load("vae", DIFFUSERS_WEIGHTS, weights, &Device::Cpu, |vb| Vae::new(&vae, vb));
            let vae = vae.unwrap();
            let image = vae.decode(&z).unwrap();
            assert_eq!((context.dtype(), image.dtype()), (DType::F32, DType::F32));
            let numbers = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (vae.dtype(), numbers(context), numbers(image))
        };
        let (narrow, wide) = (results(halves), results(DType::F32.into()));
        assert_eq!((narrow.0, wide.0), (DType::F16, DType::F32));
        assert!(narrow.1 == wide.1 && narrow.2 == wide.2);
    }

    #[test]
    fn a_written_model_opens_again() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), DType::F32);
        let files = ModelFiles::folder(root.path()).unwrap();
        let text = TextEncoders::open(&files, DType::F32, &Device::Cpu).unwrap();
        let conditioning = text.encode_prompts(&["a photo of a person", ""]).unwrap();
        assert_eq!(conditioning.context.dims(), [2, 32, 32]);
        assert_eq!(conditioning.pooled.dims(), [2, 12]);
        assert_eq!(text.tokenizer.encode("").unwrap()[2], text.tokenizer.encode("").unwrap()[1]);
        assert_eq!(text.tokenizer_2.encode("").unwrap()[2], 0);
        let unet: UNetConfig = files.config("unet/config.json").unwrap();
        files.load("unet", DIFFUSERS_WEIGHTS, DType::F32, &Device::Cpu, |vb| UNet::new(&unet, vb)).unwrap();
        let vae: VaeConfig = files.config("vae/config.json").unwrap();
        files.load("vae", DIFFUSERS_WEIGHTS, DType::F32, &Device::Cpu, |vb| Vae::new(&vae, vb)).unwrap();
    }
}
