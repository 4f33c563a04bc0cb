//! Which layers get a LoRA, its factors as variables, and the factors of several people beside one frozen model.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::diffusion::noise;
use crate::layers::{self, Layer, Visit};
use crate::lora::adapter::{Adapter, AdapterFile, AdapterKind};
use crate::named::named;
use crate::sdxl::text::TextEncoders;
use crate::sdxl::unet::UNet;

named! {
    /// Which layers get a LoRA.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum Targets {
        /// Projections of every attention layer (diffusers' default).
        Attn = "attn",
        /// Attention and feed-forward.
        #[serde(alias = "attn+ff")]
        AttnFf = "attn+ff" | "attn-ff",
        /// Every linear layer (PEFT's `all-linear`).
        AllLinear = "all-linear",
        /// Every linear layer and convolution of the UNet's blocks (LoCon; LyCORIS' preset `full`).
        Conv = "conv",
    }
}

impl Targets {
    /// Whether the UNet's layer at this diffusers path is adapted; `conv` for a convolution.
    pub fn includes(self, path: &str, conv: bool) -> bool {
        let attention = path.contains(".attn1.") || path.contains(".attn2.");
        let in_blocks =
            ["down_blocks.", "mid_block.", "up_blocks."].iter().any(|part| path.starts_with(part));
        match self {
            Self::Attn => attention,
            Self::AttnFf => attention || path.contains(".ff."),
            Self::AllLinear => !conv,
            Self::Conv => in_blocks,
        }
    }

    /// Whether a text encoder's layer is adapted: attention, and with more than [`Targets::Attn`] the rest of each
    /// transformer layer.
    pub fn includes_text(self, path: &str) -> bool {
        path.contains(".self_attn.") || (self != Self::Attn && path.contains(".mlp."))
    }
}

/// The networks that train: the UNet, and the text encoders where they train too.
#[derive(Clone)]
pub struct Networks {
    /// Frozen but for its adapters.
    pub unet: UNet,
    /// Likewise; `None` when their output is known beforehand.
    pub text: Option<TextEncoders>,
}

impl Networks {
    /// Calls `visit` with each layer that an adapter may stand beside.
    pub fn visit_layers(&mut self, visit: &mut Visit) {
        self.unet.visit_layers(visit);
        if let Some(text) = &mut self.text {
            text.visit_layers(visit);
        }
    }

    /// Puts the adapters of `loras` beside the weights; with several, the batch holds the samples of one after
    /// those of the other.
    pub fn attach(&mut self, loras: &[&TrainableLora]) -> Result<()> {
        let mut failed = None;
        self.visit_layers(&mut |path, mut layer| match joint(path, loras) {
            Ok(Some(adapter)) => layer.set_adapter(Some(adapter)),
            Ok(None) => {}
            Err(error) => failed = Some(error),
        });
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }
}

/// The adapter of all loras for one layer.
fn joint(path: &str, loras: &[&TrainableLora]) -> candle_core::Result<Option<layers::Adapter>> {
    let Some(one) = loras.first().filter(|lora| lora.downs.contains_key(path)) else {
        return Ok(None);
    };
    let downs: Vec<&Tensor> = loras.iter().map(|lora| &lora.downs[path]).collect();
    let ups: Vec<&Tensor> = loras.iter().map(|lora| &lora.ups[path]).collect();
    let shared = downs.iter().all(|down| down.id() == downs[0].id());
    Ok(Some(layers::Adapter {
        down: if shared { downs[0].clone() } else { Tensor::stack(&downs, 0)? },
        up: if ups.len() == 1 { ups[0].clone() } else { Tensor::stack(&ups, 0)? },
        scale: one.alpha / one.rank as f64,
    }))
}

/// One layer that is adapted.
#[derive(Clone, Debug)]
pub struct TargetModule {
    /// Its path as diffusers spells it.
    pub path: String,
    /// The shape of its weight, (out, in) or (out, in, k, k).
    pub weight: Vec<usize>,
    /// Where it lies.
    device: Device,
}

/// The layers of `networks` that `targets` means, in order.
///
/// # Errors
/// None at all, or one that is smaller than `rank`.
pub fn target_modules(networks: &Networks, targets: Targets, rank: usize) -> Result<Vec<TargetModule>> {
    let mut modules = Vec::new();
    networks.clone().visit_layers(&mut |path, layer| {
        let included = match &layer {
            Layer::Norm { .. } => false,
            _ if path.starts_with("text_encoder") => targets.includes_text(path),
            Layer::Linear(_) => targets.includes(path, false),
            Layer::Conv(_) => targets.includes(path, true),
        };
        if included {
            let weight = layer.weight();
            modules.push(TargetModule {
                path: path.to_string(),
                weight: weight.dims().to_vec(),
                device: weight.device().clone(),
            });
        }
    });
    ensure!(!modules.is_empty(), "no layer of this base is adapted by these targets");
    for module in &modules {
        let (output, input) = (module.weight[0], module.weight[1..].iter().product::<usize>());
        ensure!(
            rank >= 1 && rank <= input.min(output),
            "rank {rank} does not fit the layer `{}` of {input} → {output}; take 1 to {}",
            module.path,
            input.min(output)
        );
    }
    Ok(modules)
}

