//! Prompt → conditioning: SDXL's two CLIP text encoders.
//!
//! The UNet attends to `hidden_states[-2]` of both encoders side by side (no final norm), and is given the
//! projected pooled output of the second. (Podell et al. 2023, arXiv 2307.01952, section 2.1; as in diffusers'
//! `StableDiffusionXLPipeline.encode_prompt`.)

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Module, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::layers::{
    Activation, ClipTransformer, ClipTransformerSizes, Layer, LayerNorm, Linear, Visit, compute_dtype,
};
use crate::lora::embedding::Embedding;
use crate::weights::model_folder::{ModelFiles, TRANSFORMERS_WEIGHTS, WeightType};

use super::tokenizer::ClipTokenizer;

/// Encoded prompts, as the UNet takes them.
#[derive(Clone, Debug)]
pub struct TextConditioning {
    /// (B, N, D₁ + D₂)
    pub context: Tensor,
    /// (B, P)
    pub pooled: Tensor,
}

/// Both tokenizers and encoders of an SDXL model.
#[derive(Clone)]
pub struct TextEncoders {
    /// `tokenizer/`
    pub tokenizer: ClipTokenizer,
    /// `text_encoder/`, CLIP-L in SDXL.
    pub encoder: ClipTextModel,
    /// `tokenizer_2/`, which pads with another token.
    pub tokenizer_2: ClipTokenizer,
    /// `text_encoder_2/`, OpenCLIP bigG in SDXL, with projection.
    pub encoder_2: ClipTextModel,
    /// Words of both tokenizers that stand for vectors of textual inversions.
    pub(super) words: [Vec<Word>; 2],
}

/// A word that stands for the vectors of a textual inversion.
#[derive(Clone, Debug)]
pub(super) struct Word {
    pub(super) name: String,
    /// The tokens that the word has without it.
    pub(super) tokens: Vec<u32>,
    /// The numbers of its vectors in the table of token embeddings.
    pub(super) vectors: Vec<u32>,
}

impl TextEncoders {
    /// Reads the four folders of a model.
    pub fn open(files: &ModelFiles, weights: impl Into<WeightType>, device: &Device) -> Result<Self> {
        let weights = weights.into();
        let encoder = |folder: &str| {
            let config: ClipTextConfig = files.config(&format!("{folder}/config.json"))?;
            files.load(folder, TRANSFORMERS_WEIGHTS, weights, device, |vb| ClipTextModel::new(&config, vb))
        };
        let tokenizers = [ClipTokenizer::new(files, "tokenizer")?, ClipTokenizer::new(files, "tokenizer_2")?];
        let [length, other] = [0, 1].map(|i: usize| tokenizers[i].max_length());
        if length != other {
            let why = format!(
                "`model_max_length` is {other}, that of `tokenizer` is {length}; SDXL needs the same"
            );
            return Err(files.unusable("tokenizer_2/tokenizer_config.json", why));
        }
        let encoders = [encoder("text_encoder")?, encoder("text_encoder_2")?];
        for (encoder, folder) in encoders.iter().zip(["tokenizer", "tokenizer_2"]) {
            let positions = encoder.position_embedding.dim(0)?;
            if length > positions {
                let why =
                    format!("`model_max_length` is {length}, and the text encoder has {positions} positions");
                return Err(files.unusable(&format!("{folder}/tokenizer_config.json"), why));
            }
        }
        Ok(Self::new(tokenizers, encoders))
    }

    /// Both tokenizers, and the encoder of each.
    pub fn new(tokenizers: [ClipTokenizer; 2], encoders: [ClipTextModel; 2]) -> Self {
        let ([tokenizer, tokenizer_2], [encoder, encoder_2]) = (tokenizers, encoders);
        Self { tokenizer, encoder, tokenizer_2, encoder_2, words: Default::default() }
    }

    /// Lets the name of a textual inversion stand for its vectors in the prompts of [`TextEncoders::encode`].
    ///
    /// # Errors
    /// Vectors of other widths than the encoders', and a name without tokens.
    pub fn add_embedding(&mut self, embedding: &Embedding) -> Result<()> {
        let Embedding { name, clip_l, clip_g } = embedding;
        let tokens = [self.tokenizer.tokens(name)?, self.tokenizer_2.tokens(name)?];
        ensure!(tokens.iter().all(|tokens| !tokens.is_empty()), "`{name}` is no word of a prompt");
        let vectors = [self.encoder.add_tokens(clip_l)?, self.encoder_2.add_tokens(clip_g)?];
        for (words, (tokens, vectors)) in self.words.iter_mut().zip(tokens.into_iter().zip(vectors)) {
            words.push(Word { name: name.clone(), tokens, vectors });
            // Where several names begin at a token, the longest one is meant, as in A1111.
            words.sort_by_key(|word| std::cmp::Reverse(word.tokens.len()));
        }
        Ok(())
    }

