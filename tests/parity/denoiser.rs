//! Mixers without a gate, the transformer with clusters and fixed positions, and DDIM on predictions of x_0, against
//! PyTorch and diffusers (`scripts/golden_denoiser.py`).

use candle_core::{DType, Device, Tensor};
use difflora::diffusion::sampler::Ddim;
use difflora::diffusion::schedule::{BetaSchedule, NoiseSchedule};
use difflora::diffusion::shifted::Shift;
use difflora::hypernet::diffusion_of_latents;
use difflora::hypernet::dit::{Dit, DitConfig, Position};
use difflora::hypernet::mixer::{Mixer, MixerConfig, MixerKind};
use difflora::weights::Trainable;

use crate::golden::{Golden, assert_close};
use crate::hypernet::{assert_near, assert_trains_alike, open};

#[test]
fn mixers_without_a_gate_train_as_in_pytorch() {
    for (topic, kind) in [
        ("mixer_face", MixerKind::FaceOnly),
        ("mixer_image", MixerKind::ImageOnly),
        ("mixer_concat", MixerKind::Concat),
    ] {
        let golden = open(topic);
        let trainable = Trainable::new(0);
        let config = MixerConfig { kind, face: 10, image: 14, width: 16 };
        let mixer = Mixer::new(&config, trainable.builder(&Device::Cpu)).unwrap();
        trainable.load(&golden.under("weight.")).unwrap();
        let forward = || mixer.forward(&golden.get("face"), &golden.get("image")).unwrap();
        let dropped = || mixer.drop(&forward().condition, &golden.get("keep")).unwrap();
        assert_near(&golden, "condition", &forward().condition);
        assert_near(&golden, "dropped", &dropped());
        assert_trains_alike(&golden, &trainable, || {
            candle_nn::loss::mse(&dropped(), &golden.get("target")).unwrap()
        });
    }
}

#[test]
fn the_transformer_with_clusters_trains_as_in_pytorch() {
    let golden = open("dit_clusters");
    let trainable = Trainable::new(0);
    let config = DitConfig {
        latent: 12,
        token: 3,
        width: 16,
        depth: 1,
        heads: 2,
        position: Position::Sinusoidal,
        clusters: 3,
    };
    let dit = Dit::new(&config, trainable.builder(&Device::Cpu)).unwrap();
    trainable.load(&golden.under("weight.")).unwrap();
    let cluster = golden.get("cluster").to_dtype(DType::U32).unwrap();
    let forward = || {
        let condition = dit.in_cluster(&golden.get("condition"), &cluster).unwrap();
        dit.forward(&golden.get("x"), &golden.get("t"), &condition).unwrap()
    };
    assert_near(&golden, "y", &forward());
    assert_trains_alike(&golden, &trainable, || {
        candle_nn::loss::mse(&forward(), &golden.get("target")).unwrap()
    });
}

#[test]
fn ddim_on_predictions_of_the_sample_is_diffusers() {
    let golden: Golden = open("ddim");
    let start = golden.get("start");
    let zeros = Tensor::zeros((1, 6), DType::F32, &Device::Cpu).unwrap();
    let none = Shift { std: zeros.ones_like().unwrap(), mean: zeros };
    for (name, beta_schedule) in
        [("linear", BetaSchedule::Linear), ("squaredcos_cap_v2", BetaSchedule::SquaredcosCapV2)]
    {
        let config =
            difflora::diffusion::schedule::SchedulerConfig { beta_schedule, ..diffusion_of_latents() };
        let schedule = NoiseSchedule::new(&config).unwrap();
        for steps in [1, 4, 10, 50] {
            for (eta, text) in [(0.0, "0.0"), (0.5, "0.5"), (1.0, "1.0")] {
                let network = |x: &Tensor, t: f64| Ok(((x * 0.7)?.tanh()? + (t / 1000.0 - 0.3))?);
                let fresh = |i: usize| Ok(golden.get("fresh").get(i)?);
                let x = none
                    .ddim(network, start.clone(), Ddim { schedule: &schedule, steps, eta }, fresh)
                    .unwrap();
                let what = format!("{name}.{steps}.{text}");
                // diffusers computes ᾱ in f32, ours in f64: near t = 1000 of the cosine schedule, ᾱ is 2e-9.
                assert_close(&x, &golden.get(&what), 5e-5, &what);
            }
        }
    }
}
