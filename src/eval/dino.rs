//! DINO's and DINOv2's image encoders, whose class token says what is in an image.
//!
//! Layout and numbers are those of transformers 5.23, `ViTModel` (`facebook/dino-vits16`) and `Dinov2Model`
//! (`facebook/dinov2-small`), without the pooler. (Caron et al. 2021, arXiv 2104.14294; Oquab et al. 2023,
//! arXiv 2304.07193.) The implementation in candle-transformers reads other tensor names, those of Meta's own files,
//! and takes no other image size than it was trained with.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;

use crate::identity::clip::ClipPreprocessor;
use crate::identity::unit;
use crate::image::Image;
use crate::layers::{Activation, Conv2d, ConvGeometry, LayerNorm, Linear, attention};
use crate::weights::model_folder::{ModelFiles, TRANSFORMERS_WEIGHTS};

/// `config.json` of transformers. What a file leaves out has its default.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct DinoConfig {
    /// `vit` or `dinov2`.
    pub model_type: String,
    /// Width of a token, D.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads a layer.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward part of `vit`.
    pub intermediate_size: usize,
    /// The same of `dinov2`, as a multiple of D.
    pub mlp_ratio: usize,
    /// Side of the images that it was trained on, in pixels.
    pub image_size: usize,
    /// Side of the square that becomes one token, in pixels.
    pub patch_size: usize,
    /// The feed-forward part's non-linearity.
    pub hidden_act: Activation,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
    /// The gated feed-forward part of DINOv2's giant, which is not supported.
    pub use_swiglu_ffn: bool,
}

impl Default for DinoConfig {
    fn default() -> Self {
        Self {
            model_type: "vit".into(),
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            mlp_ratio: 4,
            image_size: 224,
            patch_size: 16,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            use_swiglu_ffn: false,
        }
    }
}

/// The image encoder.
#[derive(Clone, Debug)]
pub struct Dino {
    preprocessor: ClipPreprocessor,
    class_token: Tensor,
    /// (1 + G², D) for G×G patches of the images that it was trained on.
    positions: Tensor,
    patches: Conv2d,
    layers: Vec<DinoLayer>,
    norm: LayerNorm,
}

#[derive(Clone, Debug)]
struct DinoLayer {
    heads: usize,
    norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    /// DINOv2's factors on what a part adds, (D).
    scales: Option<[Tensor; 2]>,
    norm2: LayerNorm,
    fc1: Linear,
    act: Activation,
    fc2: Linear,
}

impl Dino {
    /// Reads a folder of transformers: `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// [`crate::failure::Failure::Unusable`] for files that are missing or damaged, or of another architecture.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        let config: DinoConfig = files.config("config.json")?;
        files.load("", TRANSFORMERS_WEIGHTS, DType::F32, &Device::Cpu, |vb| Self::new(&config, vb))
    }

    /// Builds it from the weights in `vb`.
    pub fn new(config: &DinoConfig, vb: VarBuilder) -> Result<Self> {
        let second = match config.model_type.as_str() {
            "vit" => false,
            "dinov2" => true,
            other => anyhow::bail!("`model_type` is `{other}`, wanted `vit` or `dinov2`"),
        };
        ensure!(!config.use_swiglu_ffn, "`use_swiglu_ffn` is not supported (DINOv2's giant has it)");
        let (width, patch) = (config.hidden_size, config.patch_size);
        ensure!(
            config.num_attention_heads > 0 && width % config.num_attention_heads == 0,
            "`hidden_size` {width} does not part into `num_attention_heads` {}",
            config.num_attention_heads
        );
        ensure!(
            (1..=config.image_size).contains(&patch),
            "`patch_size` {patch} does not fit into `image_size`"
        );
        let grid = config.image_size / patch;
        let table = vb.pp("embeddings");
        if second {
            table.get((1, width), "mask_token")?; // for training only
        }
        if vb.contains_tensor("pooler.dense.weight") {
            let pooler = vb.pp("pooler.dense");
            pooler.get((width, width), "weight")?;
            pooler.get(width, "bias")?;
        }
        let geometry = ConvGeometry { kernel: patch, stride: patch, pad_before: 0, pad_after: 0 };
        let layers = vb.pp("encoder.layer");
        Ok(Self {
            // DINO's own way of evaluating (DreamBooth's too): the short side to 256 pixels, and the middle 224 of it.
            preprocessor: ClipPreprocessor {
                shortest_edge: 256,
                crop: 224,
                mean: [0.485, 0.456, 0.406],
                std: [0.229, 0.224, 0.225],
            },
            class_token: table.get((1, 1, width), "cls_token")?,
            positions: table.get((1, 1 + grid * grid, width), "position_embeddings")?.squeeze(0)?,
            patches: Conv2d::new(3, width, geometry, table.pp("patch_embeddings.projection"))?,
            layers: (0..config.num_hidden_layers)
                .map(|i| DinoLayer::new(config, second, layers.pp(i)))
                .collect::<Result<_>>()?,
            norm: LayerNorm::new(width, config.layer_norm_eps, vb.pp("layernorm"))?,
        })
    }

    /// The unit vector of an image.
    pub fn embed(&self, image: &Image) -> Result<Vec<f32>> {
        let pixels = self.preprocessor.apply(image, &Device::Cpu)?.unsqueeze(0)?;
        unit(self.forward(&pixels)?.squeeze(0)?.to_vec1()?, "DINO")
    }

    /// `pixels` (B, 3, H, W), normalised, of whole patches → transformers' `last_hidden_state[:, 0]`, (B, D).
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let patches = self.patches.forward(pixels)?; // (B, D, h, w)
        let (b, width, h, w) = patches.dims4()?;
        let patches = patches.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        let class = self.class_token.broadcast_as((b, 1, width))?;
        let mut x =
            Tensor::cat(&[&class.contiguous()?, &patches], 1)?.broadcast_add(&self.positions_for(h, w)?)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        Ok(self.norm.forward(&x.narrow(1, 0, 1)?.contiguous()?)?.squeeze(1)?)
    }

    /// The position embeddings of h×w patches, (1 + h·w, D).
    fn positions_for(&self, h: usize, w: usize) -> Result<Tensor> {
        let (tokens, width) = self.positions.dims2()?;
        let grid = (tokens - 1).isqrt();
        if (h, w) == (grid, grid) {
            return Ok(self.positions.clone());
        }
        let known: Vec<f32> = self.positions.narrow(0, 1, tokens - 1)?.flatten_all()?.to_vec1()?;
        let (rows, columns) = (cubic(grid, h), cubic(grid, w));
        let mut values = vec![0f32; h * w * width];
        for (y, row) in rows.iter().enumerate() {
            for (x, column) in columns.iter().enumerate() {
                let place = &mut values[(y * w + x) * width..][..width];
                for (from_y, wy) in row {
                    for (from_x, wx) in column {
                        let source = &known[(from_y * grid + from_x) * width..][..width];
                        place.iter_mut().zip(source).for_each(|(to, from)| *to += wy * wx * from);
                    }
                }
            }
        }
        let class = self.positions.narrow(0, 0, 1)?;
        Ok(Tensor::cat(&[&class, &Tensor::from_vec(values, (h * w, width), self.positions.device())?], 0)?)
    }
}

