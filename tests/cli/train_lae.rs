//! `train-lae`: its results, its refusals, and one process against a group of two.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};

use candle_core::{DType, Device, Tensor};
use difflora::commands::train_lae::{Args, run};
use difflora::hypernet::LoraCodec;
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

/// Patches with a correction; two shards for each of two processes.
const GROUP_SETTINGS: &str = r#"
    [lae]
    seed = 1
    network = { kind = "conv1d_local", patch = 16, components = 3, correction = { patch = 4, channels = 2 } }
    weight_preserved = 0.1
    latent_noise = 0.05
    plan = { steps = 20, batch = 8, shards = 4, rate = { peak = 1e-2 }, ema = 0.9 }
    [dit]
    seed = 2
    token = 1
    width = 8
    depth = 1
    heads = 1
    steps = 1
    guidance = 1.0
    linear_guess = false
    penalties = [0.1]
    folds = 2
    condition_noise = 0.1
    drop = 0.1
    plan = { steps = 1, batch = 8, shards = 1, rate = { peak = 1e-3 }, ema = 0.9 }
"#;

fn train(folder: &Path, out: &Path, environment: &[(&str, String)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_difflora"));
    command
        .args(["train-lae", "--quiet", "--json", "--device", "cpu", "--dataset"])
        .arg(folder.join("dataset"));
    command.arg("--config").arg(folder.join("settings.toml")).arg("--out").arg(out);
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn weights(out: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(out.join("lae.safetensors"), &Device::Cpu).unwrap()
}

/// The loss of the last line of the log.
fn loss(out: &Path) -> f64 {
    let log = std::fs::read_to_string(out.join("training/lae.jsonl")).unwrap();
    let line: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    line["loss"].as_f64().unwrap()
}

#[test]
fn two_processes_make_the_autoencoder_that_one_makes() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 20);
    std::fs::write(folder.path().join("settings.toml"), GROUP_SETTINGS).unwrap();
    let [alone, together, beside] = ["alone", "together", "beside"].map(|name| folder.path().join(name));
    let run = train(folder.path(), &alone, &[]).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));

    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: usize, out: &Path| {
        let environment = [
            ("WORLD_SIZE", "2".to_string()),
            ("RANK", rank.to_string()),
            ("MASTER_ADDR", "127.0.0.1".to_string()),
            ("MASTER_PORT", port.to_string()),
        ];
        train(folder.path(), out, &environment).spawn().unwrap()
    };
    let processes = [start(0, &together), start(1, &beside)];
    let [first, second] = processes.map(|process| {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    });
    let report: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(report["finished"], true);
    // The second process writes and tells nothing.
    assert!(second.is_empty() && !beside.exists(), "{second}");
    let (one, two) = (weights(&alone), weights(&together));
    assert_eq!(one.len(), two.len());
    for (name, weight) in &one {
        let wide = |x: &Tensor| x.to_dtype(candle_core::DType::F32).unwrap();
        let apart = (wide(weight) - wide(&two[name])).unwrap().abs().unwrap().max_all().unwrap();
        // A step of 16 bits: sums are taken in another order.
        assert!(apart.to_scalar::<f32>().unwrap() < 2e-3, "{name}: {apart}");
    }
    assert!((loss(&alone) / loss(&together) - 1.0).abs() < 1e-4);
}

#[test]
fn an_autoencoder_is_trained_that_restores_the_loras_of_new_people() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 40);
    run(lae_args(folder.path(), SETTINGS), &quiet()).unwrap();
    let files = ModelFiles::folder(folder.path().join("lae")).unwrap();
    let report: Value = files.json("training/report.json").unwrap();
    // Four dimensions in four values: nothing but rounding and the noise of the latents is lost.
    assert!(report["relative_error"].as_f64().unwrap() < 0.01, "{report}");
    assert!(report["own_relative_error"]["mean"].as_f64().unwrap() < 0.01, "{report}");
    assert!(report["delta_cosine"]["mean"].as_f64().unwrap() > 0.995, "{report}");
    assert_eq!(report["relative_error_by_magnitude"].as_array().unwrap().len(), 4);
    assert_eq!(report["compression"], 8.0);
    assert!(LoraCodec::open(&files, &Device::Cpu).is_ok());
}

#[test]
fn a_paused_training_goes_on_to_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 40);
    let weights = || std::fs::read(folder.path().join("lae/lae.safetensors")).unwrap();
    run(lae_args(folder.path(), SETTINGS), &quiet()).unwrap();
    let straight = weights();
    run(paused(lae_args(folder.path(), SETTINGS)), &quiet()).unwrap();
    assert_ne!(weights(), straight);
    run(resumed(lae_args(folder.path(), SETTINGS)), &quiet()).unwrap();
    assert_eq!(weights(), straight);
}

