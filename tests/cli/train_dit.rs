//! `train-dit`: its results, early stopping, resuming, and its refusals.

use std::path::Path;

use candle_core::Device;
use difflora::commands::run_args::RunArgs;
use difflora::commands::train_dit::{Args, run};
use difflora::commands::train_lae;
use difflora::hypernet::Hypernet;
use difflora::identity::Identity;
use difflora::registry;
use difflora::weights::model_folder::ModelFiles;
use serde_json::{Value, json};

use crate::hypernet_dataset::{SETTINGS, lae_args, quiet, write_dataset};

/// Stops at once, with a checkpoint.
fn paused(mut args: Args) -> Args {
    args.run.minutes = Some(0.0);
    args
}

fn resumed(mut args: Args) -> Args {
    args.run.resume = true;
    args
}

fn args(folder: &Path) -> Args {
    Args {
        dataset: folder.join("dataset"),
        lae: folder.join("lae"),
        run: RunArgs {
            out: folder.join("hypernet"),
            config: folder.join("settings.toml"),
            resume: false,
            minutes: None,
        },
        base: registry::BUILT_IN.into(),
        device: "cpu".into(),
    }
}

fn row(report: &Value, name: &str) -> Value {
    let rows = report["table"].as_array().unwrap();
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}")).clone()
}

fn error_of(report: &Value, name: &str) -> f64 {
    row(report, name)["relative_error"].as_f64().unwrap()
}

/// Trains on a dataset of 60 people with other settings than [`SETTINGS`].
fn trained(folder: &Path, change: impl Fn(&str) -> String) -> (ModelFiles, Value) {
    if !folder.join("dataset").exists() {
        write_dataset(&folder.join("dataset"), 60);
    }
    let settings = change(SETTINGS);
    if !folder.join("lae").exists() {
        train_lae::run(lae_args(folder, &settings), &quiet()).unwrap();
    }
    std::fs::write(folder.join("settings.toml"), settings).unwrap();
    run(args(folder), &quiet()).unwrap();
    let files = ModelFiles::folder(folder.join("hypernet")).unwrap();
    let report = files.json("training/report.json").unwrap();
    (files, report)
}

fn somebody(hypernet: &Hypernet) {
    let identity = Identity { face: vec![0.5; 6], image: Some(vec![0.5; 5]) };
    assert_eq!(hypernet.generate(&identity, &hypernet.options()).unwrap().layers.len(), 2);
}

#[test]
fn new_people_get_loras_that_depend_on_their_faces() {
    let folder = tempfile::tempdir().unwrap();
    for guess in ["true", "false"] {
        let change = |text: &str| text.replace("linear_guess = true", &format!("linear_guess = {guess}"));
        let (files, report) = trained(folder.path(), change);
        assert_eq!(error_of(&report, "mean LoRA"), 1.0);
        // Embeddings with a noise of 0.05 tell four factors nearly exactly, and linearly.
        assert!(error_of(&report, "ridge regression") < 0.05, "{report:#}");
        // With the guess the transformer has nothing left to add; alone, it has learnt for 60 steps only.
        let wanted = if guess == "true" { 0.2 } else { 0.95 };
        assert!(error_of(&report, "DDIM 1") < wanted, "{report:#}");
        assert!(row(&report, "DDIM 1")["half_width"]["relative_error"].as_f64().unwrap() > 0.0);
        assert!(row(&report, "DDIM 1")["over_ridge"]["mean"].as_f64().is_some());
        assert!(error_of(&report, "DDIM 2, 4 samples, shuffled") > 1.0, "{report:#}");
        somebody(&Hypernet::open(&files, &Device::Cpu).unwrap());
    }
}

#[test]
fn every_variant_of_the_recipe_trains_and_opens_again() {
    let folder = tempfile::tempdir().unwrap();
    for (settings, gated) in [
        ("mixer = \"face-only\"\nposition = \"sinusoidal\"", false),
        ("mixer = \"concat\"\nschedule = \"cosine\"\nweights = { min_snr = 5.0 }", false),
        ("prior = { clusters = 3, kappa = 2.0 }", true),
        ("mixer = \"image-only\"\nprior = { clusters = 2, learned = true }", false),
    ] {
        let (files, report) = trained(folder.path(), |text| {
            text.replace("linear_guess = true", &format!("linear_guess = false\n{settings}"))
        });
        let hypernet = Hypernet::open(&files, &Device::Cpu).unwrap();
        somebody(&hypernet);
        assert_eq!(report["gates"].is_object(), gated, "{settings}");
        assert_eq!(report["start"].is_object(), settings.contains("clusters"), "{settings}");
        assert!(error_of(&report, "DDIM 1").is_finite(), "{settings}");
        let log = std::fs::read_to_string(folder.path().join("hypernet/training/dit.jsonl")).unwrap();
        assert_eq!(log.contains("gate_face"), gated, "{settings}");
        let losses: Vec<f64> = log
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap())
            .collect();
        assert!(losses[2] < losses[0], "{settings}: {losses:?}");
        if settings.contains("learned") {
            assert!(log.contains("prior"));
            assert!(hypernet.denoiser.stats.prior.is_some());
        }
    }
}

