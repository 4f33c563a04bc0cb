//! The functional loss: what LoRAs cost the frozen base on images of their people.
//!
//! The distance of weights treats all directions alike, though some change an image and some do not. So LoRAs are
//! also put beside the weights of the base, and pay the base's own diffusion loss on images of the person; the
//! gradient goes back into whatever made them: an autoencoder, a diffusion transformer, or the LoRA's factors
//! themselves, which is how [`refine`](super::refine) fine-tunes a predicted LoRA. HyperLoRA (arXiv 2503.16944) and LoFA train so
//! without any distance of weights.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::dataset::manifest::{ImageSettings, MANIFEST, read_manifest};
use crate::diffusion::schedule::NoiseSchedule;
use crate::failure::Failure;
use crate::layers::{Adapter, Layer};
use crate::lora::layout::LoraLayout;
use crate::sdxl::pipeline::{Sdxl, time_ids};
use crate::sdxl::text::TextConditioning;
use crate::sdxl::unet::{UNet, UNetInput};
use crate::sdxl::vae::Vae;
use crate::synthetic::Person;
use crate::synthetic::scenes::{paint_image, training_captions, training_scenes};
use crate::train;

/// The LoRAs of K people beside each other, by the path of their layer.
pub type Adapters = BTreeMap<String, Adapter>;

/// Those that `vectors` (K, P) hold, as tensors through which gradients pass.
pub fn adapters(layout: &LoraLayout, vectors: &Tensor) -> Result<Adapters> {
    let people = vectors.dim(0)?;
    let mut adapters = Adapters::new();
    for segment in layout.segments() {
        let module = &layout.modules[segment.module];
        let values = vectors.narrow(1, segment.range.start, segment.range.len())?;
        if segment.is_down {
            let down = values.reshape((people, module.input, module.rank))?.transpose(1, 2)?.contiguous()?;
            let adapter = adapters.get_mut(&module.module).context("`B` comes before `A`")?;
            adapter.down = down;
        } else {
            let up = values.reshape((people, module.out, module.rank))?.contiguous()?;
            // The shared `A`; where each LoRA has its own, it follows in the vector.
            let down =
                layout.shared_tensors().get(&module.module).unwrap_or(&up).to_device(vectors.device())?;
            let scale = f64::from(module.alpha) / module.rank as f64;
            adapters.insert(module.module.clone(), Adapter { down, up, scale });
        }
    }
    Ok(adapters)
}

/// Images of K people in the same S scenes, noised alike: what differs between two people's losses is who they are.
pub struct FunctionalBatch {
    /// (K, S, C, h, w), scaled as the UNet wants them
    pub latents: Tensor,
    /// Of the S captions.
    pub captions: TextConditioning,
    /// Side in pixels.
    pub size: usize,
}

/// The base's diffusion loss, mean over people, of LoRAs on their people's images; a scalar.
///
/// Each scene has a timestep from a part of the range of its own, the same for all people, and so is the noise.
pub fn loss(
    unet: &UNet,
    schedule: &NoiseSchedule,
    adapters: &Adapters,
    data: &FunctionalBatch,
    rng: &mut ChaCha8Rng,
) -> Result<Tensor> {
    let (people, scenes, c, h, w) = data.latents.dims5()?;
    let device = data.latents.device();
    let unet = adapted(unet, adapters)?;
    let range = schedule.alphas_bar.len();
    let of_scene = |i: usize, u: f64| ((i as f64 + u) / scenes as f64 * range as f64) as usize;
    let of_scenes: Vec<usize> =
        (0..scenes).map(|i| of_scene(i, rng.random::<f64>()).min(range - 1)).collect();
    let t: Vec<usize> = (0..people).flat_map(|_| of_scenes.iter().copied()).collect();
    let eps = train::normal(rng, &(1, scenes, c, h, w).into(), device)?;
    let samples = people * scenes;
    let eps = eps.broadcast_as((people, scenes, c, h, w))?.contiguous()?.reshape((samples, c, h, w))?;
    let x0 = data.latents.reshape((samples, c, h, w))?;
    let x_t = schedule.add_noise(&x0, &eps, &t)?;
    let target = schedule.target(&x0, &eps, &t)?;
    let all = |x: &Tensor| -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        shape.insert(0, people);
        let rows = x.unsqueeze(0)?.broadcast_as(shape.as_slice())?.contiguous()?;
        shape.remove(0);
        shape[0] = samples;
        Ok(rows.reshape(shape)?)
    };
    let (context, pooled) = (all(&data.captions.context)?, all(&data.captions.pooled)?);
    let times: Vec<f32> = t.iter().map(|t| *t as f32).collect();
    let times = Tensor::from_vec(times, samples, device)?;
    let sizes = time_ids(samples, data.size, data.size, device)?;
    let out = unet.forward(&UNetInput {
        latents: &x_t,
        timesteps: &times,
        context: &context,
        pooled: &pooled,
        time_ids: &sizes,
        guidance_scale: None,
    })?;
    Ok((out - target)?.sqr()?.mean_all()?)
}

