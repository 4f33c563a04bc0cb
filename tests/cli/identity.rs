//! What `difflora gen` can do with a person's LoRA before it is written.

use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

use crate::difflora;

const PHOTO: &str = "tests/data/astronaut.png";
const OTHER: &str = "tests/data/obama_senate_public_domain.jpg";

/// All `up`s of the LoRA that these options make, and the report.
fn made(folder: &Path, options: &[&str]) -> (Vec<f32>, Value) {
    let path = folder.join("made.safetensors");
    let out = ["gen", "--json", "--quiet", "--lora-out", path.to_str().unwrap()];
    let run = difflora(&[&out, options].concat());
    assert_eq!(run.code, 0, "{options:?}: {}", run.stderr);
    let tensors = candle_core::safetensors::load(&path, &candle_core::Device::Cpu).unwrap();
    let mut ups: Vec<(&String, &Tensor)> =
        tensors.iter().filter(|(name, _)| name.contains("lora_up")).collect();
    ups.sort_by_key(|(name, _)| *name);
    let values = ups.iter().flat_map(|(_, up)| up.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect();
    (values, serde_json::from_str(&run.stdout).unwrap())
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
}

#[test]
fn people_are_mixed_varied_and_sampled_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let (person, report) = made(folder.path(), &["--ref", PHOTO]);
    let gates = &report["person"]["gates"][0];
    assert!((gates["face"].as_f64().unwrap() + gates["image"].as_f64().unwrap() - 1.0).abs() < 1e-6);

    let (alone, _) = made(folder.path(), &["--mix", PHOTO]);
    assert_eq!(alone, person);
    let (other, _) = made(folder.path(), &["--ref", OTHER]);
    let parts = [format!("{PHOTO}:3"), format!("{OTHER}:1")];
    let (between, report) = made(folder.path(), &["--mix", &parts[0], "--mix", &parts[1]]);
    assert_eq!(report["person"]["weights"], serde_json::json!([0.75, 0.25]));
    assert!(distance(&between, &person) < distance(&between, &other));

    let vary = |amount: &str, seed: &str| {
        made(folder.path(), &["--ref", PHOTO, "--vary", amount, "--identity-seed", seed]).0
    };
    let near = vary("0.2", "1");
    assert_eq!(near, vary("0.2", "1"));
    assert_ne!(near, vary("0.2", "2"));
    assert!(distance(&near, &person) < distance(&vary("0.9", "1"), &person));

    let many = ["--identity-samples", "4", "--identity-choice", "typical", "--identity-steps", "3"];
    let (typical, _) = made(folder.path(), &[&["--ref", PHOTO][..], &many].concat());
    assert_ne!(typical, person);
}

#[test]
fn refining_changes_the_lora_and_says_what_it_gained() {
    let folder = tempfile::tempdir().unwrap();
    let (person, _) = made(folder.path(), &["--ref", PHOTO]);
    let refine = ["--ref", PHOTO, "--refine", "4", "--refine-rate", "0.003"];
    let (refined, report) = made(folder.path(), &refine);
    assert_ne!(refined, person);
    let told = &report["person"]["refined"];
    assert!(told["after"].as_f64().unwrap() < told["before"].as_f64().unwrap(), "{told}");
}

#[test]
fn options_that_make_no_sense_are_usage_errors() {
    for (options, why) in [
        (&["--mix", "a.jpg:1", "--ref", PHOTO][..], "--mix"),
        (&["--mix", "a.jpg:1", "--mix", "b.jpg:-1"], "weights"),
        (&["--ref", PHOTO, "--vary", "2"], "--vary"),
        (&["--vary", "0.5", "--prompt", "x"], "--ref"),
        (&["--mix", PHOTO, "--refine", "3"], "--refine"),
        (&["--ref", PHOTO, "--refine-rate", "0.1"], "--refine"),
        (&["--ref", PHOTO, "--refine", "3", "--refine-rate", "0"], "more than 0"),
    ] {
        let run = difflora(&[&["gen"], options].concat());
        assert_eq!(run.code, 2, "{options:?}: {}", run.stderr);
        assert!(run.stderr.contains(why), "{options:?}: {}", run.stderr);
    }
}
