//! What can be done with LoRA files without a base model: add, average, shorten, compare, disturb.
//!
//! All of it works in ΔW space, through the thin factors where there are some. DoRA, IA3, OFT and GLoRA make their
//! ΔW from the base's weights; what needs ΔW refuses them by name.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use super::LoraError;
use super::adapter::{Adapter, AdapterFile, AdapterKind, BiasChange};
use super::block_weights::BlockWeights;
use super::low_rank::LowRank;
use crate::named::named;

/// How short a LoRA becomes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// As long as it is.
    All,
    /// To this rank.
    Rank(usize),
    /// To the smallest rank that keeps this share of Σ σ², module by module.
    Share(f64),
}

/// What shortening left of one module.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Kept {
    /// Rank before.
    pub before: usize,
    /// Rank after.
    pub after: usize,
    /// Share of Σ σ² that is left.
    pub share: f64,
}

/// What shortening left of a file.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct KeptSummary {
    /// How many modules have each rank.
    pub ranks: BTreeMap<usize, usize>,
    /// Mean share of Σ σ² that is left of a module.
    pub kept_mean: f64,
    /// The smallest share.
    pub kept_least: f64,
}

impl KeptSummary {
    /// Over all modules.
    pub fn of(kept: &BTreeMap<String, Kept>) -> Self {
        let mut ranks: BTreeMap<usize, usize> = BTreeMap::new();
        kept.values().for_each(|kept| *ranks.entry(kept.after).or_default() += 1);
        Self {
            ranks,
            kept_mean: kept.values().map(|kept| kept.share).sum::<f64>() / kept.len().max(1) as f64,
            kept_least: kept.values().map(|kept| kept.share).fold(1.0, f64::min),
        }
    }
}

/// How alike two files are in one module.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Similarity {
    /// ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖).
    pub cosine: f64,
    /// ‖ΔW'‖ / ‖ΔW‖.
    pub norm_ratio: f64,
    /// ‖ΔW' − ΔW‖ / ‖ΔW‖.
    pub distance: f64,
}

named! {
    /// Which weights [`perturb`] touches.
    pub enum Which {
        /// Largest magnitude.
        Largest = "largest",
        /// Smallest magnitude.
        Smallest = "smallest",
    }
}

named! {
    /// What [`perturb`] puts in their place.
    pub enum Replacement {
        /// Zero.
        Zero = "zero",
        /// Normal noise of the same root mean square.
        Noise = "noise",
    }
}

/// A module's ΔW and what it needs to be stored again.
struct Delta {
    thin: LowRank,
    target: Vec<usize>,
    dtype: DType,
    bias: Option<BiasChange>,
}

impl Delta {
    fn of(module: &str, adapter: &Adapter) -> Result<Self, LoraError> {
        let kind = || LoraError::Kind { key: module.to_string(), kind: adapter.kind_name() };
        let (target, bias) = (adapter.target(), adapter.bias.clone());
        if let Some((down, up)) = adapter.factors()? {
            let AdapterKind::LowRank { down: stored, .. } = &adapter.kind else { return Err(kind()) };
            return Ok(Self { thin: LowRank { down, up }, target, dtype: stored.dtype(), bias });
        }
        let dtype = match &adapter.kind {
            _ if adapter.magnitude.is_some() => return Err(kind()),
            AdapterKind::Hadamard { first, .. } => first[0].dtype(),
            AdapterKind::Kronecker { .. } => DType::F32,
            AdapterKind::Full(diff) if diff.rank() > 1 => diff.dtype(),
            _ => return Err(kind()),
        };
        // These make ΔW without the weight; its shape is all they look at.
        let whole = adapter.delta(&Tensor::zeros(target.as_slice(), DType::F32, &Device::Cpu)?, 1.0)?;
        let whole = whole.reshape((target[0], ()))?;
        let (out, input) = whole.dims2()?;
        let eye = |n| Tensor::eye(n, DType::F32, &Device::Cpu);
        let thin = if out <= input {
            LowRank { up: eye(out)?, down: whole }
        } else {
            LowRank { up: whole, down: eye(input)? }
        };
        Ok(Self { thin, target, dtype, bias })
    }