    /// Calls `visit` with the name of each layer of both, under `text_encoder.` and `text_encoder_2.`.
    pub fn visit_layers(&mut self, visit: &mut Visit) {
        self.encoder.visit_layers(&mut |name, layer| visit(&format!("text_encoder.{name}"), layer));
        self.encoder_2.visit_layers(&mut |name, layer| visit(&format!("text_encoder_2.{name}"), layer));
    }

    /// The conditioning of each prompt; a prompt that is too long is cut at the end, as in diffusers.
    pub fn encode_prompts(&self, prompts: &[&str]) -> Result<TextConditioning> {
        let (ids, ids_2) = self.tokens(prompts)?;
        self.encode_ids(&ids, &ids_2)
    }

    /// The token numbers of each prompt by both tokenizers, (B, N) each.
    pub fn tokens(&self, prompts: &[&str]) -> Result<(Tensor, Tensor)> {
        let ids = |tokenizer: &ClipTokenizer| tokenizer.encode_batch(prompts, self.encoder.device());
        Ok((ids(&self.tokenizer)?, ids(&self.tokenizer_2)?))
    }

    /// The unconditional embeddings of models that want zeros: as [`TextEncoders::encode_prompts`] of one prompt.
    pub fn zeros(&self) -> Result<TextConditioning> {
        let device = self.encoder.device();
        let dtype = compute_dtype(self.encoder.token_embedding.dtype(), device);
        let width = self.encoder.width() + self.encoder_2.width();
        let pooled = match &self.encoder_2.text_projection {
            Some(projection) => projection.weight.dim(0)?,
            None => self.encoder_2.width(),
        };
        Ok(TextConditioning {
            context: Tensor::zeros((1, self.tokenizer.max_length(), width), dtype, device)?,
            pooled: Tensor::zeros((1, pooled), dtype, device)?,
        })
    }

    /// The end of `prompt` that does not fit, as the user wrote it.
    pub fn cut<'a>(&self, prompt: &'a str) -> Result<Option<&'a str>> {
        Ok(match self.tokenizer.cut(prompt)? {
            Some(end) => Some(end),
            None => self.tokenizer_2.cut(prompt)?,
        })
    }

    /// The same from token numbers of both tokenizers, (B, N) each.
    pub fn encode_ids(&self, ids: &Tensor, ids_2: &Tensor) -> Result<TextConditioning> {
        let one = self.encoder.forward(ids)?;
        let two = self.encoder_2.forward(ids_2)?;
        let context = Tensor::cat(&[&one.penultimate, &two.penultimate], 2)?; // (B, N, D₁ + D₂)
        Ok(TextConditioning { context, pooled: two.pooled })
    }
}

/// `text_encoder/config.json`. What a file leaves out has transformers' default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipTextConfig {
    /// The class that wrote it: `CLIPTextModel`, or `CLIPTextModelWithProjection` which projects the pooled output.
    pub architectures: Vec<String>,
    /// Tokens known.
    pub vocab_size: usize,
    /// Width of a token, D.
    pub hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Width of the projected pooled output, P.
    pub projection_dim: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads a layer.
    pub num_attention_heads: usize,
    /// Most tokens in a prompt.
    pub max_position_embeddings: usize,
    /// The feed-forward part's non-linearity: `quick_gelu` in CLIP-L, `gelu` in bigG.
    pub hidden_act: Activation,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
    /// The token at which the sequence is pooled. 2 is a mistake of old files and stands for the token with the
    /// highest number.
    pub eos_token_id: u32,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            architectures: vec!["CLIPTextModel".into()],
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

impl ClipTextConfig {
    /// Whether the pooled output is projected.
    pub fn with_projection(&self) -> bool {
        self.architectures.iter().any(|name| name == "CLIPTextModelWithProjection")
    }

