//! Autoencoders, mixer, diffusion transformer and ridge regression against PyTorch and numpy
//! (`scripts/golden_hypernet.py`): outputs, the gradient of every weight, the losses of ten AdamW steps.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use difflora::hypernet::dit::{Dit, DitConfig, Position};
use difflora::hypernet::lae::{CorrectionConfig, Lae, LaeConfig};
use difflora::hypernet::lae_conv::{Nonlinearity, Norm, Stage};
use difflora::hypernet::mixer::{Mixer, MixerConfig, MixerKind};
use difflora::hypernet::ridge::Ridge;
use difflora::hypernet::weight_preserved_loss::{self, Distance};
use difflora::train::adamw::{AdamW, AdamWOptions};
use difflora::train::shards::gradients;
use difflora::weights::Trainable;

use crate::golden::{Golden, assert_close};

/// Relative to the largest value: f32 through some twenty layers and back differs by up to 2e-5.
const TOLERANCE: f64 = 1e-4;

/// Ten steps let those differences grow.
const LOSS_TOLERANCE: f64 = 1e-4;

pub(super) fn open(topic: &str) -> Golden {
    Golden::open(&format!("hypernet_{topic}"))
}

#[track_caller]
pub(super) fn assert_near(golden: &Golden, what: &str, ours: &Tensor) {
    assert_close(ours, &golden.get(what), TOLERANCE, what);
}

/// The gradient of every weight, and the losses of ten steps.
pub(super) fn assert_trains_alike(golden: &Golden, trainable: &Trainable, loss: impl Fn() -> Tensor + Sync) {
    let vars = trainable.vars();
    let grads = loss().backward().unwrap();
    let expected = golden.under("grad.");
    assert_eq!(expected.len(), vars.len());
    for (name, var) in &vars {
        let grad = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("`{name}` has no gradient"));
        assert_close(grad, &expected[name], TOLERANCE, name);
    }
    let losses = ten_steps(vars, loss);
    let expected = golden.get("losses").to_vec1::<f32>().unwrap();
    for (step, (a, b)) in losses.iter().zip(&expected).enumerate() {
        assert!((a - f64::from(*b)).abs() < LOSS_TOLERANCE, "loss of step {step}: {a} instead of {b}");
    }
}

/// The losses before each of ten steps, as `torch.optim.AdamW(lr=1e-2, weight_decay=0.1)` takes them.
fn ten_steps(vars: BTreeMap<String, Var>, loss: impl Fn() -> Tensor + Sync) -> Vec<f64> {
    let options = AdamWOptions { weight_decay: 0.1, clip: 0.0, ..AdamWOptions::default() };
    let mut optimiser = AdamW::new(vars.clone(), options).unwrap();
    let step = |_| {
        let sum = gradients(&vars, 1, |_| Ok(loss().into())).unwrap();
        optimiser.step(&sum.gradients, 1e-2).unwrap();
        sum.loss
    };
    (0..10).map(step).collect()
}

fn autoencoder_trains_alike(topic: &str, config: &LaeConfig, distance: Distance) {
    let golden = open(topic);
    let trainable = Trainable::new(0);
    let lae = Lae::new(config, trainable.builder(&Device::Cpu)).unwrap();
    trainable.load(&golden.under("weight.")).unwrap();
    let x = &golden.get("x");
    let z = lae.encode(x).unwrap();
    assert_near(&golden, "z", &z);
    assert_near(&golden, "x_hat", &lae.decode(&z).unwrap());
    assert_trains_alike(&golden, &trainable, || {
        let x_hat = lae.decode(&lae.encode(x).unwrap()).unwrap();
        weight_preserved_loss::loss(x, &x_hat, distance, 0.5).unwrap().total
    });
}

fn stage(norm: Norm, activation: Nonlinearity, kernel: usize, channels: usize, fold: usize) -> Stage {
    Stage { norm, activation, kernel, channels, fold }
}

/// Every option of the stages once.
fn every_option(position: bool, dense: Option<usize>) -> LaeConfig {
    let stages = vec![
        stage(Norm::None, Nonlinearity::LeakyRelu, 3, 5, 3),
        stage(Norm::Instance, Nonlinearity::Silu, 0, 4, 2),
        stage(Norm::Layer, Nonlinearity::Gelu, 5, 3, 2),
    ];
    LaeConfig::Conv1d { input: 50, stages, position, dense }
}

