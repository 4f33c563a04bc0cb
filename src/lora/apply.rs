//! LoRAs into a model: merged into its weights once, or attached beside them.
//!
//! Merged: W' = W + Σ weight · (alpha / R) · up · down, in f32 from the original weights; drawing then costs
//! nothing extra. Attached: y + weight · (alpha / R) · up(down(x)), changed at any time.
//!
//! A model is given by how its linear layers are visited, so that this module knows no network:
//! `merge(|visit| unet.visit_linears(visit), …)`. Layers of the text encoders are visited under
//! `text_encoder.` and `text_encoder_2.`.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};

use super::{Lora, LoraError, LoraLayer};
use crate::layers::{Adapter, Linear};

/// What [`merge`] calls with each linear layer and its path.
pub type Visit<'a> = dyn FnMut(&str, &mut Linear) + 'a;

/// What to do with layers for which the model has no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmatched {
    /// Fail and name them; nothing is changed.
    Refuse,
    /// Leave them out.
    Allow,
}

/// What was merged, and the way back.
#[derive(Debug, Default)]
pub struct Merged {
    /// Paths of the layers that were changed.
    pub matched: Vec<String>,
    /// Paths of the layers for which the model has no place.
    pub unmatched: Vec<String>,
    originals: BTreeMap<String, Tensor>,
}

impl Merged {
    /// Puts the original weights back, bit for bit.
    pub fn undo(self, visit: impl FnOnce(&mut Visit)) {
        visit(&mut |path, linear| {
            if let Some(weight) = self.originals.get(path) {
                linear.weight = weight.clone();
            }
        });
    }
}

/// Adds all `loras`, each times its weight, to the model's weights.
///
/// # Errors
/// [`LoraError::NoPlace`] and [`LoraError::Size`]; the model is then unchanged.
pub fn merge(
    mut visit: impl FnMut(&mut Visit),
    loras: &[(&Lora, f64)],
    unmatched: Unmatched,
) -> Result<Merged, LoraError> {
    let mut merged = Merged::default();
    let mut changed = BTreeMap::new();
    let unmatched_modules = each_layer(&mut visit, loras, unmatched, |path, linear, layers| {
        let weight = &linear.weight;
        let mut sum = weight.to_dtype(DType::F32)?;
        for (layer, factor) in layers {
            let delta = (layer.delta()?.to_device(weight.device())? * *factor)?;
            sum = (sum + delta)?;
        }
        changed.insert(path.to_string(), sum.to_dtype(weight.dtype())?);
        merged.originals.insert(path.to_string(), weight.clone());
        merged.matched.push(path.to_string());
        Ok(())
    })?;
    visit(&mut |path, linear| {
        if let Some(weight) = changed.remove(path) {
            linear.weight = weight;
        }
    });
    merged.unmatched = unmatched_modules;
    Ok(merged)
}

/// What was attached.
#[derive(Debug, Default)]
pub struct Attached {
    /// Paths of the layers that have an adapter now.
    pub matched: Vec<String>,
    /// Paths of the layers for which the model has no place.
    pub unmatched: Vec<String>,
}

/// Attaches all `loras`, each times its weight, beside the model's weights, in the place of what was attached
/// before. An empty list takes everything off.
///
/// # Errors
/// [`LoraError::NoPlace`] and [`LoraError::Size`]; the model is then unchanged.
pub fn attach(
    mut visit: impl FnMut(&mut Visit),
    loras: &[(&Lora, f64)],
    unmatched: Unmatched,
) -> Result<Attached, LoraError> {
    let mut adapters = BTreeMap::new();
    let unmatched = each_layer(&mut visit, loras, unmatched, |path, linear, layers| {
        adapters.insert(path.to_string(), adapter(linear, layers)?);
        Ok(())
    })?;
    let matched = adapters.keys().cloned().collect();
    visit(&mut |path, linear| linear.adapter = adapters.remove(path));
    Ok(Attached { matched, unmatched })
}