    /// The whole `config.json`, as transformers opens it. The other special tokens are not part of the computation;
    /// `bos_token_id` is the one before the end-of-text token, as in every CLIP vocabulary.
    pub fn to_json(&self) -> Value {
        let mut config = json!(self);
        config["model_type"] = json!("clip_text_model");
        config["bos_token_id"] = json!(self.eos_token_id.saturating_sub(1));
        config["pad_token_id"] = json!(self.eos_token_id);
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

/// Output of a text encoder for B prompts of N tokens.
#[derive(Clone, Debug)]
pub struct ClipTextOutput {
    /// Input of the last layer, without the final norm: `hidden_states[-2]`, (B, N, D).
    pub penultimate: Tensor,
    /// Output of the last layer, after the final norm, (B, N, D).
    pub last: Tensor,
    /// `last` at the end-of-text token, projected where the model has a projection: (B, P), or (B, D).
    pub pooled: Tensor,
}

/// CLIP's text encoder, with or without projection.
#[derive(Clone, Debug)]
pub struct ClipTextModel {
    token_embedding: Tensor,
    position_embedding: Tensor,
    encoder: ClipTransformer,
    final_layer_norm: LayerNorm,
    text_projection: Option<Linear>,
    eos_token_id: u32,
    /// Tokens without those of textual inversions.
    vocabulary: u32,
}

impl ClipTextModel {
    /// Builds it from the weights in `vb`, whose names may start with `text_model.` or not: transformers 5 leaves
    /// that out in models without projection.
    pub fn new(config: &ClipTextConfig, vb: VarBuilder) -> Result<Self> {
        let (heads, width) = (config.num_attention_heads, config.hidden_size);
        ensure!(
            heads > 0 && width % heads == 0,
            "`hidden_size` {width} does not part into `num_attention_heads` {heads}"
        );
        let full = vb.pp("text_model");
        let inner = if full.contains_tensor("final_layer_norm.weight") { full } else { vb.clone() };
        // transformers initialises both with this deviation.
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let table = |rows: usize, name: &str| {
            inner.pp("embeddings").pp(name).get_with_hints((rows, width), "weight", init)
        };
        let text_projection = config
            .with_projection()
            .then(|| Linear::without_bias(width, config.projection_dim, vb.pp("text_projection")))
            .transpose()?;
        Ok(Self {
            token_embedding: table(config.vocab_size, "token_embedding")?,
            position_embedding: table(config.max_position_embeddings, "position_embedding")?,
            encoder: ClipTransformer::new(&config.sizes(), inner.pp("encoder.layers"))?,
            final_layer_norm: LayerNorm::new(width, config.layer_norm_eps, inner.pp("final_layer_norm"))?,
            text_projection,
            eos_token_id: config.eos_token_id,
            vocabulary: config.vocab_size as u32,
        })
    }

    /// Width of a token, D.
    pub(super) fn width(&self) -> usize {
        self.position_embedding.dims()[1]
    }

    /// Appends `vectors` (N, D) to the table of token embeddings; returns their numbers.
    fn add_tokens(&mut self, vectors: &Tensor) -> Result<Vec<u32>> {
        let (count, width) = vectors.dims2()?;
        ensure!(
            width == self.width(),
            "vectors of {width} numbers do not fit a text encoder of {}",
            self.width()
        );
        let table = &self.token_embedding;
        let first = table.dim(0)? as u32;
        let vectors = vectors.to_device(table.device())?.to_dtype(table.dtype())?;
        self.token_embedding = Tensor::cat(&[table, &vectors], 0)?;
        Ok((first..first + count as u32).collect())
    }

    /// Where its weights lie.
    pub fn device(&self) -> &Device {
        self.token_embedding.device()
    }

    /// `ids` (B, N) of `u32`.
    pub fn forward(&self, ids: &Tensor) -> Result<ClipTextOutput> {
        let (b, n) = ids.dims2()?;
        let (positions, width) = self.position_embedding.dims2()?;
        ensure!(n <= positions, "{n} tokens are more than the text encoder's {positions} positions");
        let tokens = self.token_embedding.index_select(&ids.flatten_all()?, 0).with_context(|| {
            format!(
                "a token number is beyond the text encoder's {} tokens",
                self.token_embedding.elem_count() / width
            )
        })?;
        let dtype = compute_dtype(tokens.dtype(), tokens.device());
        let positions = self.position_embedding.narrow(0, 0, n)?.to_dtype(dtype)?;
        let x = tokens.reshape((b, n, width))?.to_dtype(dtype)?.broadcast_add(&positions)?;
        let (penultimate, x) = self.encoder.forward(&x, true)?;
        let last = self.final_layer_norm.forward(&x)?; // (B, N, D)
        let pooled = last.reshape((b * n, width))?.index_select(&self.ends(ids)?, 0)?; // (B, D)
        let pooled = match &self.text_projection {
            Some(projection) => projection.forward(&pooled)?, // (B, P)
            None => pooled,
        };
        Ok(ClipTextOutput { penultimate, last, pooled })
    }

    /// Calls `visit` with the name of each layer that a LoRA file may change, for example
    /// `text_model.encoder.layers.0.self_attn.q_proj`.
    pub fn visit_layers(&mut self, visit: &mut Visit) {
        self.encoder
            .visit_layers(&mut |name, layer| visit(&format!("text_model.encoder.layers.{name}"), layer));
        visit("text_model.final_layer_norm", self.final_layer_norm.layer());
        if let Some(projection) = &mut self.text_projection {
            visit("text_projection", Layer::Linear(projection));
        }
    }

    /// The row of each prompt's end-of-text token among all B · N, (B).
    fn ends(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, n) = ids.dims2()?;
        let mut rows = Vec::with_capacity(b);
        for (i, ids) in ids.to_vec2::<u32>()?.iter().enumerate() {
            let end = if self.eos_token_id == 2 {
                let highest = ids.iter().filter(|id| **id < self.vocabulary).max();
                ids.iter().position(|id| Some(id) == highest)
            } else {
                ids.iter().position(|id| *id == self.eos_token_id)
            };
            // A sequence without end is pooled at its first token, as transformers' argmax over zeros does.
            rows.push((i * n + end.unwrap_or(0)) as u32);
        }
        Ok(Tensor::from_vec(rows, b, ids.device())?)
    }
}
