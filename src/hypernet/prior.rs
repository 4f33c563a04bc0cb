//! Where the diffusion of a person's latent ends: one of K Gaussians, chosen by the face.
//!
//! Corgi (Zhou et al. 2022, arXiv 2211.15388) lets diffusion end in the Gaussian of a mixture that lies nearest to the
//! condition, so that sampling starts close to its end ([`crate::diffusion::shifted`]). Its condition and its samples
//! share CLIP's space; a face and a LoRA latent do not. So the faces of the training set are clustered, and each
//! cluster has the mean and the deviation of its members' latents. The same rule, the largest cosine of face and
//! centroid, chooses in training and in sampling; the index of the Gaussian is an input of the transformer.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::diffusion::noise;
use crate::diffusion::shifted::Shift;

/// Which prior.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriorConfig {
    /// K
    pub clusters: usize,
    /// Factor on the deviations; more than 1 makes the start wider and the Gaussians overlap.
    #[serde(default = "one")]
    pub kappa: f64,
    /// Whether means and deviations train along with the network.
    #[serde(default)]
    pub learned: bool,
}

fn one() -> f64 {
    1.0
}

/// K Gaussians and how one is chosen.
#[derive(Clone, Debug)]
pub struct Prior {
    /// (K, F), unit length
    pub centroids: Tensor,
    /// μ (K, L)
    pub mean: Tensor,
    /// σ (K, L), without κ
    pub std: Tensor,
    /// κ
    pub kappa: f64,
}

/// A cluster is pulled towards all people as if so many of them were its members: few members tell little.
const STRENGTH_OF_ALL: f64 = 4.0;

/// Smallest σ, as a part of that over all people.
const LEAST_STD: f64 = 1e-3;

impl Prior {
    /// Clusters `faces` (R, F) and takes the moments of their latents in each cluster; `latents` are these R rows
    /// (…, L), part after part.
    ///
    /// # Errors
    /// Fewer than 20 rows a cluster.
    pub fn fit(
        config: &PriorConfig,
        faces: &Tensor,
        latents: impl Iterator<Item = Result<Tensor>>,
        seed: u64,
    ) -> Result<Self> {
        let (rows, k) = (faces.dim(0)?, config.clusters);
        ensure!(k > 0, "a shifted prior needs at least one cluster");
        ensure!(
            config.kappa.is_finite() && config.kappa > 0.0,
            "`kappa` is a positive number, not {}",
            config.kappa
        );
        ensure!(
            rows >= FEWEST_A_CLUSTER * k,
            "{k} clusters of {rows} photos: take at most {} (a cluster needs {FEWEST_A_CLUSTER})",
            rows / FEWEST_A_CLUSTER
        );
        let centroids = spherical_k_means(faces, k, seed)?;
        let (mean, std) = moments(&nearest(&centroids, faces)?.to_vec1()?, latents, k)?;
        Ok(Self {
            centroids,
            mean: mean.to_device(faces.device())?,
            std: std.to_device(faces.device())?,
            kappa: config.kappa,
        })
    }

    /// The same on `device`.
    pub fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        Ok(Self {
            centroids: self.centroids.to_device(device)?,
            mean: self.mean.to_device(device)?,
            std: self.std.to_device(device)?,
            kappa: self.kappa,
        })
    }

    /// The Gaussian of each of `faces` (B, F) → (B) u32.
    pub fn choose(&self, faces: &Tensor) -> Result<Tensor> {
        nearest(&self.centroids, faces)
    }

    /// Where the diffusion of samples ends whose Gaussians are `cluster` (B) u32.
    pub fn shift(&self, cluster: &Tensor) -> Result<Shift> {
        let std = (self.std.index_select(cluster, 0)? * self.kappa)?;
        Ok(Shift { mean: self.mean.index_select(cluster, 0)?, std })
    }

    /// Tensors of a file.
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        HashMap::from([
            ("prior.centroid".to_string(), self.centroids.clone()),
            ("prior.mean".to_string(), self.mean.clone()),
            ("prior.std".to_string(), self.std.clone()),
        ])
    }

    /// Reads what [`Prior::tensors`] made.
    pub fn load(config: &PriorConfig, tensors: &HashMap<String, Tensor>, device: &Device) -> Result<Self> {
        let get = |name: &str| -> Result<Tensor> {
            let tensor = tensors.get(name).with_context(|| format!("tensor `{name}` is missing"))?;
            ensure!(
                tensor.rank() == 2 && tensor.dim(0)? == config.clusters,
                "tensor `{name}` has shape {:?}, wanted {} rows",
                tensor.dims(),
                config.clusters
            );
            Ok(tensor.to_dtype(DType::F32)?.to_device(device)?)
        };
        let prior = Self {
            centroids: get("prior.centroid")?,
            mean: get("prior.mean")?,
            std: get("prior.std")?,
            kappa: config.kappa,
        };
        ensure!(prior.mean.dims() == prior.std.dims(), "`prior.mean` and `prior.std` differ in shape");
        let least = prior.std.min_all()?.to_scalar::<f32>()?;
        ensure!(least > 0.0 && config.kappa > 0.0, "a deviation of the prior is not positive");
        Ok(prior)
    }
}

