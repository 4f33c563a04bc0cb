//! LoRA files into a model: merged into its weights once, or attached beside them.
//!
//! Merged: W' = W + Σ ΔW, in f32 from the original weights; drawing then costs nothing extra. Attached:
//! y + weight · (alpha / R) · up(down(x)), changed at any time; what is no product of two thin factors (LoHa, DoRA,
//! norms, …) is merged in both cases.
//!
//! A model is given by how its layers are visited, so that this module knows no network:
//! `merge(|visit| unet.visit_layers(visit), …)`. Layers of the text encoders are visited under
//! `text_encoder.` and `text_encoder_2.`.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};

use super::LoraError;
use super::adapter::{Adapter, AdapterFile};
use super::block_weights::BlockWeights;
use crate::layers::{self, Layer, Visit, add_low_rank, compute_dtype};

/// What to do with layers for which the model has no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmatched {
    /// Fail and name them; nothing is changed.
    Refuse,
    /// Leave them out; fail only if nothing else is left.
    Allow,
    /// Leave them out, and be content with nothing.
    Ignore,
}

/// Whether a merge can be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Originals {
    /// The original weights of what is changed are kept in memory.
    Keep,
    /// They are let go one by one, so that memory holds each weight once.
    Drop,
}

/// Which predictions an attached LoRA changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// All.
    Both,
    /// Of a batch, the second half alone: where guidance is used, what follows the prompt.
    Positive,
}

/// What was changed, and the way back.
#[derive(Debug, Default)]
pub struct Applied {
    /// Paths of the layers that were changed.
    pub matched: Vec<String>,
    /// Paths of the layers for which the model has no place.
    pub unmatched: Vec<String>,
    originals: BTreeMap<String, (Tensor, Option<Tensor>)>,
}

impl Applied {
    /// Puts the original weights back, bit for bit, and takes adapters off.
    pub fn undo(self, visit: impl FnOnce(&mut Visit)) {
        visit(&mut |path, mut layer| {
            if let Some((weight, bias)) = self.originals.get(path) {
                layer.set(weight.clone(), bias.clone());
            }
            layer.set_adapter(None);
        });
    }
}

/// Adds all `loras`, each as strong as is said, to the model's weights.
///
/// # Errors
/// [`LoraError::NoPlace`] and [`LoraError::Size`]; the model is then unchanged.
pub fn merge(
    mut visit: impl FnMut(&mut Visit),
    loras: &[(&AdapterFile, BlockWeights)],
    unmatched: Unmatched,
    originals: Originals,
) -> Result<Applied, LoraError> {
    let mut applied = Applied { unmatched: check(&mut visit, loras, unmatched)?, ..Applied::default() };
    each_layer(&mut visit, loras, |path, mut layer, adapters| {
        let before = add(&mut layer, adapters)?;
        if originals == Originals::Keep {
            applied.originals.insert(path.to_string(), before);
        }
        applied.matched.push(path.to_string());
        Ok(())
    })?;
    Ok(applied)
}

/// Attaches all `loras`, each as strong as is said, beside the model's weights, in the place of what was attached
/// before. An empty list takes everything off. Kinds that cannot stand beside a weight are merged.
///
/// # Errors
/// [`LoraError::NoPlace`] and [`LoraError::Size`], and with [`Branch::Positive`] [`LoraError::Kind`] for a kind
/// that cannot stand beside a weight; the model is then unchanged.
pub fn attach(
    mut visit: impl FnMut(&mut Visit),
    loras: &[(&AdapterFile, BlockWeights)],
    unmatched: Unmatched,
    branch: Branch,
) -> Result<Applied, LoraError> {
    if branch == Branch::Positive {
        let modules = loras.iter().flat_map(|(adapters, _)| &adapters.modules);
        for (module, adapter) in modules {
            if !is_low_rank(adapter) {
                return Err(LoraError::Kind { key: module.clone(), kind: adapter.kind_name() });
            }
        }
    }
    let mut applied = Applied::default();
    if !loras.is_empty() {
        applied.unmatched = check(&mut visit, loras, unmatched)?;
    }
    visit(&mut |_, mut layer| layer.set_adapter(None));
    each_layer(&mut visit, loras, |path, mut layer, adapters| {
        let (beside, inside): (Vec<_>, Vec<_>) =
            adapters.iter().partition(|(adapter, _)| is_low_rank(adapter));
        if !inside.is_empty() {
            applied.originals.insert(path.to_string(), add(&mut layer, &inside)?);
        }
        if !beside.is_empty() {
            let adapter = low_rank_branch(layer.weight(), &beside, branch)?;
            layer.set_adapter(Some(adapter));
        }
        applied.matched.push(path.to_string());
        Ok(())
    })?;
    Ok(applied)
}

