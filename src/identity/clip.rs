//! CLIP's image encoder: an image → the embedding of what is in it.
//!
//! Layout and numbers are those of transformers 5.23, `CLIPVisionModelWithProjection`
//! (`models/clip/modeling_clip.py`) and `CLIPImageProcessor`. (Radford et al. 2021, arXiv 2103.00020.)

use anyhow::{Result, ensure};
use candle_core::{Device, Module, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::crop::{blank_background, portrait_crop};
use super::{Face, unit};
use crate::image::{Filter, Image};
use crate::layers::{
    Activation, ClipTransformer, ClipTransformerSizes, Conv2d, ConvGeometry, LayerNorm, Linear, compute_dtype,
};
use crate::limits;
use crate::weights::model_folder::{ModelFiles, TRANSFORMERS_WEIGHTS};

/// Image and face → unit vector of what the person looks like, the second condition of the hypernetwork.
#[derive(Clone, Debug)]
pub struct ImageEncoder {
    network: ClipVision,
    preprocessor: ClipPreprocessor,
    input: ImageInput,
}

impl ImageEncoder {
    /// Reads a `CLIPVisionModelWithProjection` folder, as of IP-Adapter's ViT-H/14, or a whole `CLIPModel`, as of
    /// openai/clip-vit-large-14: `config.json`, `model.safetensors`, `preprocessor_config.json`.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        let preprocessor = files.json("preprocessor_config.json")?;
        let whole: Value = files.config("config.json")?;
        let network = match whole.get("vision_config") {
            Some(vision) => ClipVision::of_whole_clip(files, vision, &whole)?,
            None => {
                let config: ClipVisionConfig = files.config("config.json")?;
                let build = |vb| ClipVision::new(&config, vb);
                let dtype = files.narrow_dtype(TRANSFORMERS_WEIGHTS, CLASS, &Device::Cpu);
                files.load("", TRANSFORMERS_WEIGHTS, dtype, &Device::Cpu, build)?
            }
        };
        Ok(Self { network, preprocessor, input: ImageInput::default() })
    }

    /// The same encoder, shown and asked for what a hypernetwork wants.
    pub fn with_input(self, input: ImageInput) -> Self {
        Self { input, ..self }
    }

    /// The unit vector of the [`portrait_crop`] around a face of `image`; P numbers, or D with
    /// another output.
    pub fn embed(&self, image: &Image, face: &Face) -> Result<Vec<f32>> {
        self.embed_whole(&self.shown(image, face))
    }

    /// Input of the network: the [`portrait_crop`], with a blank background if configured.
    pub fn shown(&self, image: &Image, face: &Face) -> Image {
        let mut crop = portrait_crop(image, face, self.preprocessor.shortest_edge);
        if self.input.blank_background {
            blank_background(&mut crop, face);
        }
        crop
    }

    /// The unit vector of an image as it is, of which CLIP's preprocessing cuts out the middle.
    pub fn embed_whole(&self, image: &Image) -> Result<Vec<f32>> {
        let embedding = match self.input.output {
            ImageOutput::Projected => self.network.forward(&self.pixels(image)?)?,
            ImageOutput::Penultimate => self.network.penultimate(&self.pixels(image)?)?.mean(1)?,
        };
        unit(embedding.squeeze(0)?.to_vec1()?, "the image encoder")
    }

    /// transformers' `hidden_states[-2]` of an image as it is: (N, D), the class token first.
    pub fn tokens(&self, image: &Image) -> Result<Tensor> {
        Ok(self.network.penultimate(&self.pixels(image)?)?.squeeze(0)?)
    }

    /// (1, 3, S, S)
    fn pixels(&self, image: &Image) -> Result<Tensor> {
        Ok(self.preprocessor.apply(image, &Device::Cpu)?.unsqueeze(0)?)
    }
}

/// Input of the image encoder, and the output that is the condition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageInput {
    /// The output that is taken.
    pub output: ImageOutput,
    /// Whether all that lies outside an ellipse around the face's box is made grey, so that the place where the photo
    /// was taken is not learnt as part of the person.
    pub blank_background: bool,
}

impl ImageInput {
    /// Whether it is the default, which configs leave out.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// An output of the image encoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageOutput {
    /// transformers' `image_embeds`, P numbers.
    #[default]
    Projected,
    /// The mean over all tokens of transformers' `hidden_states[-2]`, D numbers. The mean is ours: HyperLoRA and
    /// IP-Adapter give the tokens to a resampler one by one.
    Penultimate,
}

