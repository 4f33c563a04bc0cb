//! DreamBooth LoRA training against peft and diffusers (`scripts/golden_train_lora.py`): gradients of the first step,
//! ten losses, and the LoRA after ten steps.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use difflora::diffusion::schedule::{NoiseSchedule, SchedulerConfig};
use difflora::lora::adapter::AdapterKind;
use difflora::recipes::dreambooth::lockstep::{Networks, Targets, TrainableLora};
use difflora::recipes::dreambooth::loss::{Batch, Captions, Objective, gradients};
use difflora::recipes::dreambooth::targets::target_modules;
use difflora::registry;
use difflora::sdxl::text::{ClipTextConfig, ClipTextModel, TextEncoders};
use difflora::sdxl::tokenizer::ClipTokenizer;
use difflora::sdxl::unet::UNet;
use difflora::train::adamw::AdamWOptions;
use difflora::train::state::State;
use difflora::weights;
use serde_json::Value;

use crate::golden::{Golden, assert_close};

/// 1e-4 of the largest value of each tensor, or of a loss. After ten steps the LoRA has ten times as much room: Adam divides
/// gradients by their own size, so that the rounding of small ones counts as much as that of large ones.
const TOLERANCE: f64 = 1e-4;

fn networks(golden: &Golden, text: bool) -> (Networks, TextEncoders) {
    let part = |name: &str| {
        let tensors = golden.under(&format!("{name}."));
        weights::frozen(tensors, DType::F32, &Device::Cpu)
    };
    let unet = UNet::new(&golden.json("unet"), part("unet")).unwrap();
    let encoder = |name: &str| {
        let config: ClipTextConfig = golden.json(name);
        ClipTextModel::new(&config, part(name)).unwrap()
    };
    // Token numbers come from the file; these tokenizers are not asked.
    let tokenizer = |name| ClipTokenizer::new(&registry::built_in("base").unwrap(), name).unwrap();
    let encoders = TextEncoders::new(
        [tokenizer("tokenizer"), tokenizer("tokenizer_2")],
        [encoder("text_encoder"), encoder("text_encoder_2")],
    );
    (Networks { unet, text: text.then(|| encoders.clone()) }, encoders)
}

/// Trains by the options of one case, as one of `people` people who all learn the same; gives the first step's gradients,
/// the losses, and the lora.
fn train(golden: &Golden, case: &str, people: usize) -> (BTreeMap<String, Tensor>, Vec<f64>, TrainableLora) {
    let options: Value = golden.json(case);
    let text = options["text"] == true;
    let (networks, encoders) = networks(golden, text);
    let targets = if options["targets"] == "conv" { Targets::Conv } else { Targets::Attn };
    let modules = target_modules(&networks, targets, 2).unwrap();
    let start = if ["conv", "text"].contains(&case) { case } else { "plain" };
    let downs: BTreeMap<String, Tensor> = golden.under(&format!("{start}.start.down.")).into_iter().collect();
    assert_eq!(modules.len(), downs.len(), "{case}: the same layers are adapted");
    let mut loras: Vec<TrainableLora> =
        (0..people).map(|_| TrainableLora::new(&modules, &downs, 4.0).unwrap()).collect();
    let optimiser = AdamWOptions { clip: options["clip"].as_f64().unwrap_or(0.0), ..Default::default() };
    let mut states = Vec::new();
    for lora in &mut loras {
        lora.train_shared_down().unwrap();
        let mut state = State::new(lora.vars().clone(), optimiser.clone(), None).unwrap();
        state.optimiser().scale_rate("up.text_encoder", 0.2);
        state.optimiser().scale_rate("down.text_encoder", 0.2);
        states.push(state);
    }
    let prediction = options["prediction"].as_str().unwrap_or("epsilon");
    let scheduler = serde_json::json!({
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "prediction_type": prediction,
    });
    let schedule = NoiseSchedule::new(&SchedulerConfig::from_json(&scheduler.to_string()).unwrap()).unwrap();
    let objective = Objective {
        min_snr_gamma: options["gamma"].as_f64().unwrap_or(0.0),
        prior_weight: options["prior"].as_f64().unwrap_or(1.0),
    };
    let class_images = if options["prior"].is_null() { 0 } else { 2 };
    let n = 2 + class_images;
    let passes = options["accumulate"].as_u64().unwrap_or(1);
    let row = |key: &str, pass: u64| golden.get(key).get(pass as usize).unwrap().narrow(0, 0, n).unwrap();
    let batch = |pass: u64| {
        let chosen = row("chosen", pass);
        let of = |key: &str| golden.get(key).index_select(&chosen, 0).unwrap();
        let ids = of("ids").to_dtype(DType::U32).unwrap();
        let captions = if text {
            Captions::Tokens(ids.clone(), ids)
        } else {
            Captions::Encoded(encoders.encode_ids(&ids, &ids).unwrap())
        };
        let t: Vec<i64> = row("t", pass).to_vec1().unwrap();
        Batch {
            x0: of("x0"),
            eps: row("eps", pass),
            timesteps: t.into_iter().map(|t| t as usize).collect(),
            captions,
            time_ids: of("time_ids"),
            class_images,
            scale: 1.0,
        }
    };
    let mut first = BTreeMap::new();
    let mut losses = Vec::new();
    for step in 0..10 {
        let all = loras.iter().collect::<Vec<_>>();
        let batches = |pass| Ok(vec![batch(step * passes + pass); people]);
        let lessons = gradients(&networks, &schedule, &objective, &all, passes, batches).unwrap();
        for (state, (gradients, _)) in states.iter_mut().zip(&lessons) {
            state.update(gradients, 1e-2).unwrap();
        }
        let (own, loss) = lessons.into_iter().next_back().unwrap();
        losses.push(loss);
        if step == 0 {
            first = own;
        }
    }
    (first, losses, loras.pop().unwrap())
}

