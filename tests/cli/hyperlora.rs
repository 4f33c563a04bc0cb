//! `difflora gen --hypernet hyperlora` with random weights of small sizes in the released layout, on the built-in base.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use difflora::diffusion::noise;
use difflora::image::Image;
use difflora::registry;
use difflora::sdxl::pipeline::SdxlLoader;
use serde_json::{Value, json};

use crate::{Run, difflora, difflora_with};

const PHOTO: &str = "tests/data/astronaut.png";
const OTHER: &str = "tests/data/obama_senate_public_domain.jpg";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The attention modules of the built-in base: path, width, and width of what attn2 listens to.
fn modules() -> Vec<(String, usize, Option<usize>)> {
    let base = registry::built_in("base").unwrap();
    let mut skeleton = SdxlLoader::open(&base, DType::F32, &Device::Cpu).unwrap().skeleton().unwrap();
    let mut shapes = BTreeMap::new();
    skeleton.visit_layers(&mut |path, layer| {
        shapes.insert(path.to_string(), layer.weight().dims().to_vec());
    });
    let named = shapes.iter().filter_map(|(path, shape)| {
        let module = path.strip_suffix(".to_q").filter(|path| path.contains(".attn"))?;
        let context = module.ends_with("attn2").then(|| shapes[&format!("{module}.to_k")][1]);
        Some((module.to_string(), shape[0], context))
    });
    named.collect()
}

/// A tiny HyperLoRA for the built-in base; its heads are as wide as the released ones.
fn write_weights(folder: &Path) {
    const D: usize = 16;
    const K: usize = 4;
    const RANK: usize = 2;
    let clip: Value =
        serde_json::from_slice(&registry::built_in("image_encoder").unwrap().read("config.json").unwrap())
            .unwrap();
    let clip = clip["hidden_size"].as_u64().unwrap() as usize;
    fs::create_dir_all(folder).unwrap();
    let mut stream = 0;
    let mut random = |shape: &[usize], scale: f64| {
        stream += 1;
        (noise::normal(3, stream, shape, &Device::Cpu).unwrap() * scale)
            .unwrap()
            .to_dtype(DType::F16)
            .unwrap()
    };
    let save = |stem: &str, tensors: HashMap<String, Tensor>| {
        candle_core::safetensors::save(&tensors, folder.join(format!("{stem}.safetensors"))).unwrap();
    };
    let modules = modules();
    let mut tensors = HashMap::new();
    for (name, shape) in
        [("0.weight", vec![2 * D, 512]), ("0.bias", vec![2 * D]), ("2.weight", vec![D]), ("2.bias", vec![D])]
    {
        tensors.insert(name.to_string(), random(&shape, 1.0));
    }
    save("id_projector", std::mem::take(&mut tensors));
    tensors.insert("latents".into(), random(&[1, 8 * modules.len(), D], 1.0));
    for (name, out, input) in [("proj_in", D, D), ("proj_in_2", D, clip), ("proj_out", K, D)] {
        tensors.insert(format!("{name}.weight"), random(&[out, input], 0.3));
        tensors.insert(format!("{name}.bias"), random(&[out], 0.3));
    }
    for norm in ["norm_attn1", "norm_attn2_l", "norm_attn2_x", "norm_attn3_l", "norm_attn3_y", "norm_ff"] {
        for part in ["weight", "bias"] {
            tensors.insert(format!("layers.0.{norm}.{part}"), random(&[D], 1.0));
        }
    }
    for attn in ["attn1", "attn2", "attn3"] {
        for to in ["to_q", "to_k", "to_v"] {
            tensors.insert(format!("layers.0.{attn}.{to}.weight"), random(&[64, D], 0.3));
        }
        tensors.insert(format!("layers.0.{attn}.to_out.0.weight"), random(&[D, 64], 0.3));
    }
    for (name, out, input) in [("ff.net.0.proj", 24, D), ("ff.net.2", D, 24)] {
        tensors.insert(format!("layers.0.{name}.weight"), random(&[out, input], 0.3));
        tensors.insert(format!("layers.0.{name}.bias"), random(&[out], 0.3));
    }
    save("resampler", std::mem::take(&mut tensors));
    let mut listed = serde_json::Map::new();
    for (i, (path, width, context)) in modules.into_iter().enumerate() {
        for to in ["to_q", "to_k", "to_v", "to_out"] {
            let input = if to == "to_k" || to == "to_v" { context.unwrap_or(width) } else { width };
            tensors.insert(format!("{i}.{to}.id_down_basis"), random(&[K, input, RANK], 0.1));
            tensors.insert(format!("{i}.{to}.id_up_basis"), random(&[K, RANK, width], 0.1));
        }
        let name = format!("lora_unet_{}", path.replace('.', "_"));
        listed.insert(name, json!({ "hidden_size": width, "cross_attention_dim": context }));
    }
    save("hyper_lora_modules", tensors);
    // serde_json sorts the names as `modules` does.
    fs::write(folder.join("hyper_lora_modules.json"), Value::from(listed).to_string()).unwrap();
}