/// `config.json` of an image encoder. What a file leaves out has transformers' default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    /// Width of a token, D.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Width of the embedding, P.
    pub projection_dim: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads a layer.
    pub num_attention_heads: usize,
    /// Channels of an image.
    pub num_channels: usize,
    /// Side of the image, in pixels.
    pub image_size: usize,
    /// Side of the square that becomes one token, in pixels.
    pub patch_size: usize,
    /// The feed-forward part's non-linearity.
    pub hidden_act: Activation,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

impl ClipVisionConfig {
    /// The whole `config.json`, as transformers opens it.
    pub fn to_json(&self) -> Value {
        let mut config = json!(self);
        config["architectures"] = json!(["CLIPVisionModelWithProjection"]);
        config["model_type"] = json!("clip_vision_model");
        config
    }

    fn sizes(&self) -> ClipTransformerSizes {
        ClipTransformerSizes {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
        }
    }
}

/// A tensor that stands for the type in which all are stored.
const CLASS: &str = "vision_model.embeddings.class_embedding";

/// The image encoder.
#[derive(Clone, Debug)]
pub struct ClipVision {
    class_embedding: Tensor,
    patch_embedding: Conv2d,
    position_embedding: Tensor,
    pre_layrnorm: LayerNorm,
    encoder: ClipTransformer,
    post_layernorm: LayerNorm,
    visual_projection: Linear,
    image_size: usize,
}

impl ClipVision {
    /// Builds it from the weights in `vb`.
    pub fn new(config: &ClipVisionConfig, vb: VarBuilder) -> Result<Self> {
        let (width, patch, side) = (config.hidden_size, config.patch_size, config.image_size);
        ensure!(
            config.num_attention_heads > 0 && width % config.num_attention_heads == 0,
            "`hidden_size` {width} does not part into `num_attention_heads` {}",
            config.num_attention_heads
        );
        ensure!((1..=side).contains(&patch), "`patch_size` {patch} does not fit into `image_size` {side}");
        let tokens = (side / patch).pow(2) + 1;
        let inner = vb.pp("vision_model");
        let table = inner.pp("embeddings");
        // They are added to activations.
        let added = compute_dtype(vb.dtype(), vb.device());
        let normal = |stdev: f64| Init::Randn { mean: 0.0, stdev };
        let geometry = ConvGeometry { kernel: patch, stride: patch, pad_before: 0, pad_after: 0 };
        let norm = |name: &str| LayerNorm::new(width, config.layer_norm_eps, inner.pp(name));
        Ok(Self {
            class_embedding: table.get_with_hints_dtype(
                width,
                "class_embedding",
                normal((width as f64).powf(-0.5)),
                added,
            )?,
            patch_embedding: Conv2d::without_bias(
                config.num_channels,
                width,
                geometry,
                table.pp("patch_embedding"),
            )?,
            position_embedding: table.pp("position_embedding").get_with_hints_dtype(
                (tokens, width),
                "weight",
                normal(0.02),
                added,
            )?,
            pre_layrnorm: norm("pre_layrnorm")?,
            encoder: ClipTransformer::new(&config.sizes(), inner.pp("encoder.layers"))?,
            post_layernorm: norm("post_layernorm")?,
            visual_projection: Linear::without_bias(
                width,
                config.projection_dim,
                vb.pp("visual_projection"),
            )?,
            image_size: side,
        })
    }

    /// The image encoder of a `CLIPModel`, whose weights lie beside those of its text encoder.
    fn of_whole_clip(files: &ModelFiles, vision: &Value, whole: &Value) -> Result<Self> {
        let mut vision = vision.clone();
        // The width of the projection stands outside, where both encoders share it.
        if let Some(width) = whole.get("projection_dim") {
            vision["projection_dim"] = width.clone();
        }
        limits::check_json(&vision).map_err(|why| files.unusable("config.json", why))?;
        let config: ClipVisionConfig =
            serde_json::from_value(vision).map_err(|error| files.unusable("config.json", error))?;
        let stored = files.reader("", TRANSFORMERS_WEIGHTS)?;
        let of_vision =
            |name: &String| name.starts_with("vision_model.") || name.starts_with("visual_projection.");
        let names = stored.names().into_iter().filter(of_vision);
        let weights = names.map(|name| Ok((name.clone(), stored.load(&name, None)?)));
        let dtype = files.narrow_dtype(TRANSFORMERS_WEIGHTS, CLASS, &Device::Cpu);
        let vb = VarBuilder::from_tensors(weights.collect::<Result<_>>()?, dtype, &Device::Cpu);
        Self::new(&config, vb).map_err(|error| files.unusable("model.safetensors", format!("{error:#}")))
    }

