//! The optimiser against torch.optim.AdamW with clip_grad_norm_ (`scripts/golden_train.py`).

use std::collections::BTreeMap;

use candle_core::Var;
use difflora::train::optimiser::{AdamW, AdamWOptions};
use difflora::train::shards::Gradients;

use crate::golden::{Golden, assert_close};

#[test]
fn ten_clipped_steps_are_pytorchs() {
    let golden = Golden::open("train");
    let vars: BTreeMap<String, Var> = golden
        .under("start.")
        .into_iter()
        .map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap()))
        .collect();
    let options = AdamWOptions { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.05, clip: 1.0 };
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