/// One adapter for all layers: their downs above each other, their scaled ups beside each other.
fn adapter(linear: &Linear, layers: &[(&LoraLayer, f64)]) -> Result<Adapter, LoraError> {
    let place = |tensor: &Tensor| tensor.to_device(linear.weight.device())?.to_dtype(linear.weight.dtype());
    if let [(layer, factor)] = layers {
        return Ok(Adapter {
            down: place(&layer.down)?,
            up: place(&layer.up)?,
            scale: layer.scale() * factor,
        });
    }
    let mut downs = Vec::new();
    let mut ups = Vec::new();
    for (layer, factor) in layers {
        downs.push(place(&layer.down)?);
        ups.push(place(&(layer.up.to_dtype(DType::F32)? * (layer.scale() * factor))?)?);
    }
    Ok(Adapter { down: Tensor::cat(&downs, 0)?, up: Tensor::cat(&ups, 1)?, scale: 1.0 })
}

/// Calls `with` for every linear layer that a LoRA changes; returns the modules without a place.
fn each_layer(
    visit: &mut impl FnMut(&mut Visit),
    loras: &[(&Lora, f64)],
    unmatched: Unmatched,
    mut with: impl FnMut(&str, &Linear, &[(&LoraLayer, f64)]) -> Result<(), LoraError>,
) -> Result<Vec<String>, LoraError> {
    let wanted: BTreeSet<&String> = loras.iter().flat_map(|(lora, _)| lora.layers.keys()).collect();
    let mut found = BTreeSet::new();
    visit(&mut |path, _| {
        found.insert(path.to_string());
    });
    let missing: Vec<String> =
        wanted.iter().filter(|module| !found.contains(**module)).map(|m| m.to_string()).collect();
    if !missing.is_empty() && unmatched == Unmatched::Refuse {
        return Err(LoraError::NoPlace { count: wanted.len(), modules: missing });
    }
    let mut outcome = Ok(());
    visit(&mut |path, linear| {
        if outcome.is_err() {
            return;
        }
        let layers: Vec<(&LoraLayer, f64)> =
            loras.iter().filter_map(|(lora, factor)| Some((lora.layers.get(path)?, *factor))).collect();
        if layers.is_empty() {
            return;
        }
        outcome = layers.iter().try_for_each(|(layer, _)| fits(path, layer, linear));
        if outcome.is_ok() {
            outcome = with(path, linear, &layers);
        }
    });
    outcome.map(|()| missing)
}

