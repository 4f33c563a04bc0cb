//! A hypernetwork with random weights, from embeddings to a LoRA and through a folder.

use std::collections::BTreeMap;

use super::codec::VectorSpace;
use super::dit::DitConfig;
use super::lae::{Lae, LaeConfig};
use super::mixer::{MixerConfig, MixerKind};
use super::pca::Pca;
use super::ridge::Ridge;
use super::scaler::{StandardScaler, unit_power};
use super::*;
use crate::diffusion::noise::normal;
use crate::lora::LoraLayer;
use crate::lora::canonical::Form;
use crate::lora::layout::LoraLayout;
use crate::weights::Trainable;
use crate::weights::model_id::ModelId;

const PEOPLE: usize = 24;
const FACE: usize = 6;
const IMAGE: usize = 4;
const LATENT: usize = 8;

fn id(name: &str) -> ModelId {
    ModelId { name: name.into(), sha256: format!("{name}-0123456789abcdef") }
}

fn rows(stream: u64, width: usize) -> Tensor {
    normal(9, stream, (PEOPLE, width), &Device::Cpu).unwrap()
}

fn identity(person: usize) -> Identity {
    let row = |rows: Tensor| rows.get(person).unwrap().to_vec1().unwrap();
    Identity { face: row(rows(1, FACE)), image: Some(row(rows(2, IMAGE))) }
}

/// Two modules of rank 2 with shared `A`s.
fn layout() -> LoraLayout {
    let layer = |stream, out, input| {
        let down = normal(8, stream, (2, input), &Device::Cpu).unwrap();
        let up = Tensor::zeros((out, 2), DType::F32, &Device::Cpu).unwrap();
        LoraLayer { down, up, alpha: 2.0 }
    };
    let layers = [("a.to_q".to_string(), layer(0, 6, 4)), ("b.to_k".to_string(), layer(1, 9, 7))];
    let lora = Lora { layers: layers.into(), ..Lora::default() };
    let down = lora.layers.iter().map(|(name, layer)| (name.clone(), layer.down.clone())).collect();
    LoraLayout::of(&lora).with_shared_down(down).unwrap()
}

/// LoRAs that depend on the embeddings, a codec by PCA, ridge regression, and an untrained transformer.
fn untrained() -> Hypernet {
    let layout = layout();
    let together = Tensor::cat(&[rows(1, FACE), rows(2, IMAGE)], 1).unwrap();
    let map = normal(9, 3, (FACE + IMAGE, layout.parameters()), &Device::Cpu).unwrap();
    let vectors = together.matmul(&map).unwrap();
    let standardise = StandardScaler::fit(&vectors, &codec::blocks(&layout)).unwrap();
    let pca = Pca::fit(&standardise.apply(&vectors).unwrap(), LATENT).unwrap();
    let lae = LaeConfig::Pca { input: layout.parameters(), latent: LATENT };
    let weights = Lae::pca_tensors(&pca).into_iter().collect();
    let space = VectorSpace { base: id("base"), layout, form: Form::default(), standardise };
    let codec = LoraCodec::new(space, &lae, weights, &Device::Cpu).unwrap();

    let z = codec.encode(&vectors).unwrap();
    let mut stats = DenoiserStats {
        face: StandardScaler::fit_whole(&rows(1, FACE)).unwrap(),
        image: StandardScaler::fit_whole(&rows(2, IMAGE)).unwrap(),
        scale: 1.0,
        prior: None,
        spread: None,
    };
    let x = stats.seen(MixerKind::Moe, &rows(1, FACE), &rows(2, IMAGE)).unwrap();
    let ridge = Ridge::fit(&x, &z, 1e-2).unwrap();
    stats.scale = unit_power(&(&z - ridge.forward(&x).unwrap()).unwrap()).unwrap();
    let config = DenoiserConfig {
        mixer: MixerConfig { kind: MixerKind::Moe, face: FACE, image: IMAGE, width: 16 },
        dit: DitConfig {
            latent: LATENT,
            token: 4,
            width: 16,
            depth: 1,
            heads: 2,
            position: Default::default(),
            clusters: 0,
        },
        diffusion: diffusion_of_latents(),
        steps: 4,
        guidance: 1.0,
        linear_guess: true,
        prior: None,
        face_encoder: id("face"),
        image_encoder: id("clip"),
        image_input: Default::default(),
    };
    let trainable = Trainable::new(5);
    let vb = trainable.builder(&Device::Cpu);
    mixer::Mixer::new(&config.mixer, vb.pp("mixer")).unwrap();
    dit::Dit::new(&config.dit, vb.pp("dit")).unwrap();
    let weights = trainable.vars().into_iter().map(|(name, var)| (name, var.as_tensor().detach()));
    let weights = weights.chain(ridge.tensors("guess")).collect();
    let denoiser = Denoiser::new(config, stats, weights, &Device::Cpu).unwrap();
    Hypernet { codec, denoiser }
}

