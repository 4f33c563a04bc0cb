//! One form for all factorisations of the same change.
//!
//! (B·R)·(R⁻¹·A) = B·A for every invertible R: two LoRAs with the same ΔW may hold quite different numbers, and what
//! learns from the numbers learns the difference. Where all LoRAs start from the same A, training keeps them
//! comparable; elsewhere each layer is brought to a canonical form first. ΔW is the same before and after.
//!
//! * [`Canonical::Svd`]: QR of both factors, SVD of the small core, ΔW = U·S·Vᵀ, B = U√S and A = √S·Vᵀ, the largest
//!   entry of each column of U positive (W2T, `diffusion/classification/w2t_utils.py`). Where two singular values
//!   nearly agree, their order and so the form may flip from person to person.
//! * [`Canonical::Procrustes`]: the same, then turned by the orthogonal Q that brings [B; Aᵀ] nearest to those of a
//!   reference LoRA (Schönemann 1966): BᵀB_ref + A·A_refᵀ = U·S·Vᵀ, Q = U·Vᵀ. It has no flips.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::low_rank::{LowRank, small_svd};
use super::{Lora, LoraError, LoraLayer};

/// Which form the factors of a LoRA are brought to before they become a vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Canonical {
    /// As they were trained: right for LoRAs with a shared start.
    #[default]
    None,
    /// Balanced singular vectors.
    Svd,
    /// Balanced singular vectors, turned to a reference LoRA.
    Procrustes,
}

/// A form with what it needs.
#[derive(Clone, Debug, Default)]
pub struct Form {
    kind: Canonical,
    /// For [`Canonical::Procrustes`], already balanced.
    reference: BTreeMap<String, LoraLayer>,
}

impl Form {
    /// `kind`, with `reference` as the LoRA that others are turned to.
    pub fn new(kind: Canonical, reference: &Lora) -> Result<Self, LoraError> {
        let balance = |(name, layer): (&String, &LoraLayer)| Ok((name.clone(), balanced(layer)?));
        let reference = match kind {
            Canonical::Procrustes => {
                reference.layers.iter().map(balance).collect::<Result<_, LoraError>>()?
            }
            Canonical::None | Canonical::Svd => BTreeMap::new(),
        };
        Ok(Self { kind, reference })
    }

    /// What [`AdapterKind::reference`] gave, as it was: balanced again, near singular values might change places.
    pub fn restored(kind: Canonical, reference: Lora) -> Self {
        Self { kind, reference: reference.layers }
    }

    /// Which one.
    pub fn kind(&self) -> Canonical {
        self.kind
    }

    /// The balanced LoRA that others are turned to, if any.
    pub fn reference(&self) -> Option<Lora> {
        let layers = self.reference.clone();
        (self.kind == Canonical::Procrustes).then(|| Lora { layers, metadata: BTreeMap::new() })
    }

    /// The same LoRA in this form.
    ///
    /// # Errors
    /// [`LoraError::Layout`] for a layer that the reference lacks or has with another shape or rank.
    pub fn apply(&self, lora: &Lora) -> Result<Lora, LoraError> {
        let turned = |(name, layer): (&String, &LoraLayer)| -> Result<_, LoraError> {
            let layer = match self.kind {
                Canonical::None => layer.clone(),
                Canonical::Svd => balanced(layer)?,
                Canonical::Procrustes => {
                    let wrong = |why: &str| LoraError::Layout { module: name.clone(), why: why.into() };
                    let reference =
                        self.reference.get(name).ok_or_else(|| wrong("the reference LoRA lacks it"))?;
                    if (reference.shape(), reference.rank()) != (layer.shape(), layer.rank()) {
                        return Err(wrong("the reference LoRA has it in another shape or rank"));
                    }
                    aligned(&balanced(layer)?, reference)?
                }
            };
            Ok((name.clone(), layer))
        };
        let layers = lora.layers.iter().map(turned).collect::<Result<_, _>>()?;
        Ok(Lora { layers, metadata: lora.metadata.clone() })
    }
}

