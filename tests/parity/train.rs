//! Training against PyTorch: the optimiser (`scripts/golden_train.py`), and LoRAs of the UNet.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use difflora::layers::Adapter;
use difflora::sdxl::unet::{UNet, UNetConfig, UNetInput};
use difflora::train::adamw::{AdamW, AdamWOptions};
use difflora::train::gradients::Gradients;
use difflora::weights;

use crate::golden::{Golden, assert_close};

/// AdamW with `clip_grad_norm_`.
#[test]
fn ten_clipped_steps_are_pytorchs() {
    let golden = Golden::open("train");
    let vars: BTreeMap<String, Var> = golden
        .under("start.")
        .into_iter()
        .map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap()))
        .collect();
    let options = AdamWOptions { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.05, clip: 1.0, muon: None };
    let mut optimiser = AdamW::new(vars.clone(), options).unwrap();
    let norms: Vec<f32> = golden.get("norms").to_vec1().unwrap();
    for (step, norm) in norms.iter().enumerate() {
        let gradients: Gradients = golden.under(&format!("grad.{step}.")).into_iter().collect();
        let ours = optimiser.step(&gradients, 1e-2 * (step + 1) as f64 / 10.0).unwrap();
        assert!((ours / f64::from(*norm) - 1.0).abs() < 1e-5);
        for (name, var) in &vars {
            assert_close(var, &golden.get(&format!("after.{step}.{name}")), 1e-6, name);
        }
    }
}

/// LoRA factors beside the layers of a UNet, by `{path}.down` and `{path}.up`.
fn adapt(unet: &mut UNet, vars: &BTreeMap<String, Var>, scale: f64) {
    let mut places = 0;
    unet.visit_layers(&mut |path, mut layer| {
        let factor = |name: &str| Some(vars.get(&format!("{path}.{name}"))?.as_tensor().clone());
        let (Some(down), Some(up)) = (factor("down"), factor("up")) else { return };
        let up = up.flatten_from(1).unwrap(); // peft keeps (out, R, 1, 1) for convolutions
        layer.set_adapter(Some(Adapter { down, up, scale }));
        places += 1;
    });
    assert_eq!(2 * places, vars.len());
}

/// Gradients, losses and LoRA of diffusers and peft, which recompute as well (`scripts/golden_unet_lora.py`).
fn ten_steps_of_lora(dtype: DType, recompute: bool, tolerance: f64) {
    let (golden, base) = (Golden::open("unet_lora"), Golden::open("unet"));
    let config: UNetConfig = base.json("sdxl");
    let vb = weights::frozen(base.under("sdxl.model."), dtype, &Device::Cpu);
    let mut unet = UNet::new(&config, vb).unwrap();
    unet.recompute = recompute;
    let vars: BTreeMap<String, Var> = golden
        .under("start.")
        .into_iter()
        .map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap()))
        .collect();
    adapt(&mut unet, &vars, golden.json("scale"));
    let options = AdamWOptions { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.01, clip: 1.0, muon: None };
    let mut optimiser = AdamW::new(vars.clone(), options).unwrap();
    for step in 0..10 {
        let input = |key: &str| golden.get(&format!("in.{step}.{key}"));
        let context = Var::from_tensor(&input("context")).unwrap();
        let out = unet
            .forward(&UNetInput {
                latents: &input("latents"),
                timesteps: &input("timesteps"),
                context: &context,
                pooled: &input("pooled"),
                time_ids: &input("time_ids"),
                guidance_scale: None,
            })
            .unwrap();
        let loss = (out - input("target")).and_then(|error| error.sqr()?.mean_all()).unwrap();
        assert_close(&loss, &golden.get(&format!("loss.{step}")), tolerance, &format!("loss {step}"));
        let mut store = loss.backward().unwrap();
        if step == 0 {
            assert_close(store.get(&context).unwrap(), &golden.get("grad_context"), tolerance, "context");
        }
        let gradients: Gradients = vars
            .iter()
            .map(|(name, var)| {
                let gradient = store.remove(var).unwrap_or_else(|| panic!("no gradient reaches {name}"));
                if step == 0 {
                    assert_close(&gradient, &golden.get(&format!("grad.{name}")), tolerance, name);
                }
                (name.clone(), gradient)
            })
            .collect();
        optimiser.step(&gradients, 5e-3).unwrap();
    }
    for (name, var) in &vars {
        assert_close(var, &golden.get(&format!("after.{name}")), tolerance, name);
    }
}

#[test]
fn ten_steps_of_lora_training_are_diffusers_and_pefts() {
    ten_steps_of_lora(DType::F32, false, 1e-4);
    ten_steps_of_lora(DType::F32, true, 1e-4);
}

/// The gradient of every LoRA factor and of the text at the golden's first step.
fn first_gradients(dtype: DType, recompute: bool) -> BTreeMap<String, Tensor> {
    let (golden, base) = (Golden::open("unet_lora"), Golden::open("unet"));
    let config: UNetConfig = base.json("sdxl");
    let vb = weights::frozen(base.under("sdxl.model."), dtype, &Device::Cpu);
    let mut unet = UNet::new(&config, vb).unwrap();
    unet.recompute = recompute;
    let mut vars: BTreeMap<String, Var> = golden
        .under("start.")
        .into_iter()
        .map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap()))
        .collect();
    adapt(&mut unet, &vars, golden.json("scale"));
    let input = |key: &str| golden.get(&format!("in.0.{key}"));
    let context = Var::from_tensor(&input("context")).unwrap();
    let out = unet
        .forward(&UNetInput {
            latents: &input("latents"),
            timesteps: &input("timesteps"),
            context: &context,
            pooled: &input("pooled"),
            time_ids: &input("time_ids"),
            guidance_scale: None,
        })
        .unwrap();
    let grads = (out - input("target")).and_then(|error| error.sqr()?.mean_all()?.backward()).unwrap();
    vars.insert("context".into(), context);
    vars.iter().map(|(name, var)| (name.clone(), grads.get(var).unwrap().clone())).collect()
}

#[test]
fn recomputation_changes_no_gradient_whatever_the_type_of_the_frozen_weights() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let kept = first_gradients(dtype, false);
        for (name, gradient) in first_gradients(dtype, true) {
            // Gradients that meet in one tensor are added in another order.
            assert_close(&gradient, &kept[&name], 1e-5, &name);
        }
    }
}

#[test]
fn frozen_weights_of_sixteen_bits_give_about_the_gradients_of_thirty_two() {
    let wide = first_gradients(DType::F32, true);
    let square = |x: &Tensor| f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
    let length: f64 = wide.values().map(square).sum();
    // 11 and 8 bits of mantissa.
    for (dtype, tolerance) in [(DType::F16, 1e-2), (DType::BF16, 6e-2)] {
        let narrow = first_gradients(dtype, true);
        assert!(narrow.values().all(|gradient| gradient.dtype() == DType::F32));
        let apart: f64 = narrow.iter().map(|(name, x)| square(&(x - &wide[name]).unwrap())).sum();
        assert!((apart / length).sqrt() < tolerance, "{dtype:?}: {}", (apart / length).sqrt());
    }
}
