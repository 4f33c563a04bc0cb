//! The random choices of a step, from the seed and the number of the pass alone.

use candle_core::{Device, Tensor};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::diffusion::noise;
use crate::named::named;

named! {
    /// How timesteps are drawn.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum Timesteps {
        /// Independent and uniform, as in diffusers.
        Uniform = "uniform",
        /// One per equal part of the range: lower variance between steps.
        Stratified = "stratified",
    }
}

impl Timesteps {
    /// `n` timesteps below `range`.
    pub fn draw(self, n: usize, range: usize, rng: &mut impl Rng) -> Vec<usize> {
        let draw = |i: usize| match self {
            Self::Uniform => rng.random_range(0..range),
            Self::Stratified => {
                let t = ((i as f64 + rng.random::<f64>()) / n as f64 * range as f64) as usize;
                t.min(range - 1)
            }
        };
        (0..n).map(draw).collect()
    }
}

/// Which of `images` images are in pass `pass` of `batch` samples: every image comes once before any comes
/// again, and each round has an order of its own.
pub fn shuffled_epoch_indices(seed: u64, pass: u64, batch: usize, images: usize) -> Vec<usize> {
    (0..batch as u64)
        .map(|i| {
            let at = pass * batch as u64 + i;
            let (round, place) = (at / images as u64, at % images as u64);
            order(seed, round, images)[place as usize]
        })
        .collect()
}

/// The same where only images of one group may share a pass, `groups` telling each image's. A group whose
/// images don't fill its passes repeats some of them.
pub fn shuffled_epoch_indices_by_group(seed: u64, pass: u64, batch: usize, groups: &[usize]) -> Vec<usize> {
    let count = groups.iter().max().map_or(0, |last| last + 1);
    let mut members = vec![Vec::new(); count];
    groups.iter().enumerate().for_each(|(image, group)| members[*group].push(image));
    members.retain(|group| !group.is_empty());
    if members.len() == 1 {
        return shuffled_epoch_indices(seed, pass, batch, groups.len());
    }
    let passes: usize = members.iter().map(|group| group.len().div_ceil(batch)).sum();
    let (round, place) = (pass / passes as u64, pass % passes as u64);
    let mut all = Vec::new();
    for (number, group) in members.iter().enumerate() {
        let order = order(seed ^ ((number as u64 + 1) << 32), round, group.len());
        for first in (0..group.len()).step_by(batch) {
            all.push((first..first + batch).map(|i| group[order[i % group.len()]]).collect::<Vec<_>>());
        }
    }
    all[order(seed ^ 0x9a55, round, passes)[place as usize]].clone()
}

fn order(seed: u64, round: u64, count: usize) -> Vec<usize> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    order.shuffle(&mut noise::generator(seed ^ 0x0bde, round));
    order.into_iter().map(|i| i as usize).collect()
}

/// The noise of pass `pass`: (n, C, h, w), and where `offset` is not 0 the same random amount more in all pixels of a
/// channel (noise offset, <https://www.crosslabs.org/blog/diffusion-with-offset-noise>).
pub fn eps(
    seed: u64,
    pass: u64,
    shape: [usize; 4],
    offset: f64,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let eps = noise::normal(seed ^ 0x5eed, pass, &shape[..], device)?;
    if offset == 0.0 {
        return Ok(eps);
    }
    let [n, c, _, _] = shape;
    eps.broadcast_add(&(noise::normal(seed ^ 0x0ff5e7, pass, (n, c, 1, 1), device)? * offset)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_comes_once_a_round() {
        let mut seen: Vec<usize> = (0..5).flat_map(|pass| shuffled_epoch_indices(3, pass, 2, 10)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
        assert_ne!(shuffled_epoch_indices(3, 0, 10, 10), shuffled_epoch_indices(3, 1, 10, 10));
    }

    #[test]
    fn a_pass_holds_images_of_one_group_and_a_round_holds_all() {
        let groups = [0, 1, 0, 1, 2, 0, 0];
        let passes = 2 + 1 + 1;
        for round in 0..3 {
            let mut seen = std::collections::BTreeSet::new();
            for pass in round * passes..(round + 1) * passes {
                let chosen = shuffled_epoch_indices_by_group(9, pass, 2, &groups);
                assert!(chosen.len() == 2 && groups[chosen[0]] == groups[chosen[1]]);
                seen.extend(chosen);
            }
            assert_eq!(seen.len(), groups.len());
        }
        assert_eq!(shuffled_epoch_indices_by_group(9, 4, 2, &[0; 7]), shuffled_epoch_indices(9, 4, 2, 7));
    }

    #[test]
    fn timesteps_are_uniform_or_one_from_each_part() {
        let mut rng = noise::generator(1, 0);
        let uniform = Timesteps::Uniform.draw(20_000, 1000, &mut rng);
        let mean = uniform.iter().sum::<usize>() as f64 / 20_000.0;
        assert!((mean - 499.5).abs() < 8.2, "mean {mean}"); // four standard errors
        assert!(uniform.contains(&0) && uniform.contains(&999));
        for (i, t) in Timesteps::Stratified.draw(4, 1000, &mut rng).into_iter().enumerate() {
            assert_eq!(t / 250, i);
        }
    }
}