/// The same with random numbers added to the weights of the transformer and the mixer.
fn shaken() -> Hypernet {
    let Hypernet { codec, denoiser } = untrained();
    let (weights, _) = denoiser.parts().unwrap();
    let shaken = weights.into_iter().enumerate().map(|(i, (name, weight))| {
        let noise = normal(11, i as u64, weight.shape(), &Device::Cpu).unwrap();
        (name, (weight + (noise * 0.2).unwrap()).unwrap())
    });
    let Denoiser { config, stats, .. } = denoiser;
    let denoiser = Denoiser::new(config, stats, shaken.collect(), &Device::Cpu).unwrap();
    Hypernet { codec, denoiser }
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn an_untrained_transformer_leaves_the_linear_guess() {
    let hypernet = untrained();
    let identity = identity(3);
    let (face, image) = hypernet.denoiser.embeddings(&identity, &Device::Cpu).unwrap();
    let guess = hypernet.denoiser.linear_guess(&face, &image).unwrap();
    for options in [
        hypernet.options(),
        SampleOptions { steps: 1, samples: 3, ..hypernet.options() },
        SampleOptions { guidance: 2.0, ..hypernet.options() },
    ] {
        let z = hypernet.sample_latent(&identity, &options).unwrap();
        assert!(worst(&z, &guess) < 1e-5, "{options:?}");
    }
    let twice = SampleOptions { strength: 2.0, ..hypernet.options() };
    let z = hypernet.sample_latent(&identity, &twice).unwrap();
    assert!(worst(&z, &(guess * 2.0).unwrap()) < 1e-5);
}

#[test]
fn the_same_seed_gives_the_same_lora_and_another_seed_another() {
    let hypernet = shaken();
    let lora = |identity: &Identity, seed| {
        let options = SampleOptions { seed, ..hypernet.options() };
        let lora = hypernet.generate(identity, &options).unwrap();
        lora.layers.values().flat_map(|layer| values(&layer.up)).collect::<Vec<f32>>()
    };
    assert_eq!(lora(&identity(0), 7), lora(&identity(0), 7));
    assert_ne!(lora(&identity(0), 7), lora(&identity(0), 8));
    assert_ne!(lora(&identity(0), 7), lora(&identity(1), 7));
}

#[test]
fn several_samples_are_averaged_or_the_most_typical_is_taken() {
    let hypernet = shaken();
    let z = |samples, choice| {
        let options = SampleOptions { samples, choice, steps: 2, ..hypernet.options() };
        hypernet.sample_latent(&identity(4), &options).unwrap()
    };
    assert_eq!(values(&z(1, Choice::Typical)), values(&z(1, Choice::Mean)));
    let mean = z(5, Choice::Mean);
    assert!(worst(&mean, &z(1, Choice::Mean)) > 1e-4);
    // One of the five, and none of them is nearer to their mean.
    let typical = z(5, Choice::Typical);
    let far = |a: &Tensor| -> f32 { values(&(a - &mean).unwrap()).iter().map(|x| x * x).sum::<f32>() };
    assert!(far(&typical) > 0.0 && far(&typical) <= far(&z(1, Choice::Mean)) + 1e-6);
}

#[test]
fn eta_adds_noise_of_the_seed() {
    let hypernet = shaken();
    let z = |eta, seed| {
        let options = SampleOptions { eta, seed, steps: 3, ..hypernet.options() };
        values(&hypernet.sample_latent(&identity(4), &options).unwrap())
    };
    assert_eq!(z(1.0, 3), z(1.0, 3));
    assert_ne!(z(1.0, 3), z(0.0, 3));
    assert_ne!(z(1.0, 3), z(1.0, 4));
}

#[test]
fn people_are_mixed_and_varied_in_latents() {
    let mut hypernet = shaken();
    let z =
        |hypernet: &Hypernet, person| hypernet.sample_latent(&identity(person), &hypernet.options()).unwrap();
    let (a, b) = (z(&hypernet, 0), z(&hypernet, 1));
    assert_eq!(values(&mixture(&[(a.clone(), 1.0)]).unwrap()), values(&a));
    let half = mixture(&[(a.clone(), 0.5), (b.clone(), 0.5)]).unwrap();
    assert!(worst(&half, &((&a + &b).unwrap() * 0.5).unwrap()) < 1e-6);
    assert!(mixture(&[]).is_err());

    let message = hypernet.vary(&a, 0.5, 1).unwrap_err().to_string();
    assert!(message.contains("latent.spread"), "{message}");
    hypernet.denoiser.stats.spread = Some(Tensor::ones(LATENT, DType::F32, &Device::Cpu).unwrap());
    let far = |amount, seed| worst(&hypernet.vary(&a, amount, seed).unwrap(), &a);
    assert_eq!(far(0.0, 1), 0.0);
    assert!(far(0.2, 1) > 0.0 && far(0.2, 1) < far(0.9, 1));
    assert_ne!(far(0.5, 1), far(0.5, 2));
}

#[test]
fn guidance_moves_away_from_the_null_condition() {
    let hypernet = shaken();
    let z = |guidance| {
        let options = SampleOptions { guidance, steps: 1, ..hypernet.options() };
        hypernet.sample_latent(&identity(2), &options).unwrap()
    };
    // One step is linear in the guidance.
    let (none, one, two) = (z(0.0), z(1.0), z(2.0));
    assert!(worst(&none, &one) > 1e-3);
    assert!(worst(&two, &((&one * 2.0).unwrap() - &none).unwrap()) < 1e-4);
}

#[test]
fn a_saved_hypernetwork_makes_the_same_lora() {
    let hypernet = shaken();
    let folder = tempfile::tempdir().unwrap();
    let files = ModelFiles::folder(folder.path()).unwrap();
    let options = hypernet.options();
    let z = hypernet.sample_latent(&identity(1), &options).unwrap();
    // f16 has 11 bits: a thousandth of values of order one, through several layers.
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-2)] {
        hypernet.save(folder.path(), dtype).unwrap();
        let again = Hypernet::open(&files, &Device::Cpu).unwrap();
        assert!(worst(&z, &again.sample_latent(&identity(1), &options).unwrap()) < tolerance);
        let (a, b) = (hypernet.codec.lora(&z).unwrap(), again.codec.lora(&z).unwrap());
        for (name, layer) in &a.layers {
            assert!(worst(&layer.up, &b.layers[name].up) < tolerance);
            assert!(worst(&layer.down, &b.layers[name].down) < tolerance);
        }
    }
}