    /// Embeddings of images from [`ClipPreprocessor`]: `pixels` (B, 3, S, S) → (B, P), not normalised.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (_, x) = self.hidden(pixels)?;
        let pooled = self.post_layernorm.forward(&x.narrow(1, 0, 1)?.squeeze(1)?)?; // (B, D)
        Ok(self.visual_projection.forward(&pooled)?)
    }

    /// Input of the last layer, transformers' `hidden_states[-2]`: `pixels` (B, 3, S, S) → (B, N, D), the class
    /// token first.
    pub fn penultimate(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(self.hidden(pixels)?.0)
    }

    /// Input and output of the last layer, each (B, N, D).
    fn hidden(&self, pixels: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, _, h, w) = pixels.dims4()?;
        let side = self.image_size;
        ensure!(h == side && w == side, "the image encoder wants {side}×{side} pixels, was given {w}×{h}");
        let patches = self.patch_embedding.forward(pixels)?.flatten_from(2)?.transpose(1, 2)?; // (B, N − 1, D)
        let class = self.class_embedding.reshape((1, 1, ()))?;
        let class = class.broadcast_as((b, 1, class.elem_count()))?;
        let x = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.position_embedding)?; // (B, N, D)
        Ok(self.encoder.forward(&self.pre_layrnorm.forward(&x)?, false)?)
    }
}

/// `preprocessor_config.json`: shortest side resized, centre cut out, colours normalised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "PreprocessorFile", into = "PreprocessorFile")]
pub struct ClipPreprocessor {
    /// Shortest side after resizing, in pixels.
    pub shortest_edge: usize,
    /// Side of the square that is cut out, in pixels.
    pub crop: usize,
    /// Mean of red, green and blue in 0…1.
    pub mean: [f32; 3],
    /// Standard deviation of them.
    pub std: [f32; 3],
}