/// Networks with the graphs of antelopev2 and random weights.
fn write_faces(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    for (from, to) in [("scrfd", "scrfd_10g_bnkps"), ("iresnet50", "glintr100"), ("landmarks", "2d106det")] {
        fs::copy(format!("tests/data/golden/{from}.onnx"), folder.join(format!("{to}.onnx"))).unwrap();
    }
}

struct Folders {
    root: tempfile::TempDir,
}

impl Folders {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        write_weights(&root.path().join("weights"));
        write_faces(&root.path().join("faces"));
        Self { root }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn run(&self, hypernet: &str, more: &[&str]) -> Run {
        let faces = self.at("faces");
        let first = [
            "gen",
            "--json",
            "--hypernet",
            hypernet,
            "--face-encoder",
            text(&faces),
            "--image-encoder",
            "tiny",
        ];
        difflora(&[&first[..], more].concat())
    }

    /// The report and the written LoRA.
    fn lora(&self, more: &[&str]) -> (Value, HashMap<String, Tensor>) {
        let out = self.at("made.safetensors");
        let run = self.run(text(&self.at("weights")), &[&["--lora-out", text(&out)], more].concat());
        assert_eq!(run.code, 0, "{more:?}: {}", run.stderr);
        (
            serde_json::from_str(&run.stdout).unwrap(),
            candle_core::safetensors::load(&out, &Device::Cpu).unwrap(),
        )
    }
}

fn same(a: &HashMap<String, Tensor>, b: &HashMap<String, Tensor>) -> bool {
    let values = |tensor: &Tensor| {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    a.len() == b.len() && a.iter().all(|(key, tensor)| values(tensor) == values(&b[key]))
}

#[test]
fn a_photo_becomes_a_lora_and_an_image() {
    let folders = Folders::new();
    let (image, lora) = (folders.at("me.png"), folders.at("me.safetensors"));
    let outputs = [
        "--ref",
        PHOTO,
        "--prompt",
        "a man, smiling",
        "--steps",
        "2",
        "--out",
        text(&image),
        "--lora-out",
        text(&lora),
    ];
    let run = folders.run(text(&folders.at("weights")), &outputs);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("fcsks fxhks fhyks"), "{}", run.stderr);
    // The encoders are not those that the real weights were trained with.
    assert!(
        run.stderr.contains("antelopev2") && run.stderr.contains("openai/clip-vit-large-patch14"),
        "{}",
        run.stderr
    );
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let count = 4 * modules().len();
    assert_eq!((&report["person"]["modules"], &report["person"]["rank"]), (&json!(count), &json!(2)));
    assert_eq!(
        (&report["loras"][0]["weight"], &report["loras"][0]["without_place"]),
        (&json!(0.8), &json!([]))
    );
    assert!(
        report["pictures"][0]["prompt"].as_str().unwrap().starts_with("fcsks fxhks fhyks, a man, smiling"),
        "{report}"
    );

    let tensors = candle_core::safetensors::load(&lora, &Device::Cpu).unwrap();
    assert_eq!(tensors.len(), 3 * count);
    let down = tensors.iter().find(|(key, _)| key.ends_with("lora_down.weight")).unwrap();
    assert!(down.1.dtype() == DType::F16 && down.0.starts_with("lora_unet_"), "{}", down.0);
    let alpha = tensors.iter().find(|(key, _)| key.ends_with("alpha")).unwrap().1;
    assert_eq!(alpha.to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap(), 1.0);
    let run = difflora(&["lora", "inspect", text(&lora), "--json"]);
    for said in ["modelspec.trigger_phrase", "fcsks fxhks fhyks", "difflora.image_encoder_sha256"] {
        assert!(run.stdout.contains(said), "{said}: {}", run.stdout);
    }
    // Words that are there already are not put there again, and the image is the same.
    let (other, prompt) = (folders.at("other.png"), "fcsks fxhks fhyks, a man, smiling");
    let again = ["--ref", PHOTO, "--prompt", prompt, "--steps", "2", "--out", text(&other)];
    assert_eq!(folders.run(text(&folders.at("weights")), &again).code, 0);
    assert_eq!(Image::open(&image).unwrap(), Image::open(&other).unwrap());
}

