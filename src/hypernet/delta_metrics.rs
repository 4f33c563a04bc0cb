//! How alike two LoRAs are in what they do: inner products of ΔW, taken from vectors without building any ΔW.
//!
//! ⟨B̂Â, BA⟩ = tr((B̂ᵀB)·(AÂᵀ)): R×R products for each layer, and differentiable. Distances of raw factors depend on
//! how a LoRA happens to be factored; these do not.

use candle_core::{Device, Tensor};

use crate::lora::layout::LoraLayout;

/// The layers of a vector, ready for inner products.
#[derive(Clone, Debug)]
pub struct DeltaSpace {
    layers: Vec<Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    /// Where its numbers begin.
    begin: usize,
    out: usize,
    input: usize,
    rank: usize,
    /// (alpha / R)²
    weight: f64,
    /// A·Aᵀ (R, R) of a shared A, which the vector does not hold.
    gram: Option<Tensor>,
}

impl DeltaSpace {
    /// Of the vectors of `layout`, on `device`.
    pub fn new(layout: &LoraLayout, device: &Device) -> candle_core::Result<Self> {
        let mut begin = 0;
        let mut layers = Vec::with_capacity(layout.modules.len());
        for module in &layout.modules {
            let gram = match layout.shared_tensors().get(&module.module) {
                Some(down) => Some(down.matmul(&down.t()?)?.to_device(device)?),
                None => None,
            };
            let inside = if gram.is_some() { 0 } else { module.input };
            let scale = f64::from(module.alpha) / module.rank as f64;
            layers.push(Layer {
                begin,
                out: module.out,
                input: module.input,
                rank: module.rank,
                weight: scale * scale,
                gram,
            });
            begin += (module.out + inside) * module.rank;
        }
        Ok(Self { layers })
    }

    /// Σ over layers of ⟨ΔW, ΔW'⟩ for each pair of rows: `a`, `b` (B, P) or (1, P) → (B).
    pub fn inner(&self, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
        let rows = a.dim(0)?.max(b.dim(0)?);
        let mut sum: Option<Tensor> = None;
        for layer in &self.layers {
            let Layer { begin, out, input, rank, .. } = *layer;
            let part = |x: &Tensor, begin: usize, length: usize| -> candle_core::Result<Tensor> {
                x.narrow(1, begin, length * rank)?.reshape((x.dim(0)?, length, rank))
            };
            // aᵀ·b of factors (B, n, R): (B, R, R)
            let across = |begin: usize, length: usize| -> candle_core::Result<Tensor> {
                let (a, b) = (part(a, begin, length)?, part(b, begin, length)?);
                a.transpose(1, 2)?.contiguous()?.broadcast_matmul(&b)
            };
            let ups = across(begin, out)?;
            let product = match &layer.gram {
                Some(gram) => ups.broadcast_mul(gram)?,
                // tr((B̂ᵀB)·(AÂᵀ)) = Σ (B̂ᵀB) ∘ (ÂAᵀ), and Aᵀ is what the vector holds.
                None => (ups * across(begin + out * rank, input)?)?,
            };
            let one = (product.reshape((rows, rank * rank))?.sum(1)? * layer.weight)?;
            sum = Some(match sum {
                Some(sum) => (sum + one)?,
                None => one,
            });
        }
        sum.ok_or_else(|| candle_core::Error::Msg("a layout without layers".into()))
    }

    /// Mean of 1 − cos(ΔŴ, ΔW) over the rows of `guess` and `truth` (B, P), a scalar: LoRAGen's angular loss.
    pub fn angle(&self, guess: &Tensor, truth: &Tensor) -> candle_core::Result<Tensor> {
        let lengths = (self.inner(guess, guess)? * self.inner(truth, truth)?)?;
        // A LoRA of zeros points nowhere.
        let cosine = (self.inner(guess, truth)? / (lengths + 1e-20)?.sqrt()?)?;
        cosine.affine(-1.0, 1.0)?.mean_all()
    }