/// B = U√S, A = √S·Vᵀ, signs fixed.
fn balanced(layer: &LoraLayer) -> Result<LoraLayer, LoraError> {
    let LowRank { down, up } =
        LowRank { down: f32(&layer.down)?, up: f32(&layer.up)? }.svd()?.truncate(layer.rank())?;
    let signs: Vec<f32> = up.t()?.to_vec2::<f32>()?.iter().map(|column| sign(column)).collect();
    let signs = Tensor::from_vec(signs, layer.rank(), &Device::Cpu)?;
    let (up, down) = (up.broadcast_mul(&signs)?, down.broadcast_mul(&signs.unsqueeze(1)?)?);
    Ok(LoraLayer { down, up, alpha: layer.alpha })
}

/// Of the entry that is largest without its sign.
fn sign(values: &[f32]) -> f32 {
    let peak = values.iter().copied().fold(0f32, |peak, x| if x.abs() > peak.abs() { x } else { peak });
    if peak < 0.0 { -1.0 } else { 1.0 }
}

/// B·Q, Qᵀ·A with the rotation that brings both nearest to the reference.
fn aligned(layer: &LoraLayer, reference: &LoraLayer) -> Result<LoraLayer, LoraError> {
    let f64 = |tensor: &Tensor| tensor.to_dtype(DType::F64);
    let (up, down) = (f64(&layer.up)?, f64(&layer.down)?);
    let overlap = (up.t()?.matmul(&f64(&reference.up)?)? + down.matmul(&f64(&reference.down)?.t()?)?)?
        .to_vec2::<f64>()?;
    let (u, _, v) = small_svd(overlap);
    // Singular values of zero leave directions open; the k-th of one side goes to the k-th of the other.
    let (u, v) = (complete(u), complete(v));
    let rank = layer.rank();
    let q: Vec<f64> = (0..rank)
        .flat_map(|i| (0..rank).map(move |j| (i, j)))
        .map(|(i, j)| u.iter().zip(&v).map(|(u, v)| u[i] * v[j]).sum())
        .collect();
    let q = Tensor::from_vec(q, (rank, rank), &Device::Cpu)?;
    let f32 = |tensor: Tensor| tensor.to_dtype(DType::F32);
    Ok(LoraLayer { up: f32(up.matmul(&q)?)?, down: f32(q.t()?.matmul(&down)?)?, alpha: layer.alpha })
}

/// Rows of which some are orthonormal and the others zero → all orthonormal.
fn complete(mut rows: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let n = rows.len();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for i in 0..n {
        if dot(&rows[i], &rows[i]) > 0.5 {
            continue;
        }
        // The unit vector that the others hold least of.
        let rest = |axis: usize| -> Vec<f64> {
            let mut rest: Vec<f64> = (0..n).map(|j| if j == axis { 1.0 } else { 0.0 }).collect();
            for _ in 0..2 {
                for row in rows.iter().filter(|row| dot(row, row) > 0.5) {
                    let along = dot(&rest, row);
                    rest.iter_mut().zip(row).for_each(|(x, y)| *x -= along * y);
                }
            }
            rest
        };
        let best = (0..n).map(rest).max_by(|a, b| dot(a, a).total_cmp(&dot(b, b)));
        if let Some(best) = best {
            let length = dot(&best, &best).sqrt();
            rows[i] = best.into_iter().map(|x| x / length).collect();
        }
    }
    rows
}