#[test]
fn the_dense_autoencoder_trains_as_in_pytorch() {
    let config = LaeConfig::Conv1dDense { input: 50, latent: 6, patch: 8, channels: 12 };
    autoencoder_trains_alike("lae", &config, Distance::Mse);
}

#[test]
fn the_autoencoder_with_own_kernels_for_each_patch_trains_as_in_pytorch() {
    let correction = Some(CorrectionConfig { patch: 8, channels: 6 });
    let config = LaeConfig::Conv1dLocal { input: 50, patch: 16, components: 3, correction };
    autoencoder_trains_alike("local", &config, Distance::Mse);
}

#[test]
fn the_plain_convolutional_autoencoder_trains_as_in_pytorch() {
    let plain = |channels, fold| stage(Norm::None, Nonlinearity::Silu, 0, channels, fold);
    let stages = vec![plain(6, 2), plain(4, 3)];
    let config = LaeConfig::Conv1d { input: 50, stages, position: false, dense: None };
    autoencoder_trains_alike("conv1d", &config, Distance::Mse);
}

#[test]
fn every_option_of_the_convolutional_stages_trains_as_in_pytorch() {
    autoencoder_trains_alike("staged", &every_option(true, None), Distance::L1);
    autoencoder_trains_alike("staged_both", &every_option(true, Some(7)), Distance::Mse);
    let stages = vec![
        stage(Norm::None, Nonlinearity::None, 3, 6, 2),
        stage(Norm::Layer, Nonlinearity::Gelu, 3, 5, 3),
        stage(Norm::Instance, Nonlinearity::LeakyRelu, 3, 4, 2),
    ];
    let config = LaeConfig::Conv1d { input: 50, stages, position: false, dense: Some(7) };
    autoencoder_trains_alike("staged_dense", &config, Distance::Mse);
}

#[test]
fn the_mixer_trains_as_in_pytorch() {
    let golden = open("mixer");
    let trainable = Trainable::new(0);
    let config = MixerConfig { kind: MixerKind::Moe, face: 10, image: 14, width: 16 };
    let mixer = Mixer::new(&config, trainable.builder(&Device::Cpu)).unwrap();
    trainable.load(&golden.under("weight.")).unwrap();
    let forward = || mixer.forward(&golden.get("face"), &golden.get("image")).unwrap();
    let dropped = || mixer.drop(&forward().condition, &golden.get("keep")).unwrap();
    assert_near(&golden, "condition", &forward().condition);
    assert_near(&golden, "gates", &forward().gates.unwrap());
    assert_near(&golden, "dropped", &dropped());
    assert_trains_alike(&golden, &trainable, || {
        candle_nn::loss::mse(&dropped(), &golden.get("target")).unwrap()
    });
}

#[test]
fn the_diffusion_transformer_trains_as_in_pytorch() {
    let golden = open("dit");
    let trainable = Trainable::new(0);
    let config = DitConfig {
        latent: 12,
        token: 4,
        width: 16,
        depth: 2,
        heads: 4,
        position: Position::Learned,
        clusters: 0,
    };
    let dit = Dit::new(&config, trainable.builder(&Device::Cpu)).unwrap();
    trainable.load(&golden.under("weight.")).unwrap();
    let forward = || dit.forward(&golden.get("x"), &golden.get("t"), &golden.get("condition")).unwrap();
    assert_near(&golden, "y", &forward());
    assert_trains_alike(&golden, &trainable, || {
        candle_nn::loss::mse(&forward(), &golden.get("target")).unwrap()
    });
}

#[test]
fn the_ridge_regression_equals_numpys() {
    let golden = open("ridge");
    let ridge = Ridge::fit(&golden.get("x"), &golden.get("y"), 0.2).unwrap();
    assert_near(&golden, "guess", &ridge.forward(&golden.get("new")).unwrap());
    assert_near(&golden, "weight", &ridge.tensors("base")["base.weight"]);
}
