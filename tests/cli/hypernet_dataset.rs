//! A small dataset of LoRAs, and settings to train a hypernetwork on it.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use difflora::commands::output::Output;
use difflora::commands::run_args::RunArgs;
use difflora::commands::train_lae;
use difflora::dataset::manifest::{Header, Row};
use difflora::diffusion::noise::normal;
use difflora::lora::file::{self, Format};
use difflora::lora::layout::LoraLayout;
use difflora::lora::ldm_keys::BlockLayout;
use difflora::lora::{Lora, LoraLayer};
use difflora::weights::model_id::ModelId;

const MODULES: [&str; 2] = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
];
pub const RANK: usize = 2;

/// A dataset of `train` and 12 held-out people: `up` depends linearly on four hidden factors, and so do the
/// embeddings of two noisy reference images.
pub fn write_dataset(folder: &Path, train: usize) {
    let random = |stream, shape: &[usize]| normal(21, stream, shape, &Device::Cpu).unwrap();
    for part in ["loras", "embeddings"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
    }
    let downs: BTreeMap<String, Tensor> =
        MODULES.iter().zip(0..).map(|(name, i)| (name.to_string(), random(i, &[RANK, 6]))).collect();
    safetensors::serialize_to_file(&downs, None, &folder.join("basis.safetensors")).unwrap();
    let (up_map, face_map, image_map) =
        (random(2, &[4, 2 * 8 * RANK]), random(3, &[4, 6]), random(4, &[4, 5]));
    let mut manifest = String::new();
    let mut layout = None;
    for i in 0..train + 12 {
        let factors = random(100 + i as u64, &[1, 4]);
        let ups = factors.matmul(&up_map).unwrap().reshape((2, 8, RANK)).unwrap();
        let layers = MODULES.iter().enumerate().map(|(at, name)| {
            let down = downs[*name].clone();
            (name.to_string(), LoraLayer { down, up: ups.get(at).unwrap(), alpha: 2.0 })
        });
        let lora = Lora { layers: layers.collect(), ..Lora::default() };
        let seen = |map: &Tensor, stream: u64| {
            let clean = factors.matmul(map).unwrap().repeat((2, 1)).unwrap();
            let noise = (random(stream + i as u64, clean.dims()) * 0.05).unwrap();
            (clean + noise).unwrap()
        };
        let embeddings = BTreeMap::from([("face", seen(&face_map, 1000)), ("image", seen(&image_map, 2000))]);
        let row = Row {
            id: format!("p{i}"),
            split: if i < train { "train" } else { "held-out" }.into(),
            person: (21, i as u64),
            lora: format!("loras/p{i}.safetensors"),
            embeddings: format!("embeddings/p{i}.safetensors"),
            loss: 0.1,
            settings: "one".into(),
        };
        file::write(&folder.join(&row.lora), &lora, Format::Kohya, &BlockLayout::uniform(2, 1)).unwrap();
        safetensors::serialize_to_file(&embeddings, None, &folder.join(&row.embeddings)).unwrap();
        manifest += &(serde_json::to_string(&row).unwrap() + "\n");
        layout.get_or_insert_with(|| LoraLayout::of(&lora).with_shared_down(downs.clone()).unwrap());
    }
    let id = |name: &str| ModelId { name: name.into(), sha256: format!("{name}0123456789") };
    let header = Header {
        base: id("base"),
        face_encoder: id("face"),
        image_encoder: id("image"),
        image_input: Default::default(),
        layout,
    };
    std::fs::write(folder.join("dataset.json"), serde_json::to_vec(&header).unwrap()).unwrap();
    std::fs::write(folder.join("manifest.jsonl"), manifest).unwrap();
}

/// Settings for the dataset of [`write_dataset`], whose LoRAs have four dimensions.
pub const SETTINGS: &str = r#"
    [lae]
    seed = 1
    network = { kind = "conv1d_dense", latent = 4, patch = 8, channels = 2 }
    weight_preserved = 0.1
    latent_noise = 0.01
    plan = { steps = 20, batch = 16, shards = 2, rate = { peak = 1e-3 }, ema = 0.9 }
    [dit]
    seed = 2
    token = 2
    width = 16
    depth = 1
    heads = 2
    steps = 2
    guidance = 1.0
    linear_guess = true
    penalties = [1e-3, 1e-2, 1e-1]
    folds = 4
    condition_noise = 0.1
    drop = 0.1
    plan = { steps = 60, batch = 16, shards = 2, rate = { peak = 3e-3, decay = "linear" }, ema = 0.9 }
"#;

/// Arguments of `train-lae` with the files of a folder.
pub fn lae_args(folder: &Path, settings: &str) -> train_lae::Args {
    std::fs::write(folder.join("settings.toml"), settings).unwrap();
    train_lae::Args {
        dataset: folder.join("dataset"),
        run: RunArgs {
            out: folder.join("lae"),
            config: folder.join("settings.toml"),
            resume: false,
            minutes: None,
        },
        device: "cpu".into(),
        sweep: None,
        skip_missing: false,
        memory: 1.0,
    }
}

/// Output options without progress.
pub fn quiet() -> Output {
    Output { json: true, quiet: true, overwrite: false, max_megapixels: 200, verbose: false }
}