/// The UNet with the adapters beside its layers.
fn adapted(unet: &UNet, adapters: &Adapters) -> Result<UNet> {
    let mut unet = unet.clone();
    let mut placed = 0;
    unet.visit_layers(&mut |path, mut layer: Layer| {
        if let Some(adapter) = adapters.get(path) {
            layer.set_adapter(Some(adapter.clone()));
            placed += 1;
        }
    });
    ensure!(
        placed == adapters.len(),
        "{} of {} layers of the LoRA have no place in this base",
        adapters.len() - placed,
        adapters.len()
    );
    Ok(unet)
}

/// The images that the LoRAs of a dataset were trained on, made again when they are wanted.
pub struct FunctionalLoss {
    unet: UNet,
    vae: Vae,
    schedule: NoiseSchedule,
    people: Vec<Person>,
    scenes: Vec<crate::synthetic::Scene>,
    captions: TextConditioning,
    size: usize,
}

impl FunctionalLoss {
    /// Of the people to learn from of the dataset in `folder`, who must be `people`.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when the dataset does not say how its images were made.
    pub fn open(folder: &Path, base: Sdxl, people: usize) -> Result<Self> {
        let ImageSettings { world, size, scenes, seed, .. } = ImageSettings::read(folder)?;
        let rows = read_manifest(folder)?.into_iter().filter(|row| row.split == "train");
        let known: Vec<Person> = rows.map(|row| Person::new(row.person.0, row.person.1)).collect();
        if known.len() != people {
            let why = format!("it has {} people to learn from, {people} were read", known.len());
            return Err(Failure::unusable(&folder.join(MANIFEST), why));
        }
        let scenes = training_scenes(world, seed, scenes);
        let captions = training_captions(world, &scenes, seed);
        let captions: Vec<&str> = captions.iter().map(String::as_str).collect();
        let captions = base.text.encode_prompts(&captions)?;
        let Sdxl { unet, vae, schedule, .. } = base;
        Ok(Self { unet, vae, schedule, people: known, scenes, captions, size })
    }

    /// [`loss`] of LoRA vectors (K, P) of these K people, each in `images` scenes; `vectors` lie where the base does.
    pub fn loss(
        &self,
        layout: &LoraLayout,
        vectors: &Tensor,
        people: &[usize],
        images: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Tensor> {
        let scenes: Vec<u32> = (0..images).map(|_| rng.random_range(0..self.scenes.len() as u32)).collect();
        let mut latents = Vec::with_capacity(people.len());
        for person in people {
            let painted = scenes.iter().map(|scene| {
                let scene = &self.scenes[*scene as usize];
                paint_image(&self.people[*person], scene, self.size).to_tensor(&Device::Cpu)
            });
            let painted =
                Tensor::stack(&painted.collect::<Result<Vec<_>>>()?, 0)?.to_device(vectors.device())?;
            latents.push(self.vae.to_latents(&self.vae.encode(&painted)?.0)?);
        }
        let index = Tensor::new(scenes, vectors.device())?;
        let data = FunctionalBatch {
            latents: Tensor::stack(&latents, 0)?,
            captions: TextConditioning {
                context: self.captions.context.index_select(&index, 0)?,
                pooled: self.captions.pooled.index_select(&index, 0)?,
            },
            size: self.size,
        };
        loss(&self.unet, &self.schedule, &adapters(layout, vectors)?, &data, rng)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use candle_core::{DType, Var};

    use crate::diffusion::noise::normal;
    use crate::lora::adapter::AdapterFile;
    use crate::lora::apply::{Originals, Unmatched, merge};
    use crate::lora::block_weights::BlockWeights;
    use crate::lora::{Lora, LoraLayer};
    use crate::registry;

    const MODULES: [(&str, usize, usize); 2] = [
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 128, 128),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 128, 160),
    ];

    pub(in crate::recipes::dreambooth) fn tiny() -> Sdxl {
        let files = registry::find(registry::BUILT_IN, "base").unwrap();
        Sdxl::open(&files, DType::F32, &Device::Cpu).unwrap()
    }