#[test]
fn photos_are_averaged_people_mixed_and_faces_chosen() {
    let folders = Folders::new();
    let (_, one) = folders.lora(&["--ref", PHOTO]);
    let (_, again) = folders.lora(&["--mix", PHOTO]);
    assert!(same(&one, &again));
    let (_, other) = folders.lora(&["--ref", OTHER]);
    let (report, both) = folders.lora(&["--ref", PHOTO, OTHER]);
    assert_eq!(report["person"]["references"].as_array().unwrap().len(), 2);
    assert!(!same(&one, &both) && !same(&other, &both) && !same(&one, &other));
    // Two photos count alike, as people of equal weight do.
    let (report, mixed) = folders.lora(&["--mix", PHOTO, "--mix", OTHER]);
    assert_eq!(report["person"]["weights"], json!([0.5, 0.5]));
    let far = |a: &Tensor, b: &Tensor| {
        let [a, b] = [a, b].map(|x| x.to_dtype(DType::F32).unwrap());
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
    };
    assert!(
        mixed
            .iter()
            .filter(|(key, _)| !key.ends_with("alpha"))
            .all(|(key, tensor)| far(tensor, &both[key]) < 2e-3)
    );
    let (report, refined) = folders.lora(&["--ref", PHOTO, "--refine", "1"]);
    assert!(report["person"]["refined"]["before"].is_number() && !same(&one, &refined));
    let (_, peft) = folders.lora(&["--ref", PHOTO, "--lora-format", "peft"]);
    assert!(peft.keys().all(|key| key.starts_with("unet.") && key.contains(".lora_")), "{:?}", peft.keys());
    let (report, second) = folders.lora(&["--ref", PHOTO, "--face", "2"]);
    assert!(report["person"]["references"][0]["faces"].as_u64().unwrap() > 1 && !same(&one, &second));
}

#[test]
fn what_cannot_be_is_refused_with_its_reason() {
    let folders = Folders::new();
    let weights = folders.at("weights");
    let says = |run: &Run, code: i32, words: &[&str]| {
        assert_eq!(run.code, code, "{}", run.stderr);
        words.iter().for_each(|word| assert!(run.stderr.contains(word), "{word}: {}", run.stderr));
    };
    let gen_lora = |more: &[&str]| folders.run(text(&weights), &[&["--ref", PHOTO], more].concat());
    says(&gen_lora(&["--vary", "0.3"]), 2, &["--vary", "one pass"]);
    says(&folders.run("hyperlora:best", &["--ref", PHOTO]), 2, &["hyperlora:edit"]);
    let grey = folders.at("grey.png");
    Image::filled(300, 200, [127; 3]).save(&grey, None).unwrap();
    let run = folders.run(text(&weights), &["--ref", text(&grey)]);
    says(&run, 3, &["grey.png", "640, 512, 384, 256, 128, 320, 160"]);
    let arguments = ["gen", "--hypernet", text(&weights), "--ref", PHOTO, "--image-encoder", "tiny"];
    let run = difflora(&[&arguments[..], &["--face-encoder", "mobilefacenet"]].concat());
    says(&run, 2, &["antelopev2", "mobilefacenet"]);
    // Another UNet: the modules of SDXL.
    let list = weights.join("hyper_lora_modules.json");
    let names = fs::read_to_string(&list).unwrap();
    fs::write(&list, names.replace("up_blocks_0_", "up_blocks_7_")).unwrap();
    says(&gen_lora(&[]), 2, &["cannot be used with the base `tiny`", "have no place", "SDXL"]);
    fs::write(&list, &names).unwrap();
    let bytes = fs::read(weights.join("resampler.safetensors")).unwrap();
    fs::write(weights.join("resampler.safetensors"), &bytes[..bytes.len() - 10]).unwrap();
    says(&gen_lora(&[]), 4, &["resampler.safetensors", "not a whole"]);
    fs::remove_file(weights.join("resampler.safetensors")).unwrap();
    says(&gen_lora(&[]), 4, &["resampler.safetensors"]);
    let run = difflora(&[
        "eval",
        "--dataset",
        text(folders.root.path()),
        "--hypernet",
        text(&weights),
        "--out",
        text(&folders.at("e")),
    ]);
    assert_ne!(run.code, 0);
}

