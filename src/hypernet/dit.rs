//! Diffusion transformer over LoRA latents: x_t, t and a person's features → x_0.
//!
//! Peebles and Xie 2023 (arXiv 2212.09748) with adaLN-Zero, as in facebookresearch/DiT `models.py`; the latent is
//! cut into tokens of neighbouring values. Following Wu et al. 2024 (arXiv 2408.06740) it predicts x_0, not ε.

use anyhow::ensure;
use candle_core::{Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::layers::{Activation, Linear, attention, layer_norm_modulated};

/// A size with a name; facebookresearch/DiT `models.py`, `DiT_models`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DitSize {
    /// 33 million weights, not counting the token embeddings.
    S,
    /// 130 million.
    B,
    /// 458 million.
    L,
    /// 675 million.
    #[serde(rename = "XL")]
    Xl,
}

impl DitSize {
    /// Depth, width and heads.
    pub fn sizes(self) -> (usize, usize, usize) {
        match self {
            Self::S => (12, 384, 6),
            Self::B => (12, 768, 12),
            Self::L => (24, 1024, 16),
            Self::Xl => (28, 1152, 16),
        }
    }
}

/// Position embedding of the tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// A learned vector per token: positions in a LoRA latent have no order that sinusoids would express.
    #[default]
    Learned,
    /// Fixed sines and cosines, as in DiT.
    Sinusoidal,
}

impl Position {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Sizes of the transformer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DitConfig {
    /// L: values in a latent.
    pub latent: usize,
    /// Values in a token; L is a multiple.
    pub token: usize,
    /// D
    pub width: usize,
    /// Blocks.
    pub depth: usize,
    /// H
    pub heads: usize,
    /// Position embedding.
    #[serde(default, skip_serializing_if = "Position::is_default")]
    pub position: Position,
    /// Gaussians of the prior, each with a learned embedding; 0 for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub clusters: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl DitConfig {
    /// N
    pub fn tokens(&self) -> usize {
        self.latent / self.token
    }
}

/// The transformer.
#[derive(Clone, Debug)]
pub struct Dit {
    config: DitConfig,
    x_embedder: Linear,
    /// (N, D)
    pos_embed: Tensor,
    /// (K, D), where the prior has several Gaussians.
    cluster: Option<Tensor>,
    t_embedder: [Linear; 2],
    blocks: Vec<Block>,
    final_layer: FinalLayer,
}

impl Dit {
    /// Builds the network. The final layer is zero-initialised, so the untrained network outputs zero.
    ///
    /// # Errors
    /// Sizes that do not divide, with what to take instead.
    pub fn new(config: &DitConfig, vb: VarBuilder) -> anyhow::Result<Self> {
        let DitConfig { latent, token, width, depth, heads, clusters, .. } = *config;
        ensure!(
            token > 0 && latent > 0 && latent.is_multiple_of(token),
            "a latent of {latent} values does not part into tokens of {token}; take one of {:?}",
            (1..=latent).filter(|token| latent.is_multiple_of(*token)).collect::<Vec<_>>()
        );
        ensure!(heads > 0 && width.is_multiple_of(heads), "width {width} does not part into {heads} heads");
        let init = candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 };
        let pos_embed = match config.position {
            Position::Learned => vb.get_with_hints((config.tokens(), width), "pos_embed", init)?,
            Position::Sinusoidal => {
                ensure!(width.is_multiple_of(2), "sinusoidal positions need an even width, not {width}");
                sincos_pos_embed(config.tokens(), width, vb.device())?.to_dtype(vb.dtype())?
            }
        };
        // Zero, so that training starts as if there were one Gaussian.
        let cluster = || vb.get_with_hints((clusters, width), "cluster", candle_nn::Init::Const(0.0));
        Ok(Self {
            config: config.clone(),
            x_embedder: Linear::new(token, width, vb.pp("x_embedder").pp("proj"))?,
            pos_embed,
            cluster: (clusters > 0).then(cluster).transpose()?,
            t_embedder: [
                Linear::new(FREQUENCIES, width, vb.pp("t_embedder").pp("mlp").pp(0))?,
                Linear::new(width, width, vb.pp("t_embedder").pp("mlp").pp(2))?,
            ],
            blocks: (0..depth)
                .map(|i| Block::new(width, heads, vb.pp("blocks").pp(i)))
                .collect::<Result<_>>()?,
            final_layer: FinalLayer::new(width, token, vb.pp("final_layer"))?,
        })
    }

    /// The config of the network.
    pub fn config(&self) -> &DitConfig {
        &self.config
    }

    /// The condition (B, D) with the embedding of each sample's Gaussian added; `cluster` (B) u32.
    pub fn in_cluster(&self, condition: &Tensor, cluster: &Tensor) -> Result<Tensor> {
        match &self.cluster {
            Some(embeddings) => condition + embeddings.index_select(cluster, 0)?,
            None => Ok(condition.clone()),
        }
    }

