//! Encoders of whole images, whose cosines say how alike two images are (CLIP-I, DINO), or an image and its prompt
//! (CLIP-T).

use anyhow::Result;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde_json::Value;

use crate::eval::dino::Dino;
use crate::identity::clip::ImageEncoder;
use crate::identity::unit;
use crate::image::Image;
use crate::limits;
use crate::sdxl::text::{ClipTextConfig, ClipTextModel};
use crate::sdxl::tokenizer::ClipTokenizer;
use crate::weights::model_folder::{ModelFiles, TRANSFORMERS_WEIGHTS};
use crate::weights::model_id::ModelId;

/// An image encoder of the evaluation.
pub struct ImageJudge {
    /// Name of its column, `CLIP-I` or `DINO`.
    pub title: &'static str,
    /// Name and hash of its weights.
    pub id: ModelId,
    network: Network,
    text: Option<ClipText>,
}

enum Network {
    Clip(ImageEncoder),
    Dino(Dino),
}

impl ImageJudge {
    /// CLIP: `CLIPVisionModelWithProjection`, or a whole `CLIPModel`, which also measures CLIP-T.
    ///
    /// # Errors
    /// As [`ImageEncoder::open`].
    pub fn clip(files: &ModelFiles, id: ModelId) -> Result<Self> {
        let network = Network::Clip(ImageEncoder::open(files)?);
        Ok(Self { title: "CLIP-I", id, network, text: ClipText::open(files)? })
    }

    /// DINO or DINOv2.
    ///
    /// # Errors
    /// As [`Dino::open`].
    pub fn dino(files: &ModelFiles, id: ModelId) -> Result<Self> {
        Ok(Self { title: "DINO", id, network: Network::Dino(Dino::open(files)?), text: None })
    }

    /// The unit vector of an image.
    pub fn embed(&self, image: &Image) -> Result<Vec<f32>> {
        match &self.network {
            Network::Clip(encoder) => encoder.embed_whole(image),
            Network::Dino(encoder) => encoder.embed(image),
        }
    }

    /// The unit vectors of prompts, in the space of the images; none without a text encoder.
    pub fn embed_prompts(&self, prompts: &[String]) -> Result<Option<Vec<Vec<f32>>>> {
        self.text.as_ref().map(|text| text.embed(prompts)).transpose()
    }
}

/// The text encoder of a whole `CLIPModel`.
struct ClipText {
    model: ClipTextModel,
    tokenizer: ClipTokenizer,
}

impl ClipText {
    /// None for a folder without a text encoder.
    fn open(files: &ModelFiles) -> Result<Option<Self>> {
        let whole: Value = files.config("config.json")?;
        let Some(text) = whole.get("text_config") else { return Ok(None) };
        let mut text = text.clone();
        if let Some(width) = whole.get("projection_dim") {
            text["projection_dim"] = width.clone();
        }
        text["architectures"] = serde_json::json!(["CLIPTextModelWithProjection"]);
        limits::check_json(&text).map_err(|why| files.unusable("config.json", why))?;
        let config: ClipTextConfig =
            serde_json::from_value(text).map_err(|error| files.unusable("config.json", error))?;
        let stored = files.reader("", TRANSFORMERS_WEIGHTS)?;
        let names = stored.names().into_iter();
        let names =
            names.filter(|name| name.starts_with("text_model.") || name.starts_with("text_projection."));
        let weights = names.map(|name| Ok((name.clone(), stored.load(&name, None)?)));
        let vb = VarBuilder::from_tensors(weights.collect::<Result<_>>()?, DType::F32, &Device::Cpu);
        let model = ClipTextModel::new(&config, vb)
            .map_err(|error| files.unusable("model.safetensors", format!("{error:#}")))?;
        Ok(Some(Self { model, tokenizer: ClipTokenizer::new(files, ".")? }))
    }

    fn embed(&self, prompts: &[String]) -> Result<Vec<Vec<f32>>> {
        let one = |prompt: &String| -> Result<Vec<f32>> {
            let ids = self.tokenizer.encode_batch(&[prompt], &Device::Cpu)?;
            unit(self.model.forward(&ids)?.pooled.squeeze(0)?.to_vec1()?, "CLIP's text encoder")
        };
        prompts.iter().map(one).collect()
    }
}
