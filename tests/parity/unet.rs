//! The UNet against diffusers' UNet2DConditionModel (`scripts/golden_unet.py`).

use candle_core::{DType, Device, Tensor};
use difflora::sdxl::unet::{UNet, UNetConfig, UNetInput};
use difflora::weights::{self, Trainable};

use crate::golden::{Golden, assert_close};

fn forward(golden: &Golden, name: &str, unet: &UNet) -> Tensor {
    let input = |key: &str| golden.get(&format!("{name}.in.{key}"));
    unet.forward(&UNetInput {
        latents: &input("latents"),
        timesteps: &input("timesteps"),
        context: &input("context"),
        pooled: &input("pooled"),
        time_ids: &input("time_ids"),
        guidance_scale: None,
    })
    .unwrap()
}

#[test]
fn the_unet_predicts_what_diffusers_predicts() {
    let golden = Golden::open("unet");
    for name in ["sdxl", "two"] {
        let config: UNetConfig = golden.json(name);
        let vb = weights::frozen(golden.under(&format!("{name}.model.")), DType::F32, &Device::Cpu);
        let out = forward(&golden, name, &UNet::new(&config, vb).unwrap());
        assert_close(&out, &golden.get(&format!("{name}.out")), 1e-5, name);
    }
}

#[test]
fn every_gradient_of_the_unet_is_pytorchs() {
    let golden = Golden::open("unet");
    for name in ["sdxl", "two"] {
        let config: UNetConfig = golden.json(name);
        let trainable = Trainable::new(0);
        let unet = UNet::new(&config, trainable.builder(&Device::Cpu)).unwrap();
        trainable.load(&golden.under(&format!("{name}.model."))).unwrap();
        let loss = (forward(&golden, name, &unet) * golden.get(&format!("{name}.loss_weight"))).unwrap();
        let grads = loss.sum_all().unwrap().backward().unwrap();
        for (key, var) in trainable.vars() {
            let ours = grads.get(&var).unwrap_or_else(|| panic!("no gradient reaches {key}"));
            let theirs = golden.get(&format!("{name}.grad.{key}")).to_dtype(DType::F32).unwrap();
            // 1e-3 of the largest entry: the file keeps 16 bits.
            assert_close(ours, &theirs, 1e-3, &key);
        }
    }
}

#[test]
fn a_sample_gives_the_same_alone_and_in_a_batch() {
    let golden = Golden::open("unet");
    let config: UNetConfig = golden.json("sdxl");
    let vb = weights::frozen(golden.under("sdxl.model."), DType::F32, &Device::Cpu);
    let unet = UNet::new(&config, vb).unwrap();
    let second = |key: &str| golden.get(&format!("sdxl.in.{key}")).narrow(0, 1, 1).unwrap();
    let alone = unet
        .forward(&UNetInput {
            latents: &second("latents"),
            timesteps: &second("timesteps"),
            context: &second("context"),
            pooled: &second("pooled"),
            time_ids: &second("time_ids"),
            guidance_scale: None,
        })
        .unwrap();
    assert_close(&alone, &golden.get("sdxl.out").narrow(0, 1, 1).unwrap(), 1e-5, "alone");
}