    /// As a LoRA whose alpha is its rank.
    fn store(&self, thin: &LowRank) -> Result<Adapter, LoraError> {
        let rank = thin.down.dim(0)?;
        let (mut down, mut up) = (thin.down.to_dtype(self.dtype)?, thin.up.to_dtype(self.dtype)?);
        if let [_, inner @ ..] = self.target.as_slice()
            && inner.len() == 3
        {
            down = down.reshape([&[rank], inner].concat())?;
            up = up.reshape((up.dim(0)?, rank, 1, 1))?;
        }
        let kind = AdapterKind::LowRank { down, up, mid: None, alpha: rank as f32 };
        Ok(Adapter { kind, magnitude: None, bias: self.bias.clone() })
    }
}

/// Σ strength · ΔW of all files, as LoRAs whose ranks are added up, then shortened to `keep`.
///
/// Metadata are the first file's, embeddings those of all, of one name the first. The type of numbers is the widest of a module's.
///
/// # Errors
/// [`LoraError::Kind`] for a module whose ΔW needs the base, [`LoraError::Size`] for one that is of two shapes.
pub fn sum(
    files: &[(&AdapterFile, BlockWeights)],
    keep: Keep,
) -> Result<(AdapterFile, BTreeMap<String, Kept>), LoraError> {
    let mut sum = AdapterFile {
        metadata: files.first().map(|(adapters, _)| adapters.metadata.clone()).unwrap_or_default(),
        ..AdapterFile::default()
    };
    for embedding in files.iter().flat_map(|(adapters, _)| &adapters.embeddings) {
        if sum.embeddings.iter().all(|other| other.name != embedding.name) {
            sum.embeddings.push(embedding.clone());
        }
    }
    let mut kept_energy = BTreeMap::new();
    let modules: BTreeSet<&String> = files.iter().flat_map(|(adapters, _)| adapters.modules.keys()).collect();
    for module in modules {
        let mut deltas: Vec<(Delta, f64)> = Vec::new();
        let mut bias: Option<Tensor> = None;
        for (adapters, weights) in files {
            let Some(adapter) = adapters.modules.get(module) else { continue };
            let times = weights.of(module);
            match &adapter.bias {
                None => {}
                Some(change @ BiasChange::Added(_)) => {
                    let own = change.delta(None, times)?;
                    bias = Some(bias.map_or(Ok(own.clone()), |bias| bias + own)?);
                }
                Some(BiasChange::Replaced(_)) => {
                    let kind = "a bias in the place of the base's";
                    return Err(LoraError::Kind { key: module.clone(), kind });
                }
            }
            deltas.push((Delta::of(module, adapter)?, times));
        }
        let Some((first, _)) = deltas.first() else { continue };
        let target = first.target.clone();
        if let Some((other, _)) = deltas.iter().find(|(delta, _)| delta.target != target) {
            let (lora, model) = (other.target.clone(), target);
            return Err(LoraError::Size { module: module.clone(), lora, model, guess: None });
        }
        let dtype = deltas.iter().map(|(delta, _)| delta.dtype).max_by_key(DType::size_in_bytes);
        let terms: Vec<(&LowRank, f64)> = deltas.iter().map(|(delta, times)| (&delta.thin, *times)).collect();
        let thin = LowRank::sum(&terms)?;
        let whole =
            Delta { thin, target, dtype: dtype.unwrap_or(DType::F32), bias: bias.map(BiasChange::Added) };
        let (adapter, kept) = shorten(&whole, keep)?;
        sum.modules.insert(module.clone(), adapter);
        kept_energy.insert(module.clone(), kept);
    }
    Ok((sum, kept_energy))
}

/// Shortens every module; see [`sum`].
pub fn resize(
    adapters: &AdapterFile,
    keep: Keep,
) -> Result<(AdapterFile, BTreeMap<String, Kept>), LoraError> {
    sum(&[(adapters, BlockWeights::all(1.0))], keep)
}

fn shorten(delta: &Delta, keep: Keep) -> Result<(Adapter, Kept), LoraError> {
    let before = delta.thin.down.dim(0)?;
    if keep == Keep::All {
        return Ok((delta.store(&delta.thin)?, Kept { before, after: before, share: 1.0 }));
    }
    let svd = delta.thin.svd()?;
    let after = match keep {
        Keep::Rank(rank) => rank,
        Keep::Share(share) => svd.rank_for(share),
        Keep::All => before,
    };
    let kept = Kept { before, after, share: svd.kept(after) };
    Ok((delta.store(&svd.truncate(after)?)?, kept))
}