/// Keeps the layers that `loras` change in f32, so that what is merged into them is not rounded to 16 bits.
///
/// # Errors
/// [`LoraError::Tensor`] where there is no memory for them.
pub fn widen(
    mut visit: impl FnMut(&mut Visit),
    loras: &[(&AdapterFile, BlockWeights)],
) -> Result<(), LoraError> {
    each_layer(&mut visit, loras, |_, mut layer, _| {
        let weight = layer.weight().to_dtype(DType::F32)?;
        let bias = layer.bias().map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        layer.set(weight, bias);
        Ok(())
    })
}

/// Adds ΔW and the change of the bias; gives back what was there.
fn add(layer: &mut Layer, adapters: &[(&Adapter, f64)]) -> Result<(Tensor, Option<Tensor>), LoraError> {
    let (weight, bias) = (layer.weight().clone(), layer.bias().cloned());
    let after = merged_weight(&weight, adapters)?;
    let adapter = bias_delta(bias.as_ref(), adapters)?;
    let bias_after = match (adapter, &bias) {
        (None, bias) => bias.clone(),
        (Some(adapter), Some(bias)) => Some(merged_bias(bias, &adapter)?),
        (Some(adapter), None) => Some(adapter.to_device(weight.device())?.to_dtype(weight.dtype())?),
    };
    layer.set(after, bias_after);
    Ok((weight, bias))
}

/// W + Σ times · ΔW, summed in f32 from the original weight and rounded once to its type.
pub fn merged_weight(weight: &Tensor, adapters: &[(&Adapter, f64)]) -> Result<Tensor, LoraError> {
    let (mut downs, mut ups) = (Vec::new(), Vec::new());
    let mut sum = weight.clone();
    let mut original = None;
    for (adapter, times) in adapters {
        if let Some((down, up)) = adapter.factors()? {
            downs.push(down);
            ups.push((up * *times)?);
            continue;
        }
        if original.is_none() {
            sum = weight.to_dtype(DType::F32)?;
        }
        let original: &Tensor = original.get_or_insert_with(|| sum.clone());
        sum = (sum + adapter.delta(original, *times)?)?;
    }
    if !downs.is_empty() {
        sum = add_low_rank(&sum, &Tensor::cat(&ups, 1)?, &Tensor::cat(&downs, 0)?)?;
    }
    Ok(sum.to_dtype(weight.dtype())?)
}

/// Σ times · Δbias (out) in f32 for the original `bias`, where one of the adapters changes it.
pub fn bias_delta(bias: Option<&Tensor>, adapters: &[(&Adapter, f64)]) -> Result<Option<Tensor>, LoraError> {
    let mut sum: Option<Tensor> = None;
    for (adapter, times) in adapters {
        let Some(change) = &adapter.bias else { continue };
        let delta = change.delta(bias, *times)?;
        sum = Some(match sum {
            Some(sum) => (sum + delta)?,
            None => delta,
        });
    }
    Ok(sum)
}

/// A bias with its change, in its own type.
pub fn merged_bias(bias: &Tensor, adapter: &Tensor) -> Result<Tensor, LoraError> {
    let sum = (bias.to_dtype(DType::F32)? + adapter.to_device(bias.device())?)?;
    Ok(sum.to_dtype(bias.dtype())?)
}