fn f32(tensor: &Tensor) -> candle_core::Result<Tensor> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::any_lora;
    use super::*;
    use crate::diffusion::noise::normal;
    use proptest::prelude::*;

    /// ‖ΔW' − ΔW‖ / ‖ΔW‖, in f64.
    fn moved(a: &LoraLayer, b: &LoraLayer) -> f64 {
        let f64 = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
        let delta =
            |layer: &LoraLayer| (f64(&layer.up).matmul(&f64(&layer.down)).unwrap() * layer.scale()).unwrap();
        let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
        norm(&(delta(a) - delta(b)).unwrap()) / norm(&delta(a)).max(1e-30)
    }

    /// Another factorisation of the same change.
    fn refactored(layer: &LoraLayer, seed: u64) -> LoraLayer {
        let rank = layer.rank();
        // I + small: far from singular.
        let turn = (normal(seed, 7, (rank, rank), &Device::Cpu).unwrap() * (0.2 / rank as f64)).unwrap();
        let turn = (turn + Tensor::eye(rank, DType::F32, &Device::Cpu).unwrap()).unwrap();
        // R⁻¹ by Newton: X ← X (2 − R X), from a start that is near enough.
        let two = (Tensor::eye(rank, DType::F32, &Device::Cpu).unwrap() * 2.0).unwrap();
        let mut inverse = Tensor::eye(rank, DType::F32, &Device::Cpu).unwrap();
        for _ in 0..20 {
            inverse = inverse.matmul(&(&two - turn.matmul(&inverse).unwrap()).unwrap()).unwrap();
        }
        LoraLayer {
            up: layer.up.matmul(&turn).unwrap(),
            down: inverse.matmul(&layer.down).unwrap(),
            alpha: layer.alpha,
        }
    }

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_form_changes_what_the_lora_does(lora in any_lora(), other in any_lora()) {
            // The reference: the LoRA's own shapes, another person's numbers, some layers untrained.
            let mut reference = lora.clone();
            for (i, (name, layer)) in reference.layers.iter_mut().enumerate() {
                let seed = i as u64 + other.layers.len() as u64;
                let factor = if other.layers.contains_key(name) { 0.0 } else { 1.0 };
                layer.up = (normal(seed, 3, layer.up.shape(), &Device::Cpu).unwrap() * factor).unwrap();
            }
            for kind in [Canonical::None, Canonical::Svd, Canonical::Procrustes] {
                let same = Form::new(kind, &reference).unwrap().apply(&lora).unwrap();
                for (name, layer) in &lora.layers {
                    let moved = moved(layer, &same.layers[name]);
                    prop_assert!(moved < 1e-6, "{kind:?} moves `{name}` by {moved}");
                    prop_assert_eq!(layer.alpha, same.layers[name].alpha);
                }
            }
        }
    }

    #[test]
    fn all_factorisations_of_a_change_get_the_same_form() {
        let layer = |stream| {
            let (down, up) =
                (normal(3, stream, (3, 20), &Device::Cpu), normal(3, stream + 1, (30, 3), &Device::Cpu));
            LoraLayer { down: down.unwrap(), up: up.unwrap(), alpha: 3.0 }
        };
        let lora = |layer| Lora { layers: [("m".to_string(), layer)].into(), ..Lora::default() };
        let (reference, one) = (lora(layer(0)), layer(2));
        let other = refactored(&one, 9);
        assert!(moved(&one, &other) < 1e-5 && far(&one.up, &other.up) > 0.05);
        for kind in [Canonical::Svd, Canonical::Procrustes] {
            let form = Form::new(kind, &reference).unwrap();
            let (a, b) = (form.apply(&lora(one.clone())).unwrap(), form.apply(&lora(other.clone())).unwrap());
            assert!(far(&a.layers["m"].up, &b.layers["m"].up) < 1e-4, "{kind:?}");
            assert!(far(&a.layers["m"].down, &b.layers["m"].down) < 1e-4, "{kind:?}");
        }
    }

    #[test]
    fn near_singular_values_flip_the_svd_form_and_not_the_aligned_one() {
        // Two people whose two directions differ by a thousandth in strength, the other way round.
        let layer = |first: f32, second: f32| {
            let up = Tensor::new(&[[first, 0.0], [0.0, second], [0.0, 0.0]], &Device::Cpu).unwrap();
            let down = Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], &Device::Cpu).unwrap();
            Lora { layers: [("m".into(), LoraLayer { down, up, alpha: 2.0 })].into(), ..Lora::default() }
        };
        let (a, b) = (layer(1.001, 1.0), layer(1.0, 1.001));
        let distance = |kind| {
            let form = Form::new(kind, &a).unwrap();
            let up = |lora: &Lora| form.apply(lora).unwrap().layers["m"].up.clone();
            far(&up(&a), &up(&b))
        };
        assert!(distance(Canonical::Svd) > 0.9);
        assert!(distance(Canonical::Procrustes) < 2e-3);
    }

    #[test]
    fn a_reference_of_another_rank_is_refused_by_layer() {
        let lora = |rank: usize| {
            let (down, up) = (normal(1, 0, (rank, 5), &Device::Cpu), normal(1, 1, (6, rank), &Device::Cpu));
            let layer = LoraLayer { down: down.unwrap(), up: up.unwrap(), alpha: 1.0 };
            Lora { layers: [("m".into(), layer)].into(), ..Lora::default() }
        };
        let form = Form::new(Canonical::Procrustes, &lora(2)).unwrap();
        assert!(form.apply(&lora(3)).unwrap_err().to_string().contains("rank"));
    }
}