#[test]
fn a_dataset_larger_than_the_memory_gives_the_same_autoencoder() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 40);
    let weights = |memory| {
        run(Args { memory, ..lae_args(folder.path(), SETTINGS) }, &quiet()).unwrap();
        std::fs::read(folder.path().join("lae/lae.safetensors")).unwrap()
    };
    assert_eq!(weights(0.0), weights(1.0));
}

#[test]
fn every_option_of_the_recipe_trains_and_opens_again() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 40);
    let settings = SETTINGS.replacen(
        "seed = 1",
        "seed = 1\nscaling = \"rms\"\ndistance = \"l1\"\nangle = 0.5\ninput_noise = 0.1",
        1,
    );
    let local = "{ kind = \"conv1d_local\", patch = 16, components = 3 }";
    let staged = "{ kind = \"conv1d\", position = true, dense = 4, stages = [{ channels = 3, fold = 4, kernel = 3 }, \
                  { channels = 4, fold = 2, norm = \"instance\", activation = \"leaky_relu\" }] }";
    let dense = "{ kind = \"conv1d_dense\", latent = 4, patch = 8, channels = 2 }";
    for network in [local, staged] {
        assert!(settings.contains(dense));
        run(lae_args(folder.path(), &settings.replace(dense, network)), &quiet()).unwrap();
        let files = ModelFiles::folder(folder.path().join("lae")).unwrap();
        let codec = LoraCodec::open(&files, &Device::Cpu).unwrap();
        let z = Tensor::zeros((1, codec.lae.config().latent()), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(codec.lora(&z).unwrap().layers.len(), 2);
        let log = std::fs::read_to_string(folder.path().join("lae/training/lae.jsonl")).unwrap();
        assert!(log.contains("\"angle\"") && log.contains("latent_rms"), "{log}");
    }
}

#[test]
fn a_sweep_makes_all_variants_and_a_table() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 40);
    let sweep = folder.path().join("sweep.toml");
    let list = r#"
        [[variant]]
        name = "pca"
        network = { kind = "pca", latent = 2 }
        [[variant]]
        name = "short"
        network = { kind = "conv1d", stages = [{ channels = 2, fold = 8 }] }
        plan = { steps = 3, rate = { peak = 1e-2 } }
    "#;
    std::fs::write(&sweep, list).unwrap();
    let with_sweep = || Args { sweep: Some(sweep.clone()), ..lae_args(folder.path(), SETTINGS) };
    run(with_sweep(), &quiet()).unwrap();
    let files = ModelFiles::folder(folder.path().join("lae")).unwrap();
    let table: Value = files.json("sweep.json").unwrap();
    assert_eq!(table[0]["name"], "pca");
    assert_eq!((&table[0]["report"]["latent"], &table[1]["report"]["latent"]), (&json!(2), &json!(8)));
    assert_eq!(table[1]["report"]["delta_cosine"]["n"], 12);
    for name in ["pca", "short"] {
        assert!(
            LoraCodec::open(&ModelFiles::folder(folder.path().join("lae").join(name)).unwrap(), &Device::Cpu)
                .is_ok()
        );
    }
    std::fs::write(&sweep, list.replace("steps = 3", "stepz = 3")).unwrap();
    let message = format!("{:#}", run(with_sweep(), &quiet()).unwrap_err());
    assert!(message.contains("`short`") && message.contains("stepz"), "{message}");
}

#[test]
fn a_checkpoint_of_another_recipe_is_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 40);
    run(paused(lae_args(folder.path(), SETTINGS)), &quiet()).unwrap();
    let other = SETTINGS.replace("latent = 4, patch = 8", "latent = 3, patch = 8");
    let error = run(resumed(lae_args(folder.path(), &other)), &quiet()).unwrap_err();
    assert!(format!("{error:#}").contains("lae.network.latent: 4, now 3"), "{error:#}");
}

#[test]
fn too_few_people_for_the_batch_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 20);
    let error = run(lae_args(folder.path(), SETTINGS), &quiet()).unwrap_err();
    assert!(format!("{error:#}").contains("at least twice the batch"), "{error:#}");
}

#[test]
fn latents_longer_than_the_dataset_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(&folder.path().join("dataset"), 20);
    let error = run(lae_args(folder.path(), &SETTINGS.replace("latent = 4", "latent = 24")), &quiet());
    assert!(format!("{:#}", error.unwrap_err()).contains("make `latent` smaller"));
}