    /// How well `guess` (B, P) does what `truth` (B, P) does, by person; `mean` (1, P) is the mean LoRA.
    pub fn agreement(
        &self,
        guess: &Tensor,
        truth: &Tensor,
        mean: &Tensor,
    ) -> candle_core::Result<Vec<Alike>> {
        let rows = |x: Tensor| -> candle_core::Result<Vec<f64>> {
            Ok(x.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
        };
        let (gg, tt) = (rows(self.inner(guess, guess)?)?, rows(self.inner(truth, truth)?)?);
        let gt = rows(self.inner(guess, truth)?)?;
        let (gm, tm) = (rows(self.inner(guess, mean)?)?, rows(self.inner(truth, mean)?)?);
        let mm = rows(self.inner(mean, mean)?)?[0];
        let cosine = |dot: f64, a: f64, b: f64| {
            // What rounding leaves of a difference of nothing has no direction.
            if a.min(b) > 1e-6 * a.max(b) && a.min(b) > 0.0 { dot / (a * b).sqrt() } else { 0.0 }
        };
        let alike = |i: usize| {
            let error = gg[i] + tt[i] - 2.0 * gt[i];
            // Both without the mean.
            let (guessed, own) = (gg[i] - 2.0 * gm[i] + mm, tt[i] - 2.0 * tm[i] + mm);
            Alike {
                cosine: cosine(gt[i], gg[i], tt[i]),
                relative_error: error / tt[i].max(f64::MIN_POSITIVE),
                own_cosine: cosine(gt[i] - gm[i] - tm[i] + mm, guessed, own),
                own_relative_error: error / own.max(f64::MIN_POSITIVE),
            }
        };
        Ok((0..gg.len()).map(alike).collect())
    }
}

/// How alike two ΔW are, all layers together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alike {
    /// cos(ΔŴ, ΔW)
    pub cosine: f64,
    /// ‖ΔŴ − ΔW‖² / ‖ΔW‖²
    pub relative_error: f64,
    /// The cosine of what differs from the mean LoRA: what is the person's own.
    pub own_cosine: f64,
    /// ‖ΔŴ − ΔW‖² / ‖ΔW − ΔW̄‖²: 1 for the mean LoRA.
    pub own_relative_error: f64,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::DType;
    use proptest::prelude::*;

    use super::*;
    use crate::diffusion::noise::normal;
    use crate::lora::Lora;
    use crate::lora::layout::tests::any_lora;

    /// ⟨ΔW, ΔW'⟩ from the matrices themselves.
    fn by_hand(a: &Lora, b: &Lora) -> f64 {
        let delta =
            |lora: &Lora, name: &str| lora.layers[name].delta().unwrap().to_dtype(DType::F64).unwrap();
        let one = |name: &String| {
            (delta(a, name) * delta(b, name)).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
        };
        a.layers.keys().map(one).sum()
    }

    fn rows(layout: &LoraLayout, loras: &[&Lora]) -> Tensor {
        let rows: Vec<f32> = loras.iter().flat_map(|lora| layout.to_vector(lora).unwrap()).collect();
        Tensor::from_vec(rows, (loras.len(), layout.parameters()), &Device::Cpu).unwrap()
    }

    fn other(lora: &Lora, shared: bool) -> Lora {
        let mut other = lora.clone();
        for (i, layer) in other.layers.values_mut().enumerate() {
            layer.up = (&layer.up + normal(5, i as u64, layer.up.shape(), &Device::Cpu).unwrap()).unwrap();
            if !shared {
                layer.down = normal(6, i as u64, layer.down.shape(), &Device::Cpu).unwrap();
            }
        }
        other
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn inner_products_of_vectors_are_those_of_the_matrices(lora in any_lora(), shared: bool) {
            let other = other(&lora, shared);
            let mut layout = LoraLayout::of(&lora);
            if shared {
                let down: BTreeMap<_, _> =
                    lora.layers.iter().map(|(name, layer)| (name.clone(), layer.down.clone())).collect();
                layout = layout.with_shared_down(down).unwrap();
            }
            let space = DeltaSpace::new(&layout, &Device::Cpu).unwrap();
            let (a, b) = (rows(&layout, &[&lora, &other]), rows(&layout, &[&other, &other]));
            let found = space.inner(&a, &b).unwrap().to_vec1::<f32>().unwrap();
            let size = by_hand(&lora, &lora).max(by_hand(&other, &other));
            prop_assert!((f64::from(found[0]) - by_hand(&lora, &other)).abs() < 1e-4 * size);
            prop_assert!((f64::from(found[1]) - by_hand(&other, &other)).abs() < 1e-4 * size);
            // Against one row.
            let mean = rows(&layout, &[&lora]);
            let alike = space.agreement(&a, &b, &mean).unwrap();
            let error = by_hand(&lora, &lora) + by_hand(&other, &other) - 2.0 * by_hand(&lora, &other);
            prop_assert!((alike[0].relative_error - error / by_hand(&other, &other)).abs() < 1e-3 * (1.0 + alike[0].relative_error));
            prop_assert!((alike[0].own_relative_error - 1.0).abs() < 1e-3 && alike[0].own_cosine == 0.0);
            prop_assert!(alike[1].cosine > 0.9999 && alike[1].own_cosine > 0.9999);
            let angle = space.angle(&a, &b).unwrap().to_scalar::<f32>().unwrap();
            prop_assert!((f64::from(angle) - (2.0 - alike[0].cosine - alike[1].cosine) / 2.0).abs() < 1e-4);
        }
    }
}