/// Rows that a cluster needs on the average.
const FEWEST_A_CLUSTER: usize = 20;

/// The row of `centroids` (K, F) with the largest cosine to each of `faces` (B, F) → (B) u32.
fn nearest(centroids: &Tensor, faces: &Tensor) -> Result<Tensor> {
    // The length of a face does not change which centroid is nearest.
    Ok(faces.matmul(&centroids.t()?)?.argmax(1)?)
}

fn unit(x: &Tensor) -> candle_core::Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + 1e-12)?)
}

/// Centroids (K, F) of unit length: k-means by cosine, started by k-means++ (Arthur and Vassilvitskii 2007).
fn spherical_k_means(faces: &Tensor, k: usize, seed: u64) -> Result<Tensor> {
    const ROUNDS: usize = 50;
    let faces = unit(faces)?;
    let rows = faces.dim(0)?;
    let mut rng = noise::generator(seed, 0);
    let mut chosen = vec![rng.random_range(0..rows) as u32];
    let mut distance = vec![f32::INFINITY; rows];
    while chosen.len() < k {
        let last = faces.narrow(0, chosen[chosen.len() - 1] as usize, 1)?;
        let cosines: Vec<f32> = faces.matmul(&last.t()?)?.flatten_all()?.to_vec1()?;
        for (distance, cosine) in distance.iter_mut().zip(cosines) {
            *distance = distance.min((1.0 - cosine).max(0.0));
        }
        let total: f64 = distance.iter().map(|d| f64::from(*d)).sum();
        let mut left = rng.random::<f64>() * total;
        let next = distance.iter().position(|d| {
            left -= f64::from(*d);
            left < 0.0
        });
        chosen.push(next.unwrap_or(rows - 1) as u32);
    }
    let mut centroids = faces.index_select(&Tensor::new(chosen, faces.device())?, 0)?;
    let mut before: Vec<u32> = Vec::new();
    for _ in 0..ROUNDS {
        let members: Vec<u32> = nearest(&centroids, &faces)?.to_vec1()?;
        if members == before {
            break;
        }
        let (sums, counts) = sums(&faces, &members, k)?;
        // A cluster that lost all its members keeps its centroid.
        let kept: Vec<f32> = counts.iter().map(|n| if *n == 0.0 { 1.0 } else { 0.0 }).collect();
        let kept = Tensor::from_vec(kept, (k, 1), faces.device())?;
        centroids = unit(&(sums + centroids.broadcast_mul(&kept)?)?)?;
        before = members;
    }
    Ok(centroids)
}

/// Sums (K, D) over the rows of `x` (R, D) in each cluster, and the numbers of rows.
fn sums(x: &Tensor, members: &[u32], k: usize) -> Result<(Tensor, Vec<f64>)> {
    let mut counts = vec![0.0; k];
    members.iter().for_each(|member| counts[*member as usize] += 1.0);
    let sums = Tensor::zeros((k, x.dim(1)?), x.dtype(), x.device())?;
    let members = Tensor::new(members, x.device())?;
    Ok((sums.index_add(&members, &x.contiguous()?, 0)?, counts))
}

