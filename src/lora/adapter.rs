//! What a file changes of one layer, of every kind that exists for SDXL, and the ΔW it makes.
//!
//! LoRA (Hu et al. 2021) and LoCon, LoHa (Hyeon-Woo et al. 2022), LoKr, full differences, IA3 (Liu et al. 2022),
//! OFT (Qiu et al. 2023), BOFT (Liu et al. 2024), GLoRA (Chavan et al. 2023), each of the first three with DoRA's
//! magnitudes (Liu et al. 2024). Formulas as in LyCORIS 4.1.3, `lycoris/modules/*.py` and `lycoris/functional/*.py`,
//! whose forward pass is meant where `get_diff_weight` differs from it (it applies alpha / R twice for LoHa and
//! LoKr).

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor};

use super::embedding::Embedding;
use super::keys::Part;
use super::tensor_products::{along, f32, flat, kronecker, norms, tucker, turned};
use super::{Lora, LoraError, LoraLayer};

/// What a file changes, by module path as in [`Lora`].
#[derive(Clone, Debug, Default)]
pub struct AdapterFile {
    /// By module path as diffusers spells it.
    pub modules: BTreeMap<String, Adapter>,
    /// Textual inversions that the file brings along.
    pub embeddings: Vec<Embedding>,
    /// The file's metadata.
    pub metadata: BTreeMap<String, String>,
}

impl AdapterFile {
    /// How much of all numbers the modules of these paths hold, from 0 to 1.
    pub fn share_of(&self, paths: &[String]) -> f64 {
        let size = |adapter: &Adapter| -> f64 {
            let parts = adapter.parts().unwrap_or_default();
            parts.iter().map(|(_, tensor)| tensor.elem_count() as f64).sum()
        };
        let all: f64 = self.modules.values().map(size).sum();
        let some: f64 = paths.iter().filter_map(|path| self.modules.get(path)).map(size).sum();
        some / all.max(1.0)
    }
}

/// The change of one layer.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// What is added to the weight.
    pub kind: AdapterKind,
    /// DoRA: the sizes that rows or columns of the changed weight are brought to.
    pub magnitude: Option<Magnitude>,
    /// What happens to the bias.
    pub bias: Option<BiasChange>,
}

/// The change of a bias (out).
#[derive(Clone, Debug)]
pub enum BiasChange {
    /// Added to the base's.
    Added(Tensor),
    /// In the place of the base's.
    Replaced(Tensor),
}

impl BiasChange {
    /// The numbers that the file holds.
    pub fn values(&self) -> &Tensor {
        match self {
            Self::Added(values) | Self::Replaced(values) => values,
        }
    }

    /// What is added to `bias`, with the change `times` as strong; f32.
    pub fn delta(&self, bias: Option<&Tensor>, times: f64) -> Result<Tensor> {
        let values = f32(self.values())?.flatten_all()?;
        let delta = match (self, bias) {
            (Self::Replaced(_), Some(bias)) => (values.to_device(bias.device())? - f32(bias)?)?,
            _ => values,
        };
        delta * times
    }
}

/// Sizes of the rows, or of the columns, of a weight.
#[derive(Clone, Debug)]
pub struct Magnitude {
    /// As many numbers as there are rows or columns, in the shape that they are stored in.
    pub values: Tensor,
    /// Columns (in) instead of rows (out).
    pub on_input: bool,
}