/// Whether it is a product of two thin factors and nothing else.
fn is_low_rank(adapter: &Adapter) -> bool {
    matches!(adapter.kind_name(), "LoRA" | "LoCon" | "LoCon (Tucker)") && adapter.bias.is_none()
}

/// One adapter for all changes: their downs above each other, their scaled ups beside each other.
fn low_rank_branch(
    weight: &Tensor,
    adapters: &[(&Adapter, f64)],
    branch: Branch,
) -> Result<layers::Adapter, LoraError> {
    let dtype = compute_dtype(weight.dtype(), weight.device());
    let place = |tensor: &Tensor| tensor.to_device(weight.device())?.to_dtype(dtype);
    let mut downs = Vec::new();
    let mut ups = Vec::new();
    for (adapter, times) in adapters {
        let (Some(kernel), Some((_, up))) = (adapter.kernel()?, adapter.factors()?) else { continue };
        let kernel = match *weight.dims() {
            [_, input, k, _] => kernel.reshape((kernel.dim(0)?, input, k, k))?,
            _ => kernel.reshape((kernel.dim(0)?, ()))?,
        };
        downs.push(place(&kernel)?);
        ups.push(place(&(up * *times)?)?);
    }
    let (down, up) = (Tensor::cat(&downs, 0)?, Tensor::cat(&ups, 1)?);
    let up = match branch {
        Branch::Both => up,
        // Two people in the batch, the first of whom has no LoRA.
        Branch::Positive => Tensor::stack(&[&up.zeros_like()?, &up], 0)?,
    };
    Ok(layers::Adapter { down, up, scale: 1.0 })
}

/// Makes sure that everything fits before anything is changed; returns the modules without a place.
///
/// # Errors
/// [`LoraError::NoPlace`] and [`LoraError::Size`].
pub fn check(
    mut visit: impl FnMut(&mut Visit),
    loras: &[(&AdapterFile, BlockWeights)],
    unmatched: Unmatched,
) -> Result<Vec<String>, LoraError> {
    let wanted: BTreeSet<&String> = loras.iter().flat_map(|(adapters, _)| adapters.modules.keys()).collect();
    let mut found: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    visit(&mut |path, layer| {
        found.insert(path.to_string(), layer.weight().dims().to_vec());
    });
    let missing: Vec<String> =
        wanted.iter().filter(|module| !found.contains_key(**module)).map(|m| m.to_string()).collect();
    let guess = || loras.iter().find_map(|(adapters, _)| made_for(adapters, &found));
    let refuse = match unmatched {
        Unmatched::Refuse => !missing.is_empty(),
        Unmatched::Allow => missing.len() == wanted.len(),
        Unmatched::Ignore => false,
    };
    if refuse {
        return Err(LoraError::NoPlace { count: wanted.len(), modules: missing, guess: guess() });
    }
    for (module, adapter) in loras.iter().flat_map(|(adapters, _)| &adapters.modules) {
        if let Some(model) = found.get(module).filter(|shape| !adapter.fits(shape)) {
            let (module, model, lora) = (module.clone(), model.clone(), adapter.target());
            return Err(LoraError::Size { module, lora, model, guess: guess() });
        }
    }
    Ok(missing)
}

/// A sentence about the model that a file seems to be made for, by the width of the text that it listens to.
fn made_for(adapters: &AdapterFile, model: &BTreeMap<String, Vec<usize>>) -> Option<String> {
    const LISTENS: &str = ".attn2.to_k";
    let ours = model.iter().find(|(path, _)| path.ends_with(LISTENS))?.1[1];
    let (_, adapter) = adapters.modules.iter().find(|(path, _)| path.ends_with(LISTENS))?;
    let theirs = *adapter.target().get(1)?;
    let name = match theirs {
        0 => return None,
        768 => "SD 1.5",
        1024 => "SD 2",
        2048 => "SDXL",
        1280 => "the SDXL refiner or Stable Cascade",
        _ => "another base",
    };
    (theirs != ours).then(|| {
        format!("; this is a LoRA for {name}: {theirs}-wide text context, this base's is {ours} wide")
    })
}