impl ClipPreprocessor {
    /// CLIP's own colours at another size of image.
    pub fn sized(side: usize) -> Self {
        Self {
            shortest_edge: side,
            crop: side,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }

    /// (3, S, S) for [`ClipVision::forward`].
    pub fn apply(&self, image: &Image, device: &Device) -> Result<Tensor> {
        let (short, side) = (self.shortest_edge, self.crop);
        ensure!(side <= short, "`crop_size` {side} is larger than `shortest_edge` {short}");
        let shortest = image.width.min(image.height);
        let scaled = |length: usize| short * length / shortest;
        let resized = image.resize(scaled(image.width), scaled(image.height), Filter::Bicubic);
        let (left, top) = ((resized.width - side) / 2, (resized.height - side) / 2);
        let cut = resized.crop(left, top, side, side);
        let mut values = Vec::with_capacity(3 * side * side);
        for channel in 0..3 {
            let (mean, std) = (self.mean[channel] * 255.0, self.std[channel] * 255.0);
            values
                .extend(cut.rgb.iter().skip(channel).step_by(3).map(|byte| (f32::from(*byte) - mean) / std));
        }
        Ok(Tensor::from_vec(values, (3, side, side), device)?)
    }
}

/// The spelling of `preprocessor_config.json`, old and new.
#[derive(Clone, Serialize, Deserialize)]
struct PreprocessorFile {
    #[serde(default = "processor_type")]
    image_processor_type: String,
    #[serde(default)]
    size: Size,
    #[serde(default)]
    crop_size: Size,
    #[serde(default = "mean")]
    image_mean: [f32; 3],
    #[serde(default = "std")]
    image_std: [f32; 3],
}

fn processor_type() -> String {
    "CLIPImageProcessor".into()
}

fn mean() -> [f32; 3] {
    ClipPreprocessor::sized(224).mean
}

fn std() -> [f32; 3] {
    ClipPreprocessor::sized(224).std
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Size {
    Shortest { shortest_edge: usize },
    Square { height: usize, width: usize },
    Number(usize),
}

impl Default for Size {
    fn default() -> Self {
        Self::Number(224)
    }
}

impl Size {
    fn side(&self) -> usize {
        match *self {
            Self::Shortest { shortest_edge } => shortest_edge,
            Self::Square { height, width } => height.min(width),
            Self::Number(side) => side,
        }
    }
}

impl From<PreprocessorFile> for ClipPreprocessor {
    fn from(file: PreprocessorFile) -> Self {
        Self {
            shortest_edge: file.size.side(),
            crop: file.crop_size.side(),
            mean: file.image_mean,
            std: file.image_std,
        }
    }
}

impl From<ClipPreprocessor> for PreprocessorFile {
    fn from(settings: ClipPreprocessor) -> Self {
        Self {
            image_processor_type: processor_type(),
            size: Size::Shortest { shortest_edge: settings.shortest_edge },
            crop_size: Size::Square { height: settings.crop, width: settings.crop },
            image_mean: settings.mean,
            image_std: settings.std,
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::weights::Trainable;
    use crate::weights::model_folder::{save_component, save_json};

    #[test]
    fn an_image_encoder_opens_from_its_folder_and_gives_unit_vectors() {
        let out = tempfile::tempdir().unwrap();
        let config = ClipVisionConfig {
            image_size: 16,
            patch_size: 8,
            hidden_size: 8,
            intermediate_size: 8,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            projection_dim: 12,
            ..ClipVisionConfig::default()
        };
        let trainable = Trainable::new(5);
        ClipVision::new(&config, trainable.builder(&Device::Cpu)).unwrap();
        let weights: std::collections::BTreeMap<String, Tensor> =
            trainable.vars().into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
        save_component(out.path(), "", TRANSFORMERS_WEIGHTS, &config.to_json(), &weights, DType::F16)
            .unwrap();
        let preprocessor = json!(ClipPreprocessor::sized(16));
        save_json(&out.path().join("preprocessor_config.json"), &preprocessor).unwrap();

        let rgb = (0..40 * 30 * 3).map(|i| (i * i % 251) as u8).collect();
        let image = Image { width: 40, height: 30, rgb };
        let face = Face { bounds: [8.0, 6.0, 24.0, 28.0], points: [[0.0; 2]; 5], score: 1.0 };
        let encoder = ImageEncoder::open(&ModelFiles::folder(out.path()).unwrap()).unwrap();
        let embedding = encoder.embed(&image, &face).unwrap();
        assert_eq!(embedding.len(), 12);
        let as_input = |text: &str| {
            encoder.clone().with_input(serde_json::from_str(text).unwrap()).embed(&image, &face).unwrap()
        };
        assert_eq!(as_input("{}"), embedding);
        assert_ne!(encoder.embed_whole(&image).unwrap(), embedding);
        let tokens = encoder.tokens(&portrait_crop(&image, &face, 16)).unwrap();
        assert_eq!(tokens.dims(), [5, 8]);
        let mean: Vec<f32> = tokens.mean(0).unwrap().to_vec1().unwrap();
        assert!(crate::identity::cosine(&mean, &as_input(r#"{"output": "penultimate"}"#)) > 0.99999);
        assert_eq!(as_input(r#"{"output": "penultimate"}"#).len(), 8);
        assert_ne!(as_input(r#"{"blank_background": true}"#), embedding);
        assert!(serde_json::from_str::<ImageInput>(r#"{"background": true}"#).is_err());

        // The same weights beside a text encoder's, as a whole CLIP has them.
        let whole = tempfile::tempdir().unwrap();
        let mut beside = weights.clone();
        beside.insert(
            "text_model.final_layer_norm.bias".into(),
            Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap(),
        );
        let mut vision = config.to_json();
        vision["projection_dim"] = json!(512);
        let of_whole = json!({ "vision_config": vision, "text_config": {}, "projection_dim": 12 });
        save_component(whole.path(), "", TRANSFORMERS_WEIGHTS, &of_whole, &beside, DType::F16).unwrap();
        save_json(&whole.path().join("preprocessor_config.json"), &preprocessor).unwrap();
        let files = ModelFiles::folder(whole.path()).unwrap();
        assert_eq!(ImageEncoder::open(&files).unwrap().embed(&image, &face).unwrap(), embedding);
        beside.remove("visual_projection.weight");
        save_component(whole.path(), "", TRANSFORMERS_WEIGHTS, &of_whole, &beside, DType::F16).unwrap();
        let message = format!("{:#}", ImageEncoder::open(&files).unwrap_err());
        assert!(message.contains("visual_projection"), "{message}");
        assert!((embedding.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