/// Where each of `to` places among `from` lies, with four weights: PyTorch's bicubic interpolation without
/// `align_corners`, with a = −0.75, and places beyond the border taken from the border.
fn cubic(from: usize, to: usize) -> Vec<[(usize, f32); 4]> {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let scale = from as f64 / to as f64;
    let place = |i: usize| {
        let at = (i as f64 + 0.5) * scale - 0.5;
        let t = at - at.floor();
        let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
        std::array::from_fn(|k| {
            let source = (at.floor() as isize + k as isize - 1).clamp(0, from as isize - 1);
            (source as usize, weights[k] as f32)
        })
    };
    (0..to).map(place).collect()
}

impl DinoLayer {
    fn new(config: &DinoConfig, second: bool, vb: VarBuilder) -> Result<Self> {
        let (width, eps) = (config.hidden_size, config.layer_norm_eps);
        let inner = if second { width * config.mlp_ratio } else { config.intermediate_size };
        let [norm1, norm2, fc1, fc2] = match second {
            false => ["layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"],
            true => ["norm1", "norm2", "mlp.fc1", "mlp.fc2"],
        };
        let projection = |name: &str| Linear::new(width, width, vb.pp("attention.attention").pp(name));
        let scale = |name: &str| vb.pp(name).get(width, "lambda1");
        Ok(Self {
            heads: config.num_attention_heads,
            norm1: LayerNorm::new(width, eps, vb.pp(norm1))?,
            query: projection("query")?,
            key: projection("key")?,
            value: projection("value")?,
            out: Linear::new(width, width, vb.pp("attention.output.dense"))?,
            scales: second
                .then(|| Ok::<_, anyhow::Error>([scale("layer_scale1")?, scale("layer_scale2")?]))
                .transpose()?,
            norm2: LayerNorm::new(width, eps, vb.pp(norm2))?,
            fc1: Linear::new(width, inner, vb.pp(fc1))?,
            act: config.hidden_act,
            fc2: Linear::new(inner, width, vb.pp(fc2))?,
        })
    }

    /// (B, N, D) → same.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let scaled = |part: usize, added: Tensor| match &self.scales {
            Some(scales) => added.broadcast_mul(&scales[part]),
            None => Ok(added),
        };
        let h = self.norm1.forward(x)?;
        let (q, k, v) = (self.query.forward(&h)?, self.key.forward(&h)?, self.value.forward(&h)?);
        let x = (x + scaled(0, self.out.forward(&attention(&q, &k, &v, self.heads, false)?)?)?)?;
        let h = self.act.apply(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        x + scaled(1, self.fc2.forward(&h)?)?
    }
}