fn check(case: &str, people: usize) {
    let golden = Golden::open("train_lora");
    let (gradients, losses, lora) = train(&golden, case, people);
    let theirs = golden.under(&format!("{case}.grad."));
    let reached: Vec<&String> = theirs.keys().filter(|name| !gradients.contains_key(*name)).collect();
    assert!(reached.is_empty() && !theirs.is_empty(), "{case}: no gradient reaches {reached:?}");
    for (name, ours) in &gradients {
        match theirs.get(name) {
            Some(theirs) => {
                let ours = ours.reshape(theirs.shape()).unwrap(); // `up` of a convolution is a matrix here
                assert_close(&ours, theirs, TOLERANCE, &format!("{case}: gradient of {name}"));
            }
            None => panic!("{case}: peft has no gradient for {name}"),
        }
    }
    let wanted: Vec<f64> = golden.get(&format!("{case}.losses")).to_vec1().unwrap();
    for (step, (ours, theirs)) in losses.iter().zip(&wanted).enumerate() {
        assert!(
            (ours / theirs - 1.0).abs() < TOLERANCE,
            "{case}: loss of step {step} is {ours}, wanted {theirs}"
        );
    }
    let changes = lora.adapters().unwrap();
    for (name, theirs) in golden.under(&format!("{case}.end.")) {
        let (kind, path) = name.split_once('.').unwrap();
        let AdapterKind::LowRank { down, up, .. } = &changes.modules[path].kind else { panic!("{path}") };
        let ours = if kind == "down" { down } else { up };
        let ours = ours.reshape(theirs.shape()).unwrap();
        assert_close(&ours, &theirs, 10.0 * TOLERANCE, &format!("{case}: {name} after ten steps"));
    }
}

#[test]
fn gradients_losses_and_lora_are_those_of_peft() {
    for case in ["plain", "clip", "prior", "min_snr", "velocity"] {
        check(case, 1);
    }
}

#[test]
fn convolutions_learn_as_in_peft() {
    check("conv", 1);
}

#[test]
fn text_encoders_learn_as_in_peft() {
    check("text", 1);
}

#[test]
fn three_people_in_one_forward_pass_learn_as_each_alone() {
    for case in ["clip", "conv", "text"] {
        check(case, 3);
    }
}