fn fits(path: &str, layer: &LoraLayer, linear: &Linear) -> Result<(), LoraError> {
    let model = linear.weight.dims2()?;
    if layer.shape() == model {
        return Ok(());
    }
    Err(LoraError::Size { module: path.to_string(), lora: layer.shape(), model })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::noise::normal;
    use candle_core::{Device, Module};

    const PATHS: [&str; 2] = ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"];

    /// Two linear layers, 5 → 6.
    fn model() -> Vec<Linear> {
        let linear = |i| Linear { weight: random(i, (6, 5)), bias: Some(random(i + 2, 6)), adapter: None };
        (0..2).map(linear).collect()
    }

    fn random(stream: u64, shape: impl Into<candle_core::Shape>) -> Tensor {
        normal(3, stream, shape, &Device::Cpu).unwrap()
    }

    fn walk(model: &mut [Linear]) -> impl FnMut(&mut Visit) {
        |visit| PATHS.iter().zip(model.iter_mut()).for_each(|(path, linear)| visit(path, linear))
    }

    fn lora(stream: u64, rank: usize, alpha: f32) -> Lora {
        let layer =
            |i| LoraLayer::new("", random(stream + i, (rank, 5)), random(stream + 9 + i, (6, rank)), alpha);
        let layers = PATHS.iter().zip(0..).map(|(path, i)| (path.to_string(), layer(i).unwrap()));
        Lora { layers: layers.collect(), metadata: BTreeMap::new() }
    }

    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn merged_and_attached_loras_give_the_same_output() -> anyhow::Result<()> {
        let (one, two) = (lora(20, 4, 1.0), lora(50, 2, 3.0));
        let x = random(90, (7, 5));
        for loras in [vec![(&one, 1.0)], vec![(&one, 0.8), (&two, -0.5)]] {
            let (mut merged, mut attached) = (model(), model());
            merge(walk(&mut merged), &loras, Unmatched::Refuse)?;
            attach(walk(&mut attached), &loras, Unmatched::Refuse)?;
            for (merged, attached) in merged.iter().zip(&attached) {
                assert!(distance(&merged.forward(&x)?, &attached.forward(&x)?) < 1e-5);
            }
        }
        Ok(())
    }

    #[test]
    fn merging_adds_weight_times_alpha_over_rank_times_up_down() -> anyhow::Result<()> {
        let mut changed = model();
        merge(walk(&mut changed), &[(&lora(20, 4, 1.0), 0.5)], Unmatched::Refuse)?;
        let layer = &lora(20, 4, 1.0).layers[PATHS[1]];
        let by_hand = (model()[1].weight.clone() + (layer.up.matmul(&layer.down)? * (0.5 / 4.0))?)?;
        assert!(distance(&changed[1].weight, &by_hand) < 1e-6);
        Ok(())
    }

    #[test]
    fn merging_then_undoing_restores_the_weights() -> anyhow::Result<()> {
        let mut model_under_test = model();
        for _ in 0..2 {
            let merged = merge(walk(&mut model_under_test), &[(&lora(20, 4, 1.0), 1.0)], Unmatched::Refuse)?;
            assert_eq!(merged.matched, PATHS);
            assert!(distance(&model_under_test[0].weight, &model()[0].weight) > 0.1);
            merged.undo(walk(&mut model_under_test));
            assert_eq!(distance(&model_under_test[0].weight, &model()[0].weight), 0.0);
        }
        Ok(())
    }

    #[test]
    fn attaching_nothing_takes_adapters_off() -> anyhow::Result<()> {
        let mut model = model();
        attach(walk(&mut model), &[(&lora(20, 4, 1.0), 1.0)], Unmatched::Refuse)?;
        assert!(model[0].adapter.is_some());
        attach(walk(&mut model), &[], Unmatched::Refuse)?;
        assert!(model[0].adapter.is_none());
        Ok(())
    }

    #[test]
    fn half_precision_weights_are_changed_in_single_precision() -> anyhow::Result<()> {
        let mut half = model();
        half.iter_mut().for_each(|linear| linear.weight = linear.weight.to_dtype(DType::F16).unwrap());
        let original = half[0].weight.to_dtype(DType::F32)?;
        merge(walk(&mut half), &[(&lora(20, 4, 1.0), 1.0)], Unmatched::Refuse)?;
        assert_eq!(half[0].weight.dtype(), DType::F16);
        let exact = (original + lora(20, 4, 1.0).layers[PATHS[0]].delta()?)?.to_dtype(DType::F16)?;
        assert_eq!(distance(&half[0].weight.to_dtype(DType::F32)?, &exact.to_dtype(DType::F32)?), 0.0);
        Ok(())
    }

    #[test]
    fn layers_without_a_place_are_refused_or_reported() -> anyhow::Result<()> {
        let mut stray = lora(20, 4, 1.0);
        let layer = stray.layers[PATHS[0]].clone();
        stray.layers.insert("up_blocks.7.attentions.0.proj_in".to_string(), layer);
        let mut model_under_test = model();
        let error =
            merge(walk(&mut model_under_test), &[(&stray, 1.0)], Unmatched::Refuse).unwrap_err().to_string();
        assert!(error.contains("1 of 3 layers") && error.contains("up_blocks.7"), "{error}");
        assert_eq!(distance(&model_under_test[0].weight, &model()[0].weight), 0.0);
        let merged = merge(walk(&mut model_under_test), &[(&stray, 1.0)], Unmatched::Allow)?;
        assert_eq!((merged.matched.len(), merged.unmatched.len()), (2, 1));
        Ok(())
    }

    #[test]
    fn a_lora_of_another_size_changes_nothing() {
        let mut wrong = lora(20, 4, 1.0);
        let layer = LoraLayer::new("", random(1, (4, 8)), random(2, (6, 4)), 4.0).unwrap();
        wrong.layers.insert(PATHS[1].to_string(), layer);
        let mut model_under_test = model();
        let error = merge(walk(&mut model_under_test), &[(&wrong, 1.0)], Unmatched::Refuse).unwrap_err();
        assert!(matches!(error, LoraError::Size { lora: (6, 8), model: (6, 5), .. }), "{error}");
        assert_eq!(distance(&model_under_test[0].weight, &model()[0].weight), 0.0);
    }
}