    /// `x` (B, L), `t` (B) f32, `condition` (B, D) → x_0 (B, L).
    pub fn forward(&self, x: &Tensor, t: &Tensor, condition: &Tensor) -> Result<Tensor> {
        let (b, l) = x.dims2()?;
        let token = self.config.token;
        let tokens = self.x_embedder.forward(&x.reshape((b, l / token, token))?)?;
        let mut x = tokens.broadcast_add(&self.pos_embed)?; // (B, N, D)
        let t = self.t_embedder[0].forward(&sinusoid(t)?)?;
        let t = self.t_embedder[1].forward(&Activation::Silu.apply(&t)?)?;
        let c = Activation::Silu.apply(&(t + condition)?)?; // (B, D)
        for block in &self.blocks {
            x = block.forward(&x, &c)?;
        }
        self.final_layer.forward(&x, &c)?.reshape((b, l))
    }
}

/// Of LayerNorm; DiT `models.py`.
const EPS: f64 = 1e-6;

/// Width of the timestep's sinusoids; DiT `TimestepEmbedder`.
const FREQUENCIES: usize = 256;

/// cos and sin of t · 10000^(−i/128). `t` (B) → (B, 256).
fn sinusoid(t: &Tensor) -> Result<Tensor> {
    let half = FREQUENCIES / 2;
    let step = -(10_000f64.ln()) / half as f64;
    let frequencies: Vec<f32> = (0..half).map(|i| (step * i as f64).exp() as f32).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), t.device())?;
    let angles = t.unsqueeze(1)?.broadcast_mul(&frequencies)?;
    Tensor::cat(&[angles.cos()?, angles.sin()?], 1)
}

/// sin and cos of n · 10000^(−i/(D/2)) for n = 0 … N−1 (N, D); DiT `get_1d_sincos_pos_embed_from_grid`.
fn sincos_pos_embed(tokens: usize, width: usize, device: &Device) -> Result<Tensor> {
    let half = width / 2;
    let angle = |n: usize, i: usize| n as f64 / 10_000f64.powf(i as f64 / half as f64);
    let row = |n: usize| {
        (0..width).map(move |i| if i < half { angle(n, i).sin() } else { angle(n, i - half).cos() } as f32)
    };
    Tensor::from_vec((0..tokens).flat_map(row).collect::<Vec<f32>>(), (tokens, width), device)
}

/// Attention and feed-forward, each shifted, scaled and gated by the condition.
#[derive(Clone, Debug)]
struct Block {
    qkv: Linear,
    proj: Linear,
    mlp: [Linear; 2],
    ada_ln_modulation: Linear,
    heads: usize,
}

impl Block {
    fn new(width: usize, heads: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            qkv: Linear::new(width, 3 * width, vb.pp("attn").pp("qkv"))?,
            proj: Linear::new(width, width, vb.pp("attn").pp("proj"))?,
            mlp: [
                Linear::new(width, 4 * width, vb.pp("mlp").pp("fc1"))?,
                Linear::new(4 * width, width, vb.pp("mlp").pp("fc2"))?,
            ],
            // Zero, so that each block starts as the identity (adaLN-Zero).
            ada_ln_modulation: Linear::zeros(width, 6 * width, vb.pp("adaLN_modulation").pp(1))?,
            heads,
        })
    }

    /// `x` (B, N, D), `c` (B, D) after SiLU → (B, N, D).
    fn forward(&self, x: &Tensor, c: &Tensor) -> Result<Tensor> {
        let [shift, scale, gate, mlp_shift, mlp_scale, mlp_gate] =
            parts(&self.ada_ln_modulation.forward(c)?)?;
        let h = layer_norm_modulated(x, &shift, &scale, EPS)?;
        let d = h.dim(2)?;
        let qkv = self.qkv.forward(&h)?; // (B, N, 3D)
        let part = |i| qkv.narrow(2, i * d, d);
        let h = self.proj.forward(&attention(&part(0)?, &part(1)?, &part(2)?, self.heads, false)?)?;
        let x = (x + h.broadcast_mul(&gate)?)?;
        let h = layer_norm_modulated(&x, &mlp_shift, &mlp_scale, EPS)?;
        let h = self.mlp[1].forward(&Activation::GeluTanh.apply(&self.mlp[0].forward(&h)?)?)?;
        x + h.broadcast_mul(&mlp_gate)?
    }
}

/// Layer norm, shifted and scaled by the condition, and the projection to tokens.
#[derive(Clone, Debug)]
struct FinalLayer {
    ada_ln_modulation: Linear,
    linear: Linear,
}