#[test]
fn the_hub_s_cache_is_searched_and_nothing_fetched_unasked() {
    let folders = Folders::new();
    let hub = folders.at("hub");
    let snapshot = hub.join("models--bytedance-research--HyperLoRA/snapshots/main");
    let env = [("HF_HUB_CACHE", text(&hub)), ("HF_ENDPOINT", "http://127.0.0.1:9")];
    let faces = folders.at("faces");
    let out = folders.at("x.safetensors");
    let gen_with = |name: &str| {
        let arguments = [
            "gen",
            "--hypernet",
            name,
            "--ref",
            PHOTO,
            "--face-encoder",
            text(&faces),
            "--lora-out",
            text(&out),
        ];
        difflora_with(&env, &[&arguments[..], &["--image-encoder", "tiny"]].concat())
    };
    for name in ["hyperlora", "bytedance-research/HyperLoRA"] {
        let run = gen_with(name);
        assert_eq!(run.code, 4, "{}", run.stderr);
        for said in [
            "resampler.safetensors",
            "models--bytedance-research--HyperLoRA",
            "models pull hyperlora --accept-licence",
            "CC BY-NC 4.0",
        ] {
            assert!(run.stderr.contains(said), "{said}: {}", run.stderr);
        }
    }
    let listed = |name: &str| {
        let run = difflora_with(&env, &["models", "list", "--json"]);
        let rows: Value = serde_json::from_str(&run.stdout).unwrap();
        rows.as_array().unwrap().iter().find(|row| row["name"] == name).unwrap()["state"].clone()
    };
    assert_eq!((listed("hyperlora"), listed("hyperlora:edit")), (json!("not fetched"), json!("not fetched")));
    let edit = snapshot.join("sdxl_hyper_id_lora_v1_edit");
    write_weights(&edit);
    for name in ["hyperlora:edit", "bytedance-research/HyperLoRA", text(&snapshot)] {
        let run = gen_with(name);
        assert_eq!(run.code, 0, "{name}: {}", run.stderr);
    }
    assert_eq!((listed("hyperlora"), listed("hyperlora:edit")), (json!("not fetched"), json!("whole")));
    let run = difflora_with(&env, &["models", "show", "hyperlora:edit", "--json"]);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(report["layers"], json!(4 * modules().len()), "{}", run.stderr);
    let run = difflora_with(&env, &["doctor", "--json"]);
    let checks: Value = serde_json::from_str(&run.stdout).unwrap();
    let state = |name: &str| {
        let checks = checks["checks"].as_array().unwrap();
        checks.iter().find(|check| check["details"]["name"] == name).unwrap()["details"]["state"].clone()
    };
    assert_eq!(
        (state("hyperlora"), state("hyperlora:edit")),
        (json!("not downloaded"), json!("without encoders"))
    );
    fs::remove_file(edit.join("id_projector.safetensors")).unwrap();
    let run = gen_with("hyperlora:edit");
    assert!(
        run.code == 4 && run.stderr.contains("`id_projector.safetensors` is not on this machine"),
        "{}",
        run.stderr
    );
    assert_eq!(listed("hyperlora:edit"), json!("in part"));

    let run = difflora_with(&env, &["models", "pull", "hyperlora"]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    for said in ["CC BY-NC 4.0", "InsightFace", "CLIP", "--accept-licence"] {
        assert!(run.stderr.contains(said), "{said}: {}", run.stderr);
    }
    let run = difflora_with(&env, &["models", "pull", "hyperlora", "--accept-licence"]);
    assert!(run.code == 4 && run.stderr.contains("CC BY-NC 4.0"), "{}", run.stderr);
}

#[test]
fn landmarks_are_printed_and_drawn() {
    let folders = Folders::new();
    let (faces, drawn) = (folders.at("faces"), folders.at("drawn.png"));
    let arguments = ["face", "detect", PHOTO, "--face-encoder", text(&faces), "--json"];
    let plain: Value = serde_json::from_str(&difflora(&arguments).stdout).unwrap();
    assert!(plain[0]["faces"][0].get("landmarks").is_none());
    let run = difflora(&[&arguments[..], &["--landmarks", "--draw", text(&drawn)]].concat());
    assert_eq!(run.code, 0, "{}", run.stderr);
    let mut list: Value = serde_json::from_str(&run.stdout).unwrap();
    let points = list[0]["faces"][0].as_object_mut().unwrap().remove("landmarks").unwrap();
    let points = points.as_array().unwrap();
    assert_eq!(points.len(), 106);
    assert_eq!(list[0]["faces"][0], plain[0]["faces"][0]);
    let (drawn, photo) = (Image::open(&drawn).unwrap(), Image::open(Path::new(PHOTO)).unwrap());
    let pixel = |point: &Value| [0, 1].map(|axis| point[axis].as_f64().unwrap().round() as usize);
    let mut inside = points.iter().map(pixel).filter(|[x, y]| *x < photo.width && *y < photo.height);
    assert!(inside.any(|[x, y]| drawn.pixel(x, y) != photo.pixel(x, y)));
    let home = folders.at("home");
    let env = [("HOME", text(&home)), ("HF_HOME", text(&home)), ("HF_HUB_CACHE", "")];
    let run = difflora_with(&env, &["face", "detect", PHOTO, "--landmarks"]);
    assert!(run.code == 2 && run.stderr.contains("2d106det.onnx"), "{}", run.stderr);
    assert!(run.stderr.contains("models pull antelopev2"), "{}", run.stderr);
}