    pub(in crate::recipes::dreambooth) fn lora(seed: u64, strength: f64) -> Lora {
        let layer = |(i, (name, out, input)): (usize, &(&str, usize, usize))| {
            let random = |stream, shape: (usize, usize)| {
                (normal(seed, 2 * i as u64 + stream, shape, &Device::Cpu).unwrap() * strength).unwrap()
            };
            let layer = LoraLayer::new(name, random(0, (2, *input)), random(1, (*out, 2)), 2.0).unwrap();
            (name.to_string(), layer)
        };
        Lora { layers: MODULES.iter().enumerate().map(layer).collect(), ..Lora::default() }
    }

    fn data(base: &Sdxl, people: usize) -> FunctionalBatch {
        let [c, h, w] = base.latent_shape(64, 64).unwrap();
        FunctionalBatch {
            latents: normal(5, 0, (people, 2, c, h, w), &Device::Cpu).unwrap(),
            captions: base.text.encode_prompts(&["a photo of a person", "a sketch of a person"]).unwrap(),
            size: 64,
        }
    }

    fn value(x: &Tensor) -> f32 {
        x.to_scalar().unwrap()
    }

    #[test]
    fn loras_beside_the_base_cost_what_merged_ones_cost() {
        let base = tiny();
        let layout = LoraLayout::of(&lora(1, 0.6));
        let rows: Vec<Vec<f32>> =
            [1, 2].iter().map(|seed| layout.to_vector(&lora(*seed, 0.6)).unwrap()).collect();
        let vectors = Tensor::new(rows, &Device::Cpu).unwrap();
        let data = data(&base, 2);
        let cost = |unet: &UNet, adapters: &Adapters, data: &FunctionalBatch| {
            value(&loss(unet, &base.schedule, adapters, data, &mut train::rng(3, 0)).unwrap())
        };
        let together = cost(&base.unet, &adapters(&layout, &vectors).unwrap(), &data);
        let mut alone = 0.0;
        for person in 0..2 {
            let mut unet = base.unet.clone();
            let changes: AdapterFile = (&lora(1 + person as u64, 0.6)).into();
            let loras = [(&changes, BlockWeights::all(1.0))];
            merge(|visit| unet.visit_layers(visit), &loras, Unmatched::Refuse, Originals::Drop).unwrap();
            let of_one = FunctionalBatch {
                latents: data.latents.narrow(0, person, 1).unwrap(),
                captions: data.captions.clone(),
                size: 64,
            };
            alone += cost(&unet, &Adapters::new(), &of_one) / 2.0;
        }
        assert!((together - alone).abs() < 1e-5 * alone, "{together} and {alone}");
        assert!((together - cost(&base.unet, &Adapters::new(), &data)).abs() > 1e-5 * alone);
    }

    #[test]
    fn the_gradient_reaches_every_number_of_the_vectors() {
        let base = tiny();
        let layout = LoraLayout::of(&lora(1, 0.6));
        let vector = layout.to_vector(&lora(1, 0.6)).unwrap();
        let vectors = Var::from_vec(vector.clone(), (1, vector.len()), &Device::Cpu).unwrap();
        let data = data(&base, 1);
        let cost = |vectors: &Tensor| {
            let adapters = adapters(&layout, vectors).unwrap();
            loss(&base.unet, &base.schedule, &adapters, &data, &mut train::rng(3, 0)).unwrap()
        };
        let grads = cost(vectors.as_tensor()).backward().unwrap();
        let grad = grads.get(vectors.as_tensor()).unwrap();
        let norm = value(&grad.sqr().unwrap().sum_all().unwrap()).sqrt();
        assert!(grad.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|g| *g != 0.0));
        // A step along the gradient changes the loss by its length.
        let step = 0.05;
        let moved = |sign: f64| {
            let shift = (grad * (sign * step / f64::from(norm))).unwrap();
            value(&cost(&(vectors.as_tensor() + shift).unwrap()))
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step as f32);
        assert!((slope - norm).abs() < 0.05 * norm, "{slope} and {norm}");
    }

    #[test]
    fn loras_of_another_base_are_refused() {
        let base = tiny();
        let mut foreign = lora(1, 0.1);
        let layer = foreign.layers.pop_first().unwrap().1;
        foreign.layers.insert("nowhere.to_q".into(), layer);
        let vector = LoraLayout::of(&foreign).to_vector(&foreign).unwrap();
        let vectors = Tensor::new(vec![vector], &Device::Cpu).unwrap();
        let adapters = adapters(&LoraLayout::of(&foreign), &vectors).unwrap();
        let error = loss(&base.unet, &base.schedule, &adapters, &data(&base, 1), &mut train::rng(3, 0));
        assert!(error.unwrap_err().to_string().contains("no place in this base"));
    }
}