impl FinalLayer {
    fn new(width: usize, token: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            ada_ln_modulation: Linear::zeros(width, 2 * width, vb.pp("adaLN_modulation").pp(1))?,
            linear: Linear::zeros(width, token, vb.pp("linear"))?,
        })
    }

    /// `x` (B, N, D), `c` (B, D) after SiLU → (B, N, token).
    fn forward(&self, x: &Tensor, c: &Tensor) -> Result<Tensor> {
        let [shift, scale] = parts(&self.ada_ln_modulation.forward(c)?)?;
        self.linear.forward(&layer_norm_modulated(x, &shift, &scale, EPS)?)
    }
}

/// (B, K·D) → K tensors (B, 1, D).
fn parts<const K: usize>(x: &Tensor) -> Result<[Tensor; K]> {
    let parts = x.unsqueeze(1)?.chunk(K, 2)?;
    parts.try_into().map_err(|_| candle_core::Error::Msg(format!("{:?} does not part into {K}", x.shape())))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::weights::Trainable;

    /// Values between −1 and 1 that look like chance.
    fn random(seed: usize, shape: &[usize]) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f32> =
            (0..count).map(|i| ((i + 31 * seed + 7) * 7919 % 1013) as f32 / 506.5 - 1.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn sizes() -> DitConfig {
        DitConfig {
            latent: 12,
            token: 4,
            width: 16,
            depth: 2,
            heads: 2,
            position: Position::Learned,
            clusters: 0,
        }
    }

    #[test]
    fn an_untrained_transformer_outputs_zero() {
        let dit = Dit::new(&sizes(), Trainable::new(1).builder(&Device::Cpu)).unwrap();
        let x = random(0, &[3, 12]);
        let condition = random(1, &[3, 16]);
        let t = Tensor::new(&[0f32, 10., 999.], &Device::Cpu).unwrap();
        let y = dit.forward(&x, &t, &condition).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), vec![vec![0.0; 12]; 3]);
    }

    #[test]
    fn a_sample_alone_and_in_a_batch_agrees() {
        let config = DitConfig { latent: 8, token: 2, depth: 1, heads: 4, ..sizes() };
        let trainable = Trainable::new(1);
        let dit = Dit::new(&config, trainable.builder(&Device::Cpu)).unwrap();
        for (i, var) in trainable.vars().values().enumerate() {
            let shift = random(5 + i, var.dims());
            var.set(&(var.as_tensor() + (shift * 0.1).unwrap()).unwrap()).unwrap();
        }
        let x = random(0, &[3, 8]);
        let condition = random(1, &[3, 16]);
        let t = Tensor::new(&[5f32, 10., 999.], &Device::Cpu).unwrap();
        let all = dit.forward(&x, &t, &condition).unwrap();
        let row = |x: &Tensor| x.narrow(0, 1, 1).unwrap();
        let one = dit.forward(&row(&x), &row(&t), &row(&condition)).unwrap();
        let worst = (one - row(&all)).unwrap().abs().unwrap().max_all().unwrap();
        assert!(worst.to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap() < 1e-5);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let config = DitConfig { latent: 10, ..sizes() };
        let error = Dit::new(&config, Trainable::new(1).builder(&Device::Cpu)).unwrap_err().to_string();
        assert!(error.contains("tokens of 4") && error.contains("[1, 2, 5, 10]"), "{error}");
    }

    #[test]
    fn named_sizes_are_those_of_the_paper() {
        // Peebles and Xie 2023, table 1 and 4: 33, 130, 458 and 675 million weights.
        for (size, millions) in [(DitSize::S, 33), (DitSize::B, 130), (DitSize::L, 458), (DitSize::Xl, 675)] {
            let (depth, width, heads) = size.sizes();
            assert!(width.is_multiple_of(heads));
            let block = 18 * width * width; // qkv 3, out 1, MLP 8, modulation 6
            let whole = depth * block + 2 * width * width + width * width + 256 * width + 1000 * width;
            assert!((whole / 1_000_000).abs_diff(millions) <= 2, "{size:?}: {whole}");
        }
    }

    #[test]
    fn each_gaussian_has_an_embedding_of_its_own() {
        let config = DitConfig { clusters: 3, position: Position::Sinusoidal, ..sizes() };
        let trainable = Trainable::new(1);
        let dit = Dit::new(&config, trainable.builder(&Device::Cpu)).unwrap();
        assert!(!trainable.vars().contains_key("pos_embed"));
        trainable.vars()["cluster"].set(&random(4, &[3, 16])).unwrap();
        let condition = random(1, &[2, 16]);
        let index = Tensor::new(&[2u32, 0], &Device::Cpu).unwrap();
        let rows = dit.in_cluster(&condition, &index).unwrap();
        let wanted = (condition + random(4, &[3, 16]).index_select(&index, 0).unwrap()).unwrap();
        assert_eq!(rows.to_vec2::<f32>().unwrap(), wanted.to_vec2::<f32>().unwrap());
    }
}