/// Length of the weights of all `modules` together.
pub fn weight_norm(networks: &Networks, modules: &[TargetModule]) -> Result<f64> {
    let paths: BTreeSet<&str> = modules.iter().map(|module| module.path.as_str()).collect();
    let mut squares = Ok(0.0);
    networks.clone().visit_layers(&mut |path, layer| {
        if let (true, Ok(sum)) = (paths.contains(path), &mut squares) {
            let square = || layer.weight().to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>();
            match square() {
                Ok(square) => *sum += f64::from(square),
                Err(error) => squares = Err(error),
            }
        }
    });
    Ok(squares?.sqrt())
}

impl TargetModule {
    /// A random `down` (R, in) or (R, in, k, k), U(−1/√n, 1/√n) over the n inputs of a value, as kohya's and peft's
    /// initialisation. It depends on the seed and the path alone, so that all people of a seed start alike.
    pub fn random_down(&self, rank: usize, seed: u64) -> Result<Tensor> {
        // FNV-1a of the path, so that a layer's basis does not depend on the other layers.
        let stream = self.path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let mut rng = noise::generator(seed, stream);
        let input: usize = self.weight[1..].iter().product();
        let bound = 1.0 / (input as f32).sqrt();
        let values: Vec<f32> = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
        let mut shape = self.weight.clone();
        shape[0] = rank;
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

/// `down` of every adapted layer by its path, (R, in) or (R, in, k, k).
pub type SharedDown = BTreeMap<String, Tensor>;

/// The random `down`s of all `modules`.
pub fn random_shared_down(modules: &[TargetModule], rank: usize, seed: u64) -> Result<SharedDown> {
    modules.iter().map(|module| Ok((module.path.clone(), module.random_down(rank, seed)?))).collect()
}

/// One LoRA in training.
pub struct TrainableLora {
    downs: SharedDown,
    /// (out, R) by path.
    ups: BTreeMap<String, Tensor>,
    vars: BTreeMap<String, Var>,
    rank: usize,
    alpha: f64,
}

impl TrainableLora {
    /// Adapters that start at no change at all: `up` is zero. `downs` stay as they are unless they are variables.
    ///
    /// # Errors
    /// `downs` of other layers or shapes than `modules`.
    pub fn new(modules: &[TargetModule], downs: &SharedDown, alpha: f64) -> Result<Self> {
        let mut lora =
            Self { downs: SharedDown::new(), ups: BTreeMap::new(), vars: BTreeMap::new(), rank: 0, alpha };
        for module in modules {
            let down = downs.get(&module.path).with_context(|| format!("`{}` has no `down`", module.path))?;
            let rank = down.dim(0)?;
            ensure!(
                down.dims()[1..] == module.weight[1..] && (lora.rank == 0 || lora.rank == rank),
                "`down` of `{}` has shape {:?}, its weight {:?}",
                module.path,
                down.dims(),
                module.weight
            );
            lora.rank = rank;
            let near = down.device().same_device(&module.device);
            let down = if near { down.clone() } else { down.to_device(&module.device)? };
            let up = Var::zeros((module.weight[0], rank), DType::F32, &module.device)?;
            lora.ups.insert(module.path.clone(), up.as_tensor().clone());
            lora.downs.insert(module.path.clone(), down);
            lora.vars.insert(format!("up.{}", module.path), up);
        }
        Ok(lora)
    }

    /// Makes variables of its `down`s.
    pub fn train_shared_down(&mut self) -> Result<()> {
        for (path, down) in &mut self.downs {
            let var = Var::from_tensor(down)?;
            *down = var.as_tensor().clone();
            self.vars.insert(format!("down.{path}"), var);
        }
        Ok(())
    }

    /// Its variables, `up.PATH` and, where they are learnt, `down.PATH`.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// A copy that does not train, with these values of the variables where they are given.
    pub fn at(&self, values: &BTreeMap<String, Tensor>) -> Self {
        let value = |kind: &str, (path, own): (&String, &Tensor)| {
            (path.clone(), values.get(&format!("{kind}.{path}")).unwrap_or(own).detach())
        };
        Self {
            downs: self.downs.iter().map(|own| value("down", own)).collect(),
            ups: self.ups.iter().map(|own| value("up", own)).collect(),
            vars: BTreeMap::new(),
            ..*self
        }
    }

    /// Length of ΔW of all layers together: √Σ ‖alpha / R · B·A‖².
    pub fn delta_norm(&self) -> Result<f64> {
        let scale = self.alpha / self.rank as f64;
        let mut squares = 0.0;
        for (path, up) in &self.ups {
            let (down, up) = (self.downs[path].detach().flatten_from(1)?, up.detach());
            // ‖B·A‖² = Σ (BᵀB) ⊙ (AAᵀ), both (R, R).
            let product = (up.t()?.matmul(&up)? * down.matmul(&down.t()?)?)?;
            squares += f64::from(product.sum_all()?.to_scalar::<f32>()?) * scale * scale;
        }
        Ok(squares.max(0.0).sqrt())
    }

    /// The LoRA file that it stands for, with its present values, on the CPU.
    pub fn adapters(&self) -> Result<AdapterFile> {
        let mut changes = AdapterFile::default();
        for (path, up) in &self.ups {
            let down = self.downs[path].detach().to_device(&Device::Cpu)?.copy()?;
            let up = up.detach().to_device(&Device::Cpu)?.copy()?;
            let up = if down.rank() == 4 { up.unsqueeze(2)?.unsqueeze(3)? } else { up };
            let kind = AdapterKind::LowRank { down, up, mid: None, alpha: self.alpha as f32 };
            changes.modules.insert(path.clone(), Adapter { kind, magnitude: None, bias: None });
        }
        Ok(changes)
    }
}