/// How ΔW is made. R is the rank, `scale` = alpha / R.
#[derive(Clone, Debug)]
pub enum AdapterKind {
    /// LoRA, LoCon: scale · up · down, or up · mid · down. Factors of convolutions keep their kernel's axes:
    /// `down` (R, in, k, k), or (R, in, 1, 1) before a `mid` (R, R, k, k); `up` (out, R, 1, 1).
    LowRank {
        /// A, (R, in) or (R, in, k, k).
        down: Tensor,
        /// B, (out, R) or (out, R, 1, 1).
        up: Tensor,
        /// Tucker core.
        mid: Option<Tensor>,
        /// ΔW is scaled by alpha / R.
        alpha: f32,
    },
    /// LoHa: scale · (a₁ b₁) ⊙ (a₂ b₂); a (out, R), b (R, in·k²). With cores t (R, R, k, k): a (R, out), b (R, in).
    Hadamard {
        /// a₁, b₁.
        first: [Tensor; 2],
        /// a₂, b₂.
        second: [Tensor; 2],
        /// t₁, t₂.
        cores: Option<[Tensor; 2]>,
        /// ΔW is scaled by alpha / R.
        alpha: f32,
    },
    /// LoKr: scale · w₁ ⊗ w₂; the scale counts only where one of them is decomposed.
    Kronecker {
        /// (a, c)
        first: Matrix,
        /// (b, d), (b, d, k, k), or decomposed into (b, R) and (R, d·k²).
        second: Matrix,
        /// Core (R, R, k, k) of the second, whose factors are then (R, b) and (R, d).
        core: Option<Tensor>,
        /// ΔW is scaled by alpha / R.
        alpha: f32,
    },
    /// The difference itself, as large as the weight; norms as well.
    Full(Tensor),
    /// A weight in the place of the base's (PEFT's `modules_to_save`, ComfyUI's `set_weight`).
    Replaced(Tensor),
    /// Only the bias changes.
    BiasOnly,
    /// IA3: W ⊙ factor, along the outputs or the inputs.
    Scaled {
        /// As many numbers as the axis is long.
        factor: Tensor,
        /// Along the inputs.
        on_input: bool,
    },
    /// OFT, BOFT: W turned by orthogonal blocks, the Cayley transforms of `blocks` − `blocks`ᵀ.
    Orthogonal {
        /// (n, s, s), or (m, n, s, s) for the m stages of BOFT's butterfly.
        blocks: Tensor,
        /// A factor of each output (out).
        rescale: Option<Tensor>,
        /// The norm of the blocks is kept below this · out; 0 for no bound.
        constraint: f32,
    },
    /// GLoRA: scale · (W a₁ a₂ + b₁ b₂); a₁ (in, R), a₂ (R, in), b₁ (out, R), b₂ (R, in·k²).
    Generalised {
        /// a₁, a₂.
        a: [Tensor; 2],
        /// b₁, b₂.
        b: [Tensor; 2],
        /// ΔW is scaled by alpha / R.
        alpha: f32,
    },
}

/// A matrix, or two factors of it.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Itself.
    Whole(Tensor),
    /// The product of two.
    Product(Tensor, Tensor),
}