#[test]
fn a_training_that_paused_goes_on_to_the_same_weights_and_keeps_the_best() {
    let folder = tempfile::tempdir().unwrap();
    let change = |text: &str| {
        text.replace("linear_guess = true", "linear_guess = false\nvalidation = { share = 0.2, every = 7 }")
    };
    let weights = || std::fs::read(folder.path().join("hypernet/dit.safetensors")).unwrap();
    let (_, report) = trained(folder.path(), change);
    assert_eq!((&report["people"]["validation"], &report["finished"]), (&json!(12), &json!(true)));
    let straight = weights();
    let training = folder.path().join("hypernet/training");
    let looks = |what: &str| std::fs::read_to_string(training.join(what)).unwrap();
    let all = looks("dit.validation.jsonl");
    assert_eq!(all.lines().count(), 60 / 7);

    std::fs::remove_dir_all(folder.path().join("hypernet")).unwrap();
    run(paused(args(folder.path())), &quiet()).unwrap();
    assert_ne!(weights(), straight);
    run(resumed(args(folder.path())), &quiet()).unwrap();
    assert_eq!(weights(), straight);
    assert_eq!(looks("dit.validation.jsonl"), all);
}

#[test]
fn a_training_that_gains_no_more_stops() {
    let folder = tempfile::tempdir().unwrap();
    // With a rate of nearly nothing no look is better than the first by more than chance.
    let change = |text: &str| {
        text.replace("peak = 3e-3", "peak = 1e-12").replace(
            "linear_guess = true",
            "linear_guess = true\nvalidation = { share = 0.1, every = 2, patience = 3 }",
        )
    };
    trained(folder.path(), change);
    let log = folder.path().join("hypernet/training/dit.validation.jsonl");
    assert!(std::fs::read_to_string(log).unwrap().lines().count() < 30);
}

#[test]
fn recipes_that_cannot_work_say_what_to_change() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path(), str::to_string);
    let refusal = |from: &str, to: &str| {
        std::fs::write(folder.path().join("settings.toml"), SETTINGS.replace(from, to)).unwrap();
        format!("{:#}", run(args(folder.path()), &quiet()).unwrap_err())
    };
    for (from, to, why) in [
        ("width = 16", "", "neither `width` nor `size`"),
        ("heads = 2", "heads = 3", "3 heads"),
        ("token = 2", "token = 3", "take one of [1, 2, 4]"),
        ("folds = 4", "folds = 1", "folds"),
        ("drop = 0.1", "drop = 1.5", "drop"),
        ("drop = 0.1", "drop = 0.1\nprior = { clusters = 30 }", "at most 6"),
        ("drop = 0.1", "drop = 0.1\nvalidation = { share = 0.9, every = 1 }", "too few"),
        ("steps = 60, batch = 16", "steps = 60, batch = 32", "too few for batches of 32"),
        ("drop = 0.1", "drop = 0.1\ngate = 1", "gate"),
    ] {
        let message = refusal(from, to);
        assert!(message.contains(why), "{to}: {message}");
    }
    let other = SETTINGS.replace("drop = 0.1", "drop = 0.2");
    std::fs::write(folder.path().join("settings.toml"), other).unwrap();
    let message = format!("{:#}", run(resumed(args(folder.path())), &quiet()).unwrap_err());
    assert!(message.contains("dit.drop: 0.1, now 0.2"), "{message}");
}

#[test]
fn an_autoencoder_of_another_base_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("dataset");
    write_dataset(&dataset, 40);
    train_lae::run(lae_args(folder.path(), SETTINGS), &quiet()).unwrap();
    let header = std::fs::read_to_string(dataset.join("dataset.json")).unwrap();
    std::fs::write(dataset.join("dataset.json"), header.replace("base0123", "base9999")).unwrap();
    let message = format!("{:#}", run(args(folder.path()), &quiet()).unwrap_err());
    assert!(message.contains("base model"), "{message}");
}