/// The change between two weights (out, …) as a LoRA of `rank`.
pub fn extract(
    before: &Tensor,
    after: &Tensor,
    rank: usize,
    dtype: DType,
) -> Result<(Adapter, Kept), LoraError> {
    let delta = (after.to_dtype(DType::F32)? - before.to_dtype(DType::F32)?)?;
    let whole = delta.reshape((delta.dim(0)?, ()))?;
    let (out, input) = whole.dims2()?;
    let rank = rank.min(out).min(input);
    let svd = LowRank::project(&whole, rank)?.svd()?;
    let energy = whole.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    let kept: f64 = svd.values.iter().take(rank).map(|value| value * value).sum();
    let thin = svd.truncate(rank)?;
    let delta = Delta { thin: thin.clone(), target: before.dims().to_vec(), dtype, bias: None };
    let share = if energy == 0.0 { 1.0 } else { kept / energy };
    Ok((delta.store(&thin)?, Kept { before: out.min(input), after: rank, share }))
}

/// How alike two files are, module by module, for the modules that both change; and over all of those together.
pub fn compare(
    one: &AdapterFile,
    two: &AdapterFile,
) -> Result<(BTreeMap<String, Similarity>, Option<Similarity>), LoraError> {
    let mut modules = BTreeMap::new();
    let mut all = [0.0; 3];
    for (module, adapter) in &one.modules {
        let Some(other) = two.modules.get(module) else { continue };
        let (a, b) = (Delta::of(module, adapter)?, Delta::of(module, other)?);
        if a.target[0] != b.target[0] || a.thin.down.dim(1)? != b.thin.down.dim(1)? {
            let (lora, model) = (b.target, a.target);
            return Err(LoraError::Size { module: module.clone(), lora, model, guess: None });
        }
        let products = [a.thin.dot(&a.thin)?, b.thin.dot(&b.thin)?, a.thin.dot(&b.thin)?];
        all.iter_mut().zip(products).for_each(|(all, product)| *all += product);
        modules.insert(module.clone(), similarity(products));
    }
    let together = (!modules.is_empty()).then(|| similarity(all));
    Ok((modules, together))
}

/// From ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩. Nothing is like a ΔW of zeros.
fn similarity([aa, bb, ab]: [f64; 3]) -> Similarity {
    let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
    Similarity {
        cosine: ratio(ab, (aa * bb).sqrt()),
        norm_ratio: ratio(bb, aa).sqrt(),
        distance: ratio((aa + bb - 2.0 * ab).max(0.0), aa).sqrt(),
    }
}