impl Adapter {
    /// What a user calls the kind.
    pub fn kind_name(&self) -> &'static str {
        let dora = self.magnitude.is_some();
        match &self.kind {
            AdapterKind::LowRank { .. } if dora => "DoRA",
            AdapterKind::LowRank { mid: Some(_), .. } => "LoCon (Tucker)",
            AdapterKind::LowRank { down, .. } if down.rank() == 4 => "LoCon",
            AdapterKind::LowRank { .. } => "LoRA",
            AdapterKind::Hadamard { .. } if dora => "LoHa with DoRA",
            AdapterKind::Hadamard { .. } => "LoHa",
            AdapterKind::Kronecker { .. } if dora => "LoKr with DoRA",
            AdapterKind::Kronecker { .. } => "LoKr",
            AdapterKind::Full(diff) if diff.rank() == 1 => "norm",
            AdapterKind::Full(_) => "full",
            AdapterKind::Replaced(_) => "replacement",
            AdapterKind::BiasOnly => "bias",
            AdapterKind::Scaled { .. } => "IA3",
            AdapterKind::Orthogonal { blocks, .. } if blocks.rank() == 4 => "BOFT",
            AdapterKind::Orthogonal { .. } => "OFT",
            AdapterKind::Generalised { .. } => "GLoRA",
        }
    }

    /// R and alpha, for kinds that have them.
    pub fn rank_and_alpha(&self) -> Option<(usize, f32)> {
        match &self.kind {
            AdapterKind::LowRank { down, alpha, .. } => Some((down.dims()[0], *alpha)),
            AdapterKind::Hadamard { first, alpha, .. } => Some((first[1].dims()[0], *alpha)),
            AdapterKind::Kronecker { first, second, alpha, .. } => {
                [second, first].into_iter().find_map(|matrix| match matrix {
                    Matrix::Product(_, b) => Some((b.dims()[0], *alpha)),
                    Matrix::Whole(_) => None,
                })
            }
            AdapterKind::Generalised { a, alpha, .. } => Some((a[1].dims()[0], *alpha)),
            AdapterKind::Full(_)
            | AdapterKind::Replaced(_)
            | AdapterKind::BiasOnly
            | AdapterKind::Scaled { .. }
            | AdapterKind::Orthogonal { .. } => None,
        }
    }

    fn scale(&self) -> f64 {
        self.rank_and_alpha().map_or(1.0, |(rank, alpha)| f64::from(alpha) / rank as f64)
    }

    /// ΔW as two thin factors, `down` (R, in·k²) and `up` (out, R) in f32 with the scale in `up`, where it is one.
    pub fn factors(&self) -> Result<Option<(Tensor, Tensor)>> {
        let AdapterKind::LowRank { up, .. } = &self.kind else { return Ok(None) };
        if self.magnitude.is_some() {
            return Ok(None);
        }
        let down = self.kernel()?;
        let up = (flat(&f32(up)?)? * self.scale())?;
        Ok(down.map(|down| flat(&down)).transpose()?.map(|down| (down, up)))
    }

    /// `down` of a low rank with its core multiplied in, as the first of two layers: (R, in) or (R, in, k, k), f32.
    pub fn kernel(&self) -> Result<Option<Tensor>> {
        let AdapterKind::LowRank { down, mid, .. } = &self.kind else { return Ok(None) };
        let down = f32(down)?;
        let Some(mid) = mid else { return Ok(Some(down)) };
        let (rows, columns, kh, kw) = mid.dims4()?;
        let mid = f32(mid)?.permute((0, 2, 3, 1))?.reshape((rows * kh * kw, columns))?;
        let down = flat(&down)?;
        let product = mid.matmul(&down)?.reshape((rows, kh, kw, down.dim(1)?))?;
        Ok(Some(product.permute((0, 3, 1, 2))?.contiguous()?))
    }

    /// W' − W for the original `weight` (out, in, …), with the change `times` as strong; f32 on its device.
    ///
    /// Linear in `times` for all kinds but BOFT, where each stage is drawn towards the identity. A DoRA that is
    /// not applied whole gives this share of its whole difference, as in ComfyUI (`comfy/weight_adapter/base.py`,
    /// `weight_decompose`) and A1111.
    pub fn delta(&self, weight: &Tensor, times: f64) -> Result<Tensor> {
        let device = weight.device();
        let on = |tensor: &Tensor| tensor.to_device(device)?.to_dtype(DType::F32);
        let shape = weight.shape();
        let delta = match &self.kind {
            AdapterKind::BiasOnly => Tensor::zeros(shape, DType::F32, device)?,
            AdapterKind::Full(diff) => on(diff)?.reshape(shape)?,
            AdapterKind::Replaced(whole) => (on(whole)?.reshape(shape)? - on(weight)?)?,
            AdapterKind::LowRank { .. } => {
                let Some((down, up)) = self.plain().factors()? else { candle_core::bail!("no factors") };
                on(&up)?.matmul(&on(&down)?)?.reshape(shape)?
            }
            AdapterKind::Hadamard { first, second, cores, .. } => {
                let product = |[a, b]: &[Tensor; 2], core: Option<&Tensor>| match core {
                    None => on(a)?.matmul(&on(b)?)?.reshape(shape),
                    Some(core) => tucker(&on(a)?, &on(b)?, &on(core)?)?.reshape(shape),
                };
                let (t1, t2) = (cores.as_ref().map(|t| &t[0]), cores.as_ref().map(|t| &t[1]));
                ((product(first, t1)? * product(second, t2)?)? * self.scale())?
            }
            AdapterKind::Kronecker { first, second, core, .. } => {
                let whole = |matrix: &Matrix, core: Option<&Tensor>| match (matrix, core) {
                    (Matrix::Whole(matrix), _) => flat(&on(matrix)?),
                    (Matrix::Product(a, b), None) => on(a)?.matmul(&flat(&on(b)?)?),
                    (Matrix::Product(a, b), Some(core)) => flat(&tucker(&on(a)?, &on(b)?, &on(core)?)?),
                };
                (kronecker(&whole(first, None)?, &whole(second, core.as_ref())?)?.reshape(shape)?
                    * self.scale())?
            }
            AdapterKind::Scaled { factor, on_input } => {
                on(weight)?.broadcast_mul(&along(&on(factor)?, *on_input, weight.rank())?)?
            }
            AdapterKind::Orthogonal { blocks, rescale, constraint } => {
                let rescale = rescale.as_ref().map(|r| along(&on(r)?, false, weight.rank())).transpose()?;
                return turned(&on(weight)?, blocks, rescale.as_ref(), *constraint, times);
            }
            AdapterKind::Generalised { a, b, .. } => {
                let (w, [a1, a2]) = (on(weight)?, a);
                let (out, input) = (w.dim(0)?, w.dim(1)?);
                let inner = flat(&on(a1)?)?.matmul(&flat(&on(a2)?)?)?; // (in, in)
                let wide = w.reshape((out, input, ()))?.transpose(1, 2)?.contiguous()?; // (out, k², in)
                let taps = wide.dim(1)?;
                let wa = wide.reshape((out * taps, input))?.matmul(&inner)?.reshape((out, taps, input))?;
                let wa = wa.transpose(1, 2)?.reshape(shape)?;
                let bb = flat(&on(&b[0])?)?.matmul(&flat(&on(&b[1])?)?)?.reshape(shape)?;
                ((wa + bb)? * self.scale())?
            }
        };
        match &self.magnitude {
            None => delta * times,
            Some(magnitude) => {
                let original = on(weight)?;
                let changed = (&original + delta)?;
                let sizes = along(&on(&magnitude.values)?, magnitude.on_input, weight.rank())?;
                let scaled =
                    changed.broadcast_mul(&sizes.broadcast_div(&norms(&changed, magnitude.on_input)?)?)?;
                (scaled - original)? * times
            }
        }
    }

    /// The same without magnitudes.
    fn plain(&self) -> Self {
        Self { magnitude: None, ..self.clone() }
    }

    /// Whether it is made for a weight of this shape.
    pub fn fits(&self, weight: &[usize]) -> bool {
        let (out, input) = (weight[0], weight.get(1).copied().unwrap_or(1));
        let rest: usize = weight[1..].iter().product();
        let axis = |on_input: bool| if on_input { input } else { out };
        let kind = match &self.kind {
            AdapterKind::BiasOnly => true,
            AdapterKind::Scaled { on_input: true, .. } if weight.len() < 2 => false,
            AdapterKind::Scaled { factor, on_input } => factor.elem_count() == axis(*on_input),
            AdapterKind::Orthogonal { blocks, rescale, .. } => {
                let [.., count, size, _] = *blocks.dims() else { return false };
                // Each stage of BOFT lets outputs meet that lie twice as far apart.
                let stages = if blocks.rank() == 4 { blocks.dims()[0] } else { 0 };
                let meet =
                    (0..stages).all(|stage| stage < 32 && size % 2 == 0 && out % ((1 << stage) * size) == 0);
                meet && count * size == out && rescale.as_ref().is_none_or(|r| r.elem_count() == out)
            }
            AdapterKind::Generalised { a, .. } => {
                a[0].dims()[0] == input
                    && a[1].elem_count() == a[1].dims()[0] * input
                    && self.same_size(weight)
            }
            _ => self.same_size(weight),
        };
        let magnitude = self.magnitude.as_ref().is_none_or(|m| m.values.elem_count() == axis(m.on_input));
        let bias = self.bias.as_ref().is_none_or(|bias| bias.values().elem_count() == out);
        let has_inputs = weight.len() > 1 || self.magnitude.is_none();
        kind && magnitude && bias && has_inputs && rest > 0
    }

    fn same_size(&self, weight: &[usize]) -> bool {
        let target = self.target();
        let trimmed = |shape: &[usize]| {
            let kept = shape.iter().rposition(|axis| *axis != 1).map_or(0, |last| last + 1);
            shape[..kept].to_vec()
        };
        // Some kinds flatten inputs and kernel into one axis.
        let flattened = [weight[0], weight[1..].iter().product()];
        trimmed(&target) == trimmed(weight) || (target.len() == 2 && target == flattened)
    }

    /// The shape of the weight that it is made for, as far as it tells; 0 for an axis that it does not tell.
    pub fn target(&self) -> Vec<usize> {
        let kernel = |core: &Tensor| core.dims()[2..].to_vec();
        match &self.kind {
            AdapterKind::LowRank { down, up, mid: None, .. } => [&up.dims()[..1], &down.dims()[1..]].concat(),
            AdapterKind::LowRank { down, up, mid: Some(mid), .. } => {
                [vec![up.dims()[0], down.dims()[1]], kernel(mid)].concat()
            }
            AdapterKind::Hadamard { first: [a, b], cores: None, .. } => vec![a.dims()[0], b.dims()[1]],
            AdapterKind::Hadamard { first: [a, b], cores: Some([core, _]), .. } => {
                [vec![a.dims()[1], b.dims()[1]], kernel(core)].concat()
            }
            AdapterKind::Kronecker { first, second, core, .. } => {
                let (a, c) = match first {
                    Matrix::Whole(w) => (w.dims()[0], w.dims()[1]),
                    Matrix::Product(a, b) => (a.dims()[0], b.dims()[1]),
                };
                let second = match (second, core) {
                    (Matrix::Whole(w), _) => w.dims().to_vec(),
                    (Matrix::Product(u, v), None) => [&u.dims()[..1], &v.dims()[1..]].concat(),
                    (Matrix::Product(u, v), Some(core)) => {
                        [vec![u.dims()[1], v.dims()[1]], kernel(core)].concat()
                    }
                };
                [&[a * second[0], c * second[1]], &second[2..]].concat()
            }
            AdapterKind::Full(whole) | AdapterKind::Replaced(whole) => whole.dims().to_vec(),
            AdapterKind::BiasOnly => self.bias.iter().map(|bias| bias.values().elem_count()).collect(),
            AdapterKind::Scaled { factor, on_input: true } => vec![0, factor.elem_count()],
            AdapterKind::Scaled { factor, on_input: false } => vec![factor.elem_count()],
            AdapterKind::Orthogonal { blocks, .. } => {
                vec![blocks.dims().iter().rev().skip(1).take(2).product()]
            }
            AdapterKind::Generalised { b, .. } => [&b[0].dims()[..1], &b[1].dims()[1..]].concat(),
        }
    }

    /// Its tensors as LyCORIS and sd-scripts store them.
    pub fn parts(&self) -> Result<Vec<(Part, Tensor)>> {
        let alpha = |alpha: &f32| Tensor::new(*alpha, &Device::Cpu).map(|alpha| (Part::Alpha, alpha));
        let mut parts = Vec::new();
        match &self.kind {
            AdapterKind::LowRank { down, up, mid, alpha: a } => {
                parts.extend([(Part::Down, down.clone()), (Part::Up, up.clone()), alpha(a)?]);
                parts.extend(mid.iter().map(|mid| (Part::Mid, mid.clone())));
            }
            AdapterKind::Hadamard { first: [a1, b1], second: [a2, b2], cores, alpha: a } => {
                let factors =
                    [(Part::HadaW1A, a1), (Part::HadaW1B, b1), (Part::HadaW2A, a2), (Part::HadaW2B, b2)];
                parts.extend(factors.map(|(part, tensor)| (part, tensor.clone())));
                if let Some([t1, t2]) = cores {
                    parts.extend([(Part::HadaT1, t1.clone()), (Part::HadaT2, t2.clone())]);
                }
                parts.push(alpha(a)?);
            }
            AdapterKind::Kronecker { first, second, core, alpha: a } => {
                let names = [
                    (first, Part::LokrW1, Part::LokrW1A, Part::LokrW1B),
                    (second, Part::LokrW2, Part::LokrW2A, Part::LokrW2B),
                ];
                for (matrix, whole, left, right) in names {
                    match matrix {
                        Matrix::Whole(matrix) => parts.push((whole, matrix.clone())),
                        Matrix::Product(a, b) => parts.extend([(left, a.clone()), (right, b.clone())]),
                    }
                }
                parts.extend(core.iter().map(|core| (Part::LokrT2, core.clone())));
                parts.push(alpha(a)?);
            }
            AdapterKind::Full(diff) if diff.rank() == 1 => parts.push((Part::WNorm, diff.clone())),
            AdapterKind::Full(diff) => parts.push((Part::Diff, diff.clone())),
            AdapterKind::Replaced(whole) => parts.push((Part::SetWeight, whole.clone())),
            AdapterKind::BiasOnly => {}
            AdapterKind::Scaled { factor, on_input } => {
                let on_input = Tensor::new(i64::from(*on_input), &Device::Cpu)?;
                parts.extend([(Part::Ia3, factor.clone()), (Part::OnInput, on_input)]);
            }
            AdapterKind::Orthogonal { blocks, rescale, constraint } => {
                parts.extend([(Part::OftBlocks, blocks.clone()), alpha(constraint)?]);
                parts.extend(rescale.iter().map(|rescale| (Part::Rescale, rescale.clone())));
            }
            AdapterKind::Generalised { a: [a1, a2], b: [b1, b2], alpha: a } => {
                let factors = [(Part::A1, a1), (Part::A2, a2), (Part::B1, b1), (Part::B2, b2)];
                parts.extend(factors.map(|(part, tensor)| (part, tensor.clone())));
                parts.push(alpha(a)?);
            }
        }
        if let Some(magnitude) = &self.magnitude {
            let values = &magnitude.values;
            let axes = if values.rank() > 1 { values.rank() } else { self.target().len().max(2) };
            parts.push((Part::DoraScale, along(values, magnitude.on_input, axes)?));
        }
        parts.extend(self.bias.iter().map(|bias| {
            let part = match (bias, &self.kind) {
                (BiasChange::Replaced(_), _) => Part::SetBias,
                (_, AdapterKind::Full(diff)) if diff.rank() == 1 => Part::BNorm,
                _ => Part::DiffB,
            };
            (part, bias.values().clone())
        }));
        Ok(parts)
    }
}

