//! `train-lae` as one process and as a group of two.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};

use candle_core::{Device, Tensor};
use difflora::diffusion::noise::normal;
use serde_json::{Value, json};

/// Patches with a correction; two shards for each of two processes.
const SETTINGS: &str = r#"
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

/// LoRAs of two modules, of 20 people to learn from and 2 held out.
fn write_dataset(folder: &Path) {
    for part in ["loras", "embeddings"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
    }
    let random = |stream, shape: &[usize]| normal(7, stream, shape, &Device::Cpu).unwrap();
    let mut manifest = String::new();
    for person in 0..22 {
        let mut lora = HashMap::new();
        for (module, name) in ["to_q", "to_k"].into_iter().enumerate() {
            let path = format!("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.{name}");
            let stream = 10 * person + 2 * module as u64;
            lora.insert(format!("{path}.lora_A.weight"), random(stream, &[2, 12]));
            lora.insert(format!("{path}.lora_B.weight"), random(stream + 1, &[12, 2]));
        }
        let embeddings = HashMap::from([
            ("face", random(5000 + person, &[1, 4])),
            ("image", random(6000 + person, &[1, 4])),
        ]);
        let [lora_file, embeddings_file] =
            ["loras", "embeddings"].map(|part| format!("{part}/{person}.safetensors"));
        candle_core::safetensors::save(&lora, folder.join(&lora_file)).unwrap();
        candle_core::safetensors::save(&embeddings, folder.join(&embeddings_file)).unwrap();
        let split = if person < 20 { "train" } else { "held-out" };
        let row = json!({
            "id": format!("p{person}"), "split": split, "person": [7, person], "lora": lora_file,
            "embeddings": embeddings_file, "loss": 0.1, "settings": "random",
        });
        manifest += &format!("{row}\n");
    }
    std::fs::write(folder.join("manifest.jsonl"), manifest).unwrap();
    let model = json!({ "name": "random", "sha256": "0" });
    let header = json!({ "base": model, "face_encoder": model, "image_encoder": model });
    std::fs::write(folder.join("dataset.json"), header.to_string()).unwrap();
}

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
    write_dataset(&folder.path().join("dataset"));
    std::fs::write(folder.path().join("settings.toml"), SETTINGS).unwrap();
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