/// Mean and deviation (K, L) of the rows of `latents` in each cluster, pulled towards those of all rows.
fn moments(
    members: &[u32],
    latents: impl Iterator<Item = Result<Tensor>>,
    k: usize,
) -> Result<(Tensor, Tensor)> {
    let mut total: Option<(Tensor, Tensor)> = None;
    let (mut counts, mut at) = (vec![0.0; k], 0);
    for part in latents {
        let part = part?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let end = at + part.dim(0)?;
        ensure!(end <= members.len(), "more latents than the {} faces", members.len());
        let (sum, count) = sums(&part, &members[at..end], k)?;
        let (square, _) = sums(&part.sqr()?, &members[at..end], k)?;
        counts.iter_mut().zip(count).for_each(|(all, part)| *all += part);
        total = Some(match total {
            Some((sums, squares)) => ((sums + sum)?, (squares + square)?),
            None => (sum, square),
        });
        at = end;
    }
    ensure!(at == members.len(), "{at} latents for {} faces", members.len());
    let (sums, squares) = total.context("no latents")?;
    let column = |f: &dyn Fn(f64) -> f64| -> Result<Tensor> {
        let values: Vec<f64> = counts.iter().map(|n| f(*n)).collect();
        Ok(Tensor::from_vec(values, (k, 1), &Device::Cpu)?)
    };
    let all_mean = (sums.sum_keepdim(0)? / at as f64)?;
    let all_variance = ((squares.sum_keepdim(0)? / at as f64)? - all_mean.sqr()?)?.maximum(0.0)?;
    // Deviations are those around the cluster's own mean, before it is pulled: Σx² − (Σx)²/n.
    let of_means = sums.sqr()?.broadcast_mul(&column(&|n| 1.0 / n.max(1.0))?)?;
    let centred = (squares - of_means)?.maximum(0.0)?;
    let pulled = |sums: &Tensor, all: &Tensor| -> Result<Tensor> {
        let total = sums.broadcast_add(&(all * STRENGTH_OF_ALL)?)?;
        Ok(total.broadcast_mul(&column(&|n| 1.0 / (n + STRENGTH_OF_ALL))?)?)
    };
    let (mean, variance) = (pulled(&sums, &all_mean)?, pulled(&centred, &all_variance)?);
    // Latents that never vary would leave nothing to divide by.
    let least = (all_variance.sqrt()? * LEAST_STD)?.maximum(1e-6)?;
    let std = variance.sqrt()?.broadcast_maximum(&least)?;
    Ok((mean.to_dtype(DType::F32)?, std.to_dtype(DType::F32)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::noise::normal;

    /// Three groups of faces, whose latents differ in place and width.
    fn groups() -> (Tensor, Tensor) {
        let (mut faces, mut latents) = (Vec::new(), Vec::new());
        for i in 0..90u64 {
            let group = i % 3;
            let centre = normal(1, group, (1, 6), &Device::Cpu).unwrap();
            let face = (centre + (normal(2, i, (1, 6), &Device::Cpu).unwrap() * 0.1).unwrap()).unwrap();
            let spread = (normal(3, i, (1, 4), &Device::Cpu).unwrap() * (0.1 + group as f64)).unwrap();
            faces.push(face);
            latents.push((spread + 5.0 * group as f64).unwrap());
        }
        (Tensor::cat(&faces, 0).unwrap(), Tensor::cat(&latents, 0).unwrap())
    }

    fn config(clusters: usize) -> PriorConfig {
        PriorConfig { clusters, kappa: 1.0, learned: false }
    }

    /// Of the groups, whose latents come in two parts.
    fn fit(config: &PriorConfig) -> Result<Prior> {
        let (faces, latents) = groups();
        let parts = [(0, 50), (50, 40)].map(|(from, count)| Ok(latents.narrow(0, from, count)?));
        Prior::fit(config, &faces, parts.into_iter(), 7)
    }

    #[test]
    fn groups_of_faces_are_found_with_the_moments_of_their_latents() {
        let (faces, _) = groups();
        let prior = fit(&config(3)).unwrap();
        let members: Vec<u32> = prior.choose(&faces).unwrap().to_vec1().unwrap();
        for (i, member) in members.iter().enumerate() {
            assert_eq!(*member, members[i % 3], "photo {i}");
        }
        for (group, member) in members[..3].iter().enumerate() {
            let shift = prior.shift(&Tensor::new(&[*member], &Device::Cpu).unwrap()).unwrap();
            let (mean, std) = (shift.mean.to_vec2::<f32>().unwrap(), shift.std.to_vec2::<f32>().unwrap());
            // Thirty members, pulled by four towards a mean of 5 and a deviation near 4.3.
            let pulled = (30.0 * 5.0 * group as f32 + 4.0 * 5.0) / 34.0;
            assert!((mean[0][0] - pulled).abs() < 0.8, "{mean:?}");
            let own = (0.1 + group as f32).powi(2);
            assert!((std[0][0].powi(2) - (30.0 * own + 4.0 * 18.5) / 34.0).abs() < 2.5, "{std:?}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_prior_and_a_file_keeps_it() {
        let values = |prior: &Prior| prior.mean.to_vec2::<f32>().unwrap();
        let prior = fit(&config(4)).unwrap();
        assert_eq!(values(&prior), values(&fit(&config(4)).unwrap()));
        let wide = PriorConfig { kappa: 3.0, ..config(4) };
        let again = Prior::load(&wide, &prior.tensors(), &Device::Cpu).unwrap();
        let first = Tensor::new(&[0u32], &Device::Cpu).unwrap();
        let ratio = (again.shift(&first).unwrap().std / prior.shift(&first).unwrap().std).unwrap();
        assert!((ratio.mean_all().unwrap().to_scalar::<f32>().unwrap() - 3.0).abs() < 1e-5);
        assert!(Prior::load(&config(5), &prior.tensors(), &Device::Cpu).is_err());
    }

    #[test]
    fn too_many_clusters_are_refused_with_the_most_that_fit() {
        let error = fit(&config(9)).unwrap_err().to_string();
        assert!(error.contains("at most 4"), "{error}");
        let flat = PriorConfig { kappa: 0.0, ..config(1) };
        assert!(fit(&flat).unwrap_err().to_string().contains("kappa"));
    }

    #[test]
    fn one_cluster_has_the_moments_of_all() {
        let (_, latents) = groups();
        let prior = fit(&config(1)).unwrap();
        let y = prior.shift(&Tensor::zeros(90, DType::U32, &Device::Cpu).unwrap()).unwrap();
        let y = y.whiten(&latents).unwrap();
        assert!(y.mean(0).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
        for power in y.sqr().unwrap().mean(0).unwrap().to_vec1::<f32>().unwrap() {
            assert!((power - 1.0).abs() < 1e-4, "{power}");
        }
    }
}