impl From<&LoraLayer> for Adapter {
    fn from(layer: &LoraLayer) -> Self {
        let (down, up) = (layer.down.clone(), layer.up.clone());
        Self {
            kind: AdapterKind::LowRank { down, up, mid: None, alpha: layer.alpha },
            magnitude: None,
            bias: None,
        }
    }
}

impl From<&Lora> for AdapterFile {
    fn from(lora: &Lora) -> Self {
        let modules = lora.layers.iter().map(|(module, layer)| (module.clone(), layer.into())).collect();
        Self { modules, metadata: lora.metadata.clone(), embeddings: Vec::new() }
    }
}

impl AdapterFile {
    /// The same as a LoRA of linear layers.
    ///
    /// # Errors
    /// [`LoraError::Kind`] with the first module of another kind.
    pub fn into_lora(self) -> std::result::Result<Lora, LoraError> {
        let mut layers = BTreeMap::new();
        for (module, adapter) in self.modules {
            let layer = adapter.linear_layer()?;
            let kind = adapter.kind_name();
            let layer = layer.ok_or(LoraError::Kind { key: module.clone(), kind })?;
            layers.insert(module, layer);
        }
        Ok(Lora { layers, metadata: self.metadata })
    }
}

impl Adapter {
    /// The same as a LoRA of a linear layer, where it is one; factors of 1×1 convolutions become matrices.
    fn linear_layer(&self) -> Result<Option<LoraLayer>> {
        let AdapterKind::LowRank { down, up, mid: None, alpha } = &self.kind else { return Ok(None) };
        if self.magnitude.is_some() || self.bias.is_some() || down.dims()[2..].iter().any(|side| *side != 1) {
            return Ok(None);
        }
        Ok(Some(LoraLayer { down: flat(down)?, up: flat(up)?, alpha: *alpha }))
    }
}