#[test]
fn the_convolutions_of_a_format_1_folder_are_read_as_stages() {
    let Hypernet { codec, .. } = untrained();
    let folder = tempfile::tempdir().unwrap();
    let stage = |channels, fold| -> lae_conv::Stage {
        serde_json::from_value(serde_json::json!({ "channels": channels, "fold": fold })).unwrap()
    };
    let input = codec.layout.parameters();
    let config =
        LaeConfig::Conv1d { input, stages: vec![stage(4, 3), stage(2, 5)], position: false, dense: None };
    let trainable = Trainable::new(1);
    Lae::new(&config, trainable.builder(&Device::Cpu)).unwrap();
    let weights: BTreeMap<_, _> =
        trainable.vars().into_iter().map(|(name, var)| (name, var.as_tensor().detach())).collect();
    let LoraCodec { base, layout, form, standardise, .. } = codec;
    let space = VectorSpace { base, layout, form, standardise };
    let codec = LoraCodec::new(space, &config, weights, &Device::Cpu).unwrap();
    codec.save(folder.path(), DType::F32).unwrap();
    // As the first version wrote it.
    let path = folder.path().join("config.json");
    let mut written: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    written["format"] = 1.into();
    written.as_object_mut().unwrap().remove("canonical");
    written["lae"] =
        serde_json::json!({ "kind": "conv1d", "input": input, "folds": [3, 5], "channels": [4, 2] });
    std::fs::write(&path, serde_json::to_vec(&written).unwrap()).unwrap();
    let again = LoraCodec::open(&ModelFiles::folder(folder.path()).unwrap(), &Device::Cpu).unwrap();
    let x = normal(1, 9, (2, input), &Device::Cpu).unwrap();
    assert_eq!(worst(&codec.encode(&x).unwrap(), &again.encode(&x).unwrap()), 0.0);
}

#[test]
fn folders_that_cannot_be_used_say_why() {
    let hypernet = untrained();
    let folder = tempfile::tempdir().unwrap();
    let files = ModelFiles::folder(folder.path()).unwrap();
    let message = || format!("{:#}", Hypernet::open(&files, &Device::Cpu).unwrap_err());
    assert!(message().contains("config.json"));
    hypernet.codec.save(folder.path(), DType::F32).unwrap();
    assert!(message().contains("train-dit"), "{}", message());
    assert!(LoraCodec::open(&files, &Device::Cpu).is_ok());
    hypernet.save(folder.path(), DType::F32).unwrap();
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"format\": 2", "\"format\": 3")).unwrap();
    assert!(message().contains("newer"), "{}", message());
    std::fs::write(&config, text.replace("\"depth\": 1", "\"depth\": 2")).unwrap();
    assert!(message().contains("missing"), "{}", message());
    std::fs::write(&config, text).unwrap();
    std::fs::write(folder.path().join("dit.safetensors"), b"short").unwrap();
    assert!(message().contains("dit.safetensors"), "{}", message());
}

#[test]
fn embeddings_and_models_of_another_kind_are_refused_by_name() {
    let hypernet = untrained();
    let wrong = Identity { face: vec![0.0; 3], image: Some(vec![0.0; IMAGE]) };
    let message = hypernet.generate(&wrong, &hypernet.options()).unwrap_err().to_string();
    assert!(message.contains("3 values") && message.contains("`face`"), "{message}");
    let message = id("tiny").demand(&id("sdxl"), "base model").unwrap_err().to_string();
    assert!(message.contains("tiny") && message.contains("sdxl"), "{message}");
    assert!(id("tiny").demand(&id("tiny"), "base model").is_ok());
}

#[test]
fn networks_can_be_shared_between_threads() {
    fn shared<T: Send + Sync + Clone>() {}
    shared::<Hypernet>();
}