/// Calls `with` for every layer that a LoRA changes.
fn each_layer(
    visit: &mut impl FnMut(&mut Visit),
    loras: &[(&AdapterFile, BlockWeights)],
    mut with: impl FnMut(&str, Layer, &[(&Adapter, f64)]) -> Result<(), LoraError>,
) -> Result<(), LoraError> {
    let mut outcome = Ok(());
    visit(&mut |path, layer| {
        let adapters: Vec<(&Adapter, f64)> = loras
            .iter()
            .filter_map(|(adapters, weights)| Some((adapters.modules.get(path)?, weights.of(path))))
            .collect();
        if outcome.is_ok() && !adapters.is_empty() {
            outcome = with(path, layer, &adapters);
        }
    });
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::noise::normal;
    use crate::layers::{Conv2d, Linear};
    use crate::lora::adapter::{AdapterKind, BiasChange, Magnitude};
    use crate::lora::{Lora, LoraLayer};
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
        |visit| {
            PATHS.iter().zip(model.iter_mut()).for_each(|(path, linear)| visit(path, Layer::Linear(linear)))
        }
    }

    fn lora(stream: u64, rank: usize, alpha: f32) -> AdapterFile {
        AdapterFile::from(&plain(stream, rank, alpha))
    }

    fn merge_all(
        model: &mut [Linear],
        loras: &[(&AdapterFile, f64)],
        unmatched: Unmatched,
    ) -> Result<Applied, LoraError> {
        let loras: Vec<_> =
            loras.iter().map(|(adapters, weight)| (*adapters, BlockWeights::all(*weight))).collect();
        merge(walk(model), &loras, unmatched, Originals::Keep)
    }

    fn attach_all(model: &mut [Linear], loras: &[(&AdapterFile, f64)]) -> Result<Applied, LoraError> {
        let loras: Vec<_> =
            loras.iter().map(|(adapters, weight)| (*adapters, BlockWeights::all(*weight))).collect();
        attach(walk(model), &loras, Unmatched::Refuse, Branch::Both)
    }

    fn plain(stream: u64, rank: usize, alpha: f32) -> Lora {
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
            merge_all(&mut merged, &loras, Unmatched::Refuse)?;
            attach_all(&mut attached, &loras)?;
            for (merged, attached) in merged.iter().zip(&attached) {
                assert!(distance(&merged.forward(&x)?, &attached.forward(&x)?) < 1e-5);
            }
        }
        Ok(())
    }

    #[test]
    fn merging_adds_weight_times_alpha_over_rank_times_up_down() -> anyhow::Result<()> {
        let mut changed = model();
        merge_all(&mut changed, &[(&lora(20, 4, 1.0), 0.5)], Unmatched::Refuse)?;
        let layer = &plain(20, 4, 1.0).layers[PATHS[1]];
        let by_hand = (model()[1].weight.clone() + (layer.up.matmul(&layer.down)? * (0.5 / 4.0))?)?;
        assert!(distance(&changed[1].weight, &by_hand) < 1e-6);
        Ok(())
    }

    #[test]
    fn merging_then_undoing_restores_the_weights() -> anyhow::Result<()> {
        let mut model_under_test = model();
        for _ in 0..2 {
            let merged = merge_all(&mut model_under_test, &[(&lora(20, 4, 1.0), 1.0)], Unmatched::Refuse)?;
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
        attach_all(&mut model, &[(&lora(20, 4, 1.0), 1.0)])?;
        assert!(model[0].adapter.is_some());
        attach_all(&mut model, &[])?;
        assert!(model[0].adapter.is_none());
        Ok(())
    }

    #[test]
    fn widened_weights_keep_what_is_merged_into_them() -> anyhow::Result<()> {
        let mut half = model();
        half.iter_mut().for_each(|linear| linear.weight = linear.weight.to_dtype(DType::F16).unwrap());
        let adapters = lora(20, 4, 1.0);
        let loras = [(&adapters, BlockWeights::all(1.0))];
        let original = half[0].weight.to_dtype(DType::F32)?;
        widen(walk(&mut half), &loras)?;
        merge(walk(&mut half), &loras, Unmatched::Refuse, Originals::Drop)?;
        let exact = (original + plain(20, 4, 1.0).layers[PATHS[0]].delta()?)?;
        assert_eq!(half[0].weight.dtype(), DType::F32);
        assert!(distance(&half[0].weight, &exact) < 1e-6);
        Ok(())
    }

    #[test]
    fn half_precision_weights_are_changed_in_single_precision() -> anyhow::Result<()> {
        let mut half = model();
        half.iter_mut().for_each(|linear| linear.weight = linear.weight.to_dtype(DType::F16).unwrap());
        let original = half[0].weight.to_dtype(DType::F32)?;
        merge_all(&mut half, &[(&lora(20, 4, 1.0), 1.0)], Unmatched::Refuse)?;
        assert_eq!(half[0].weight.dtype(), DType::F16);
        let exact = (original + plain(20, 4, 1.0).layers[PATHS[0]].delta()?)?.to_dtype(DType::F16)?;
        assert_eq!(distance(&half[0].weight.to_dtype(DType::F32)?, &exact.to_dtype(DType::F32)?), 0.0);
        Ok(())
    }

    #[test]
    fn layers_without_a_place_are_refused_or_reported() -> anyhow::Result<()> {
        let mut stray = lora(20, 4, 1.0);
        let layer = stray.modules[PATHS[0]].clone();
        stray.modules.insert("up_blocks.7.attentions.0.proj_in".to_string(), layer);
        let mut model_under_test = model();
        let error =
            merge_all(&mut model_under_test, &[(&stray, 1.0)], Unmatched::Refuse).unwrap_err().to_string();
        assert!(error.contains("1 of 3 layers") && error.contains("up_blocks.7"), "{error}");
        assert_eq!(distance(&model_under_test[0].weight, &model()[0].weight), 0.0);
        let merged = merge_all(&mut model_under_test, &[(&stray, 1.0)], Unmatched::Allow)?;
        assert_eq!((merged.matched.len(), merged.unmatched.len()), (2, 1));
        Ok(())
    }

    #[test]
    fn a_lora_of_another_size_changes_nothing() {
        let mut wrong = lora(20, 4, 1.0);
        let layer = LoraLayer::new("", random(1, (4, 8)), random(2, (6, 4)), 4.0).unwrap();
        wrong.modules.insert(PATHS[1].to_string(), (&layer).into());
        let mut model_under_test = model();
        let error = merge_all(&mut model_under_test, &[(&wrong, 1.0)], Unmatched::Refuse).unwrap_err();
        assert!(error.to_string().contains("made for a weight of [6, 8], the model has [6, 5]"), "{error}");
        assert_eq!(distance(&model_under_test[0].weight, &model()[0].weight), 0.0);
    }

    #[test]
    fn a_dora_is_merged_in_both_modes_and_taken_out_again() -> anyhow::Result<()> {
        let mut dora = lora(20, 4, 1.0);
        for adapter in dora.modules.values_mut() {
            adapter.magnitude = Some(Magnitude { values: random(77, (6, 1)).abs()?, on_input: false });
            adapter.bias = Some(BiasChange::Added(random(78, 6)));
        }
        let (mut merged, mut attached) = (model(), model());
        merge_all(&mut merged, &[(&dora, 0.7)], Unmatched::Refuse)?;
        let applied = attach_all(&mut attached, &[(&dora, 0.7)])?;
        assert!(attached[0].adapter.is_none());
        let x = random(90, (7, 5));
        assert_eq!(distance(&merged[0].forward(&x)?, &attached[0].forward(&x)?), 0.0);
        assert!(distance(&merged[0].forward(&x)?, &model()[0].forward(&x)?) > 0.1);
        applied.undo(walk(&mut attached));
        assert_eq!(distance(&attached[0].forward(&x)?, &model()[0].forward(&x)?), 0.0);
        let loras = [(&dora, BlockWeights::all(1.0))];
        let error = attach(walk(&mut attached), &loras, Unmatched::Refuse, Branch::Positive).unwrap_err();
        assert!(matches!(error, LoraError::Kind { kind: "DoRA", .. }), "{error}");
        Ok(())
    }

    #[test]
    fn on_the_positive_branch_only_the_second_half_of_the_batch_changes() -> anyhow::Result<()> {
        let adapters = lora(20, 4, 1.0);
        let loras = [(&adapters, BlockWeights::all(1.0))];
        let (mut half, mut whole) = (model(), model());
        attach(walk(&mut half), &loras, Unmatched::Refuse, Branch::Positive)?;
        attach(walk(&mut whole), &loras, Unmatched::Refuse, Branch::Both)?;
        let x = random(90, (2, 3, 5));
        let y = half[0].forward(&x)?;
        assert_eq!(distance(&y.get(0)?, &model()[0].forward(&x)?.get(0)?), 0.0);
        assert!(distance(&y.get(1)?, &whole[0].forward(&x)?.get(1)?) < 1e-6);
        assert!(distance(&y.get(1)?, &model()[0].forward(&x)?.get(1)?) > 0.1);
        Ok(())
    }

    #[test]
    fn a_convolution_with_a_core_gives_the_same_merged_and_attached() -> anyhow::Result<()> {
        let vars = crate::weights::Trainable::new(5);
        let geometry = crate::layers::ConvGeometry { stride: 2, ..crate::layers::ConvGeometry::same(3) };
        let conv = Conv2d::new(4, 6, geometry, vars.builder(&Device::Cpu))?;
        let kind = AdapterKind::LowRank {
            down: random(1, (2, 4, 1, 1)),
            up: random(2, (6, 2, 1, 1)),
            mid: Some(random(3, (2, 2, 3, 3))),
            alpha: 1.0,
        };
        let modules = [("conv_in".to_string(), Adapter { kind, magnitude: None, bias: None })].into();
        let adapters = AdapterFile { modules, ..AdapterFile::default() };
        let loras = [(&adapters, BlockWeights::all(0.5))];
        let (mut merged, mut attached, mut half) = (conv.clone(), conv.clone(), conv.clone());
        merge(|v| v("conv_in", Layer::Conv(&mut merged)), &loras, Unmatched::Refuse, Originals::Drop)?;
        attach(|v| v("conv_in", Layer::Conv(&mut attached)), &loras, Unmatched::Refuse, Branch::Both)?;
        attach(|v| v("conv_in", Layer::Conv(&mut half)), &loras, Unmatched::Refuse, Branch::Positive)?;
        let x = random(9, (2, 4, 7, 7));
        let y = attached.forward(&x)?;
        assert!(distance(&merged.forward(&x)?, &y) < 1e-5);
        assert!(distance(&conv.forward(&x)?, &y) > 0.1);
        assert!(distance(&half.forward(&x)?.get(0)?, &conv.forward(&x)?.get(0)?) < 1e-6);
        assert!(distance(&half.forward(&x)?.get(1)?, &y.get(1)?) < 1e-6);
        Ok(())
    }

    #[test]
    fn a_lora_for_another_base_is_named() {
        const TO_K: &str = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k";
        let mut linear = Linear { weight: random(1, (6, 12)), bias: None, adapter: None };
        let layer = LoraLayer::new("", random(1, (4, 768)), random(2, (6, 4)), 4.0).unwrap();
        for path in [TO_K, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"] {
            let modules = [(path.to_string(), Adapter::from(&layer))].into();
            let adapters = AdapterFile { modules, ..AdapterFile::default() };
            let walk = |visit: &mut Visit| visit(TO_K, Layer::Linear(&mut linear));
            let loras = [(&adapters, BlockWeights::all(1.0))];
            let error = merge(walk, &loras, Unmatched::Allow, Originals::Drop).unwrap_err().to_string();
            assert!(error.contains("SD 1.5: 768-wide text context, this base's is 12 wide"), "{error}");
        }
    }
}