/// Sorts all weights of all factors by magnitude and replaces the largest or smallest `share` of them (Wu et al.
/// 2024, arXiv 2408.06740, figure 4). Returns how many were replaced. Equal magnitudes go by their place.
///
/// # Errors
/// [`LoraError::Kind`] for a module that is no LoRA.
pub fn perturb(
    adapters: &mut AdapterFile,
    which: Which,
    share: f64,
    replacement: Replacement,
    seed: u64,
) -> Result<usize, LoraError> {
    let mut tensors: Vec<&mut Tensor> = Vec::new();
    for (module, adapter) in &mut adapters.modules {
        let kind = adapter.kind_name();
        let AdapterKind::LowRank { down, up, mid, .. } = &mut adapter.kind else {
            return Err(LoraError::Kind { key: module.clone(), kind });
        };
        tensors.extend([down, up].into_iter().chain(mid));
    }
    let mut values = Vec::new();
    for tensor in &tensors {
        values.extend(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|i, j| values[*i].abs().total_cmp(&values[*j].abs()).then(i.cmp(j)));
    if which == Which::Largest {
        order.reverse();
    }
    order.truncate((share * values.len() as f64).round() as usize);
    let square: f64 = order.iter().map(|i| f64::from(values[*i]).powi(2)).sum();
    let size = (square / order.len().max(1) as f64).sqrt();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    order.sort_unstable(); // so that the noise of a weight does not depend on its rank
    for i in &order {
        values[*i] = match replacement {
            Replacement::Zero => 0.0,
            Replacement::Noise => (size * rng.sample::<f64, _>(StandardNormal)) as f32,
        };
    }
    let mut rest = values.as_slice();
    for tensor in tensors {
        let (own, after) = rest.split_at(tensor.elem_count());
        rest = after;
        *tensor = Tensor::from_slice(own, tensor.shape(), &Device::Cpu)?.to_dtype(tensor.dtype())?;
    }
    Ok(order.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::noise::normal;
    use crate::lora::adapter::Matrix;

    fn random(stream: u64, shape: &[usize]) -> Tensor {
        normal(8, stream, shape, &Device::Cpu).unwrap()
    }

    fn low_rank(stream: u64, rank: usize, alpha: f32) -> Adapter {
        let (down, up) = (random(stream, &[rank, 7]), random(stream + 1, &[5, rank]));
        Adapter { kind: AdapterKind::LowRank { down, up, mid: None, alpha }, magnitude: None, bias: None }
    }

    fn convolution(stream: u64, rank: usize) -> Adapter {
        let (down, up) = (random(stream, &[rank, 4, 3, 3]), random(stream + 1, &[6, rank, 1, 1]));
        Adapter {
            kind: AdapterKind::LowRank { down, up, mid: None, alpha: 1.0 },
            magnitude: None,
            bias: None,
        }
    }

    fn kronecker(stream: u64) -> Adapter {
        let (first, second) = (random(stream, &[2, 2]), random(stream + 1, &[3, 2, 3, 3]));
        let kind = AdapterKind::Kronecker {
            first: Matrix::Whole(first),
            second: Matrix::Whole(second),
            core: None,
            alpha: 1.0,
        };
        Adapter { kind, magnitude: None, bias: None }
    }

    fn file(modules: &[(&str, Adapter)]) -> AdapterFile {
        let modules = modules.iter().map(|(module, adapter)| (module.to_string(), adapter.clone())).collect();
        AdapterFile {
            modules,
            metadata: BTreeMap::from([("ss_seed".to_string(), "1".to_string())]),
            ..AdapterFile::default()
        }
    }

    fn delta(adapter: &Adapter, shape: &[usize]) -> Tensor {
        adapter.delta(&Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap(), 1.0).unwrap()
    }

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn files_are_added_exactly_in_the_order_of_their_ranks() {
        let one = file(&[("a", low_rank(1, 3, 2.0)), ("c", convolution(10, 2))]);
        let two = file(&[("a", low_rank(5, 2, 1.0)), ("c", kronecker(20)), ("b", low_rank(7, 1, 1.0))]);
        let (sum, kept) =
            sum(&[(&one, BlockWeights::all(0.5)), (&two, BlockWeights::all(-2.0))], Keep::All).unwrap();
        assert_eq!(kept["a"], Kept { before: 5, after: 5, share: 1.0 });
        assert_eq!(sum.metadata["ss_seed"], "1");
        for (module, shape) in [("a", &[5, 7][..]), ("b", &[5, 7]), ("c", &[6, 4, 3, 3])] {
            let part = |file: &AdapterFile, factor: f64| {
                let zero = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
                file.modules.get(module).map_or(zero, |adapter| (delta(adapter, shape) * factor).unwrap())
            };
            let by_hand = (part(&one, 0.5) + part(&two, -2.0)).unwrap();
            assert!(far(&delta(&sum.modules[module], shape), &by_hand) < 1e-5, "{module}");
        }
        assert_eq!(sum.modules["c"].target(), [6, 4, 3, 3]);
    }

    #[test]
    fn shortening_to_the_true_rank_loses_nothing_and_says_what_else_it_loses() {
        let one = file(&[("a", low_rank(1, 2, 1.0))]);
        let twice =
            sum(&[(&one, BlockWeights::all(1.0)), (&one, BlockWeights::all(1.0))], Keep::All).unwrap().0;
        let (short, kept) = resize(&twice, Keep::Rank(2)).unwrap();
        assert_eq!((kept["a"].before, kept["a"].after), (4, 2));
        let doubled = (delta(&one.modules["a"], &[5, 7]) * 2.0).unwrap();
        assert!(far(&delta(&short.modules["a"], &[5, 7]), &doubled) < 1e-5);
        assert_eq!(resize(&twice, Keep::Share(0.999_999)).unwrap().1["a"].after, 2);
        let (_, kept) = resize(&twice, Keep::Rank(1)).unwrap();
        assert!(kept["a"].share > 0.5 && kept["a"].share < 0.999, "{kept:?}");
        // Longer than it is: zeros fill the rest.
        let (long, _) = resize(&one, Keep::Rank(4)).unwrap();
        assert_eq!(long.modules["a"].rank_and_alpha(), Some((4, 4.0)));
        assert!(far(&delta(&long.modules["a"], &[5, 7]), &(doubled * 0.5).unwrap()) < 1e-5);
    }

    #[test]
    fn the_difference_of_two_weights_is_extracted() {
        let (before, adapter) = (random(30, &[6, 4, 3, 3]), convolution(10, 2));
        let after = (&before + delta(&adapter, &[6, 4, 3, 3])).unwrap();
        let (found, kept) = extract(&before, &after, 2, DType::F32).unwrap();
        assert!((kept.share - 1.0).abs() < 1e-5, "{kept:?}");
        assert!(far(&delta(&found, &[6, 4, 3, 3]), &delta(&adapter, &[6, 4, 3, 3])) < 1e-4);
    }

    #[test]
    fn likeness_is_that_of_the_whole_matrices() {
        let one = file(&[("a", low_rank(1, 3, 2.0)), ("only", low_rank(2, 1, 1.0))]);
        let twice = sum(&[(&one, BlockWeights::all(-2.0))], Keep::All).unwrap().0;
        let (modules, all) = compare(&one, &twice).unwrap();
        for similarity in modules.values().chain(&all) {
            assert!((similarity.cosine + 1.0).abs() < 1e-6 && (similarity.norm_ratio - 2.0).abs() < 1e-6);
            assert!((similarity.distance - 3.0).abs() < 1e-6);
        }
        let other = file(&[("a", low_rank(9, 3, 2.0))]);
        let (modules, _) = compare(&one, &other).unwrap();
        assert_eq!(modules.len(), 1);
        let (a, b) = (delta(&one.modules["a"], &[5, 7]), delta(&other.modules["a"], &[5, 7]));
        let dot = |a: &Tensor, b: &Tensor| (a * b).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let cosine = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
        assert!((modules["a"].cosine - f64::from(cosine)).abs() < 1e-5);
    }

    #[test]
    fn the_chosen_quarter_is_disturbed_and_nothing_else() {
        let values = |adapters: &AdapterFile| -> Vec<f32> {
            let AdapterKind::LowRank { down, up, .. } = &adapters.modules["a"].kind else { panic!() };
            [down, up].iter().flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
        };
        let whole = file(&[("a", low_rank(1, 4, 1.0))]);
        let before = values(&whole);
        for which in [Which::Largest, Which::Smallest] {
            for replacement in [Replacement::Zero, Replacement::Noise] {
                let mut adapters = whole.clone();
                assert_eq!(perturb(&mut adapters, which, 0.25, replacement, 3).unwrap(), 12);
                let after = values(&adapters);
                let touched: Vec<usize> = (0..48).filter(|i| before[*i] != after[*i]).collect();
                assert_eq!(touched.len(), 12);
                let magnitude = |i: &usize| before[*i].abs();
                let (inside, outside): (Vec<usize>, Vec<usize>) = (0..48).partition(|i| touched.contains(i));
                let (most, least) =
                    if which == Which::Largest { (inside, outside) } else { (outside, inside) };
                let lowest = most.iter().map(magnitude).fold(f32::MAX, f32::min);
                assert!(least.iter().map(magnitude).all(|value| value <= lowest));
                assert_eq!(replacement == Replacement::Zero, touched.iter().all(|i| after[*i] == 0.0));
                let mut again = whole.clone();
                perturb(&mut again, which, 0.25, replacement, 3).unwrap();
                assert_eq!(values(&again), after);
            }
        }
    }

    #[test]
    fn kinds_that_need_the_base_are_refused_by_name() {
        let kind = AdapterKind::Scaled { factor: random(1, &[5]), on_input: false };
        let ia3 = file(&[("a", Adapter { kind, magnitude: None, bias: None })]);
        let error = resize(&ia3, Keep::Rank(1)).unwrap_err().to_string();
        assert!(error.contains("`a`: IA3 is not supported here"), "{error}");
        assert!(perturb(&mut ia3.clone(), Which::Largest, 0.5, Replacement::Zero, 0).is_err());
    }
}
