//! LoRA files as other programs write them, each beside a plain one that must mean the same. The names and settings are
//! those of public bug reports; the layers are the built-in base's.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use difflora::diffusion::noise::normal;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::difflora;

const TO_Q: &str = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";
const TO_Q_LDM: &str = "input_blocks.3.1.transformer_blocks.0.attn1.to_q";
const TO_K: &str = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k";
const TO_K_LDM: &str = "middle_block.1.transformer_blocks.0.attn2.to_k";
const Q_PROJ: &str = "text_model.encoder.layers.0.self_attn.q_proj";
const FC1: &str = "text_model.encoder.layers.1.mlp.fc1";

fn kohya(prefix: &str, path: &str) -> String {
    format!("{prefix}{}", path.replace('.', "_"))
}

/// A tensor of a file: key, type, shape, bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn stored(key: impl Into<String>, tensor: &Tensor) -> Stored {
    let numbers = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    (key.into(), Dtype::F32, tensor.dims().to_vec(), bytes)
}

fn random(stream: u64, shape: &[usize]) -> Tensor {
    (normal(7, stream, shape, &Device::Cpu).unwrap() * 0.1).unwrap()
}

fn number(key: impl Into<String>, value: f32) -> Stored {
    (key.into(), Dtype::F32, vec![], value.to_le_bytes().to_vec())
}

/// A layer of rank 4: `down` (4, input), `up` (output, 4) under the given suffixes.
fn layer(stem: &str, stream: u64, [output, input]: [usize; 2], [down, up]: [&str; 2]) -> [Stored; 2] {
    [
        stored(format!("{stem}.{down}"), &random(stream, &[4, input])),
        stored(format!("{stem}.{up}"), &random(stream + 1, &[output, 4])),
    ]
}

const PEFT: [&str; 2] = ["lora_A.weight", "lora_B.weight"];
const KOHYA: [&str; 2] = ["lora_down.weight", "lora_up.weight"];
const Q: [usize; 2] = [64, 64];
const K: [usize; 2] = [128, 160];

/// `to_q` and `to_k` under these stems.
fn two_layers(stems: [&str; 2], suffixes: [&str; 2]) -> Vec<Stored> {
    [layer(stems[0], 10, Q, suffixes), layer(stems[1], 20, K, suffixes)].concat()
}

/// The same as sd-scripts writes it, with these alphas.
fn plain(alphas: [f32; 2]) -> Vec<Stored> {
    let stems = [kohya("lora_unet_", TO_Q_LDM), kohya("lora_unet_", TO_K_LDM)];
    let mut tensors = two_layers([&stems[0], &stems[1]], KOHYA);
    tensors.extend(stems.iter().zip(alphas).map(|(stem, alpha)| number(format!("{stem}.alpha"), alpha)));
    tensors
}

fn write(folder: &Path, name: &str, tensors: &[Stored], metadata: &[(&str, &str)]) -> PathBuf {
    let view = |(key, dtype, shape, bytes): &Stored| -> (String, TensorView<'static>) {
        let bytes: &'static [u8] = bytes.clone().leak();
        (key.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    };
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let path = folder.join(name);
    fs::write(&path, safetensors::serialize(tensors.iter().map(view), Some(metadata)).unwrap()).unwrap();
    path
}

/// Asserts that both files change the same layers by the same ΔW.
fn assert_same(one: &Path, two: &Path) {
    let run = difflora(&[
        "lora",
        "diff",
        one.to_str().unwrap(),
        two.to_str().unwrap(),
        "--base",
        "tiny",
        "--json",
        "--strict",
    ]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(run.stderr, "", "{}", one.display());
    let told: Value = serde_json::from_str(&run.stdout).unwrap();
    let modules = told["modules"].as_object().unwrap();
    assert!(!modules.is_empty());
    for (module, difference) in modules {
        assert!(difference["distance"].as_f64().unwrap() < 1e-6, "{}: {module}: {difference}", one.display());
    }
    for only in ["only_in_first", "only_in_second"] {
        assert!(told[only].as_array().unwrap().is_empty(), "{told}");
    }
}

/// Asserts that both files make the same model of the built-in base.
fn assert_same_merged(folder: &Path, one: &Path, two: &Path) {
    let merged = |path: &Path, name: &str| {
        let out = folder.join(name);
        let path = path.to_str().unwrap();
        let run = difflora(&[
            "lora",
            "merge",
            "--base",
            "tiny",
            "--lora",
            path,
            "--out",
            out.to_str().unwrap(),
            "--strict",
        ]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert_eq!(run.stderr, "", "{path}");
        out
    };
    let (a, b) = (merged(one, "merged-one"), merged(two, "merged-two"));
    for file in ["unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"] {
        let tensors = |out: &Path| {
            let bytes = fs::read(out.join(format!("{file}.safetensors"))).unwrap();
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[8 + header..].to_vec()
        };
        assert!(tensors(&a) == tensors(&b), "{file}");
    }
    fs::remove_dir_all(a).unwrap();
    fs::remove_dir_all(b).unwrap();
}

#[test]
fn alphas_stand_where_other_programs_put_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Patterns of diffusers' metadata are regular expressions.
    let unet = [format!("unet.{TO_Q}"), format!("unet.{TO_K}")];
    let noted = two_layers([&unet[0], &unet[1]], PEFT);
    let same = write(folder, "same.safetensors", &plain([16.0, 4.0]), &[]);
    let json = r#"{"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {"down_blocks\\.1\\..*attn[12]\\.to_q": 16}}"#;
    let odd = write(folder, "odd.safetensors", &noted, &[("lora_adapter_metadata", json)]);
    assert_same(&odd, &same);
    // PEFT's own folder.
    let raw = [format!("base_model.model.{TO_Q}"), format!("base_model.model.{TO_K}")];
    let raw = two_layers([&raw[0], &raw[1]], PEFT);
    for (config, alphas) in [
        (r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 16}"#, [16.0, 16.0]),
        (r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_rslora": true}"#, [8.0, 8.0]),
        (
            r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": {".*to_[kv]": 1, "to_k": 9}}"#,
            [4.0, 1.0],
        ),
    ] {
        let adapter = folder.join("adapter");
        fs::create_dir_all(&adapter).unwrap();
        let file = write(&adapter, "adapter_model.safetensors", &raw, &[("format", "pt")]);
        fs::write(adapter.join("adapter_config.json"), config).unwrap();
        let same = write(folder, "same.safetensors", &plain(alphas), &[]);
        assert_same(&file, &same);
        assert_same(&adapter, &same);
        let run = difflora(&["lora", "inspect", adapter.to_str().unwrap(), "--json"]);
        let told: Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(
            told["alphas"][alphas[0].to_string()],
            if alphas[0] == alphas[1] { 2 } else { 1 },
            "{told}"
        );
    }
    // Small integers.
    let mut small = plain([2.0, 3.0]);
    for (alpha, dtype, bytes) in [(4, Dtype::I16, vec![2, 0]), (5, Dtype::I8, vec![3])] {
        (small[alpha].1, small[alpha].3) = (dtype, bytes);
    }
    let odd = write(folder, "small.safetensors", &small, &[]);
    assert_same(&odd, &write(folder, "same.safetensors", &plain([2.0, 3.0]), &[]));
}

#[test]
fn an_adapter_config_that_cannot_be_followed_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tensors =
        two_layers([&format!("base_model.model.{TO_Q}"), &format!("base_model.model.{TO_K}")], PEFT);
    let file = write(folder.path(), "adapter_model.safetensors", &tensors, &[]);
    for (config, words) in [
        (r#"{"lora_alpha": 4, "init_lora_weights": "pissa"}"#, "path_initial_model_for_weight_conversion"),
        (r#"{"lora_alpha": 4, "alpha_pattern": {"(": 1}}"#, "no regular expression"),
        ("nothing", "adapter config"),
    ] {
        fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        let diff =
            difflora(&["lora", "convert", file.to_str().unwrap(), folder.path().join("o").to_str().unwrap()]);
        assert_eq!(diff.code, 4, "{config}: {}", diff.stderr);
        assert!(
            diff.stderr.contains(words) && diff.stderr.contains("adapter_model.safetensors"),
            "{}",
            diff.stderr
        );
    }
}

#[test]
fn text_encoders_and_wrappers_are_found_under_every_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let texts = |one: &str, two: &str, suffixes| {
        [layer(one, 30, [64, 64], suffixes), layer(two, 40, [384, 96], suffixes)].concat()
    };
    let same =
        [plain([4.0, 4.0]), texts(&kohya("lora_te1_", Q_PROJ), &kohya("lora_te2_", FC1), KOHYA)].concat();
    let same = write(folder, "same.safetensors", &same, &[]);
    for (i, (unets, one, two, suffixes)) in [
        // ComfyUI's saver, OneTrainer's OMI names, compiled, in PEFT's wrapper.
        (
            [format!("diffusion_model.{TO_Q_LDM}"), format!("diffusion_model.{TO_K_LDM}")],
            format!("text_encoders.clip_l.transformer.{Q_PROJ}"),
            format!("text_encoders.clip_g.transformer.{FC1}"),
            KOHYA,
        ),
        (
            [format!("unet.{TO_Q_LDM}"), format!("unet.{TO_K_LDM}")],
            format!("clip_l.{Q_PROJ}"),
            format!("clip_g.{FC1}"),
            KOHYA,
        ),
        (
            [format!("unet._orig_mod.{TO_Q}"), format!("unet._orig_mod.{TO_K}")],
            format!("text_encoder._orig_mod.{Q_PROJ}"),
            format!("text_encoder_2._orig_mod.{FC1}"),
            PEFT,
        ),
        (
            [
                format!("base_model.model.module.{TO_Q}"),
                format!("base_model.model.diffusion_model.{TO_K_LDM}"),
            ],
            format!("base_model.model.text_encoder.{Q_PROJ}"),
            format!("module.text_encoder_2.base_model.model.{FC1}"),
            PEFT,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let tensors = [two_layers([&unets[0], &unets[1]], suffixes), texts(&one, &two, suffixes)].concat();
        let odd = write(folder, &format!("odd{i}.safetensors"), &tensors, &[]);
        assert_same(&odd, &same);
        if i == 0 {
            assert_same_merged(folder, &odd, &same);
        }
    }
}

#[test]
fn the_bias_of_up_is_added_to_the_layer_s() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let stem = format!("text_encoder.{Q_PROJ}");
    let bias = random(50, &[64]);
    let mut odd = layer(&stem, 30, [64, 64], PEFT).to_vec();
    odd.push(stored(format!("{stem}.lora_B.bias"), &bias));
    let stem = kohya("lora_te1_", Q_PROJ);
    let mut same = layer(&stem, 30, [64, 64], KOHYA).to_vec();
    same.extend([
        number(format!("{stem}.alpha"), 8.0),
        stored(format!("{stem}.diff_b"), &(bias * 2.0).unwrap()),
    ]);
    let metadata = [("lora_adapter_metadata", r#"{"text_encoder.lora_alpha": 8}"#)];
    let odd = write(folder, "odd.safetensors", &odd, &metadata);
    assert_same_merged(folder, &odd, &write(folder, "same.safetensors", &same, &[]));
}

#[test]
fn oft_of_sd_scripts_and_a_whole_lokr_of_infinite_alpha_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let oft = |prefix: &str| {
        let stem = kohya(prefix, TO_Q_LDM);
        let blocks = stored(format!("{stem}.oft_blocks"), &random(60, &[4, 16, 16]));
        [blocks, number(format!("{stem}.alpha"), 0.01)]
    };
    let odd = write(folder, "odd.safetensors", &oft("oft_unet_"), &[("ss_network_module", "networks.oft")]);
    assert_same_merged(folder, &odd, &write(folder, "same.safetensors", &oft("lora_unet_"), &[]));

    let lokr = |alpha: f32| {
        let stem = kohya("lora_unet_", TO_Q_LDM);
        let matrix = |key: &str, stream| stored(format!("{stem}.{key}"), &random(stream, &[8, 8]));
        [matrix("lokr_w1", 70), matrix("lokr_w2", 71), number(format!("{stem}.alpha"), alpha)]
    };
    let same = write(folder, "same.safetensors", &lokr(1.0), &[]);
    for alpha in [f32::INFINITY, 1e10] {
        assert_same(&write(folder, "odd.safetensors", &lokr(alpha), &[]), &same);
    }
    // Where alpha scales, infinity is damage.
    let odd = write(folder, "odd.safetensors", &plain([f32::INFINITY, 4.0]), &[]);
    let run = difflora(&[
        "lora",
        "convert",
        odd.to_str().unwrap(),
        folder.join("o").to_str().unwrap(),
        "--base",
        "tiny",
    ]);
    assert!(run.code == 4 && run.stderr.contains("not finite"), "{}", run.stderr);
}

#[test]
fn what_is_left_out_is_named_with_its_share_and_refused_by_strict() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut tensors = plain([4.0, 4.0]);
    tensors.push(stored("bundle_emb.sks person.clip_l", &random(1, &[2, 64])));
    let embeddings = write(folder, "embeddings.safetensors", &tensors, &[]);
    tensors.pop();
    tensors.push(stored("lora_unet_nowhere.lora_up.weight", &random(1, &[100, 10])));
    let unknown = write(folder, "unknown.safetensors", &tensors, &[]);
    tensors.pop();
    let elsewhere = "lora_unet_down_blocks_7_attentions_0_proj_in";
    tensors.extend(layer(elsewhere, 90, [64, 64], KOHYA));
    let misplaced = write(folder, "misplaced.safetensors", &tensors, &[]);
    let image = folder.join("x.png");
    for (file, words) in [
        (&embeddings, "embeddings for `sks person`"),
        // 1000 of 1000 + 512 + 1152 + 2 numbers.
        (&unknown, "1 of 7 tensors, 38 % of its weights"),
        (&misplaced, "1 of 3 layers, 24 % of its weights"),
    ] {
        let mut arguments =
            vec!["gen", "--lora", file.to_str().unwrap(), "--prompt", "a photo", "--steps", "1"];
        arguments.extend(["--out", image.to_str().unwrap()]);
        let run = difflora(&arguments);
        assert!(run.code == 0 && run.stderr.contains(words), "{}", run.stderr);
        arguments.push("--strict");
        let run = difflora(&arguments);
        assert!(run.code == 4 && run.stderr.contains(words), "{}", run.stderr);
        assert!(run.stderr.contains(file.to_str().unwrap()), "{}", run.stderr);
    }
}

#[test]
fn a_lora_of_the_built_in_base_needs_no_base() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let of_tiny = [("difflora.base", "tiny"), ("difflora.base_sha256", "0")];
    let mine = write(folder, "mine.safetensors", &plain([4.0, 4.0]), &of_tiny);
    let other = folder.join("other.safetensors");
    let run = difflora(&["lora", "convert", mine.to_str().unwrap(), other.to_str().unwrap(), "--strict"]);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert_same(&mine, &other);
    // Of a base that is not known here: refused by name, not read by half.
    let of_mine = [("difflora.base", "my-base")];
    let foreign = write(folder, "foreign.safetensors", &plain([4.0, 4.0]), &of_mine);
    let run = difflora(&["lora", "inspect", foreign.to_str().unwrap()]);
    assert!(run.code == 4 && run.stderr.contains("the base `my-base`: give it as --base"), "{}", run.stderr);
    let both = ["lora", "merge", "--lora", mine.to_str().unwrap(), foreign.to_str().unwrap(), "--out"];
    let run = difflora(&[&both[..], &[folder.join("both.safetensors").to_str().unwrap()]].concat());
    assert!(
        run.code == 2 && run.stderr.contains("`tiny`") && run.stderr.contains("`my-base`"),
        "{}",
        run.stderr
    );
}

#[test]
fn files_of_other_models_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for (key, words) in [
        ("id_encoder.fuse_module.mlp1.fc1.weight", "PhotoMaker"),
        ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "diffusion transformer"),
    ] {
        let file = write(folder.path(), "other.safetensors", &[stored(key, &random(1, &[4, 4]))], &[]);
        let run = difflora(&["gen", "--lora", file.to_str().unwrap(), "--prompt", "x", "--out", "never.png"]);
        assert!(run.code == 4 && run.stderr.contains(words), "{}", run.stderr);
        assert!(run.stderr.contains(file.to_str().unwrap()), "{}", run.stderr);
    }
}

#[test]
fn layers_that_peft_saves_whole_take_the_place_of_the_base_s() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (weight, bias, other) = (random(1, &[32, 8, 3, 3]), random(2, &[32]), random(3, &[8]));
    let raw = |path: &str| format!("base_model.model.{path}");
    let mut tensors = two_layers([&raw(TO_Q), &raw(TO_K)], PEFT);
    tensors.extend([
        stored(raw("conv_in.weight"), &weight),
        stored(raw("conv_in.bias"), &bias),
        stored(raw("conv_out.base_layer.bias"), &other),
    ]);
    fs::create_dir(folder.join("peft")).unwrap();
    write(&folder.join("peft"), "adapter_model.safetensors", &tensors, &[]);
    let config = r#"{"lora_alpha": 4, "modules_to_save": ["conv_in"], "bias": "all"}"#;
    fs::write(folder.join("peft/adapter_config.json"), config).unwrap();
    let lora = folder.join("peft");
    let out = folder.join("merged");
    let merge = |lora: &str, out: &Path| {
        difflora(&[
            "lora",
            "merge",
            "--base",
            "tiny",
            "--lora",
            lora,
            "--out",
            out.to_str().unwrap(),
            "--strict",
        ])
    };
    let run = merge(lora.to_str().unwrap(), &out);
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    let merged = difflora::weights::read_file(&out.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    for (name, wanted) in [("conv_in.weight", &weight), ("conv_in.bias", &bias), ("conv_out.bias", &other)] {
        let far = (merged[name].to_dtype(candle_core::DType::F32).unwrap() - wanted).unwrap().abs().unwrap();
        let far = far.max_all().unwrap().to_scalar::<f32>().unwrap();
        // The base is stored in 16 bits.
        assert!(far < 2e-4, "{name}: {far}");
    }
    // A file keeps them, under ComfyUI's name; what needs the base to be added up is refused by name.
    let converted = folder.join("converted.safetensors");
    let convert = ["lora", "convert", lora.to_str().unwrap(), converted.to_str().unwrap(), "--base", "tiny"];
    assert_eq!(difflora(&convert).code, 0);
    let same = folder.join("same");
    assert_eq!(merge(converted.to_str().unwrap(), &same).code, 0);
    let bytes = |out: &Path| {
        let bytes = fs::read(out.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
        bytes[8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize..].to_vec()
    };
    assert!(bytes(&out) == bytes(&same));
    let small = folder.join("small.safetensors");
    let resize =
        ["lora", "resize", lora.to_str().unwrap(), small.to_str().unwrap(), "--rank", "2", "--base", "tiny"];
    let run = difflora(&resize);
    assert!(run.code == 4 && run.stderr.contains("in the place of the base's"), "{}", run.stderr);
}

#[test]
fn textual_inversions_that_a_lora_brings_are_used_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let vectors = [("clip_l", random(1, &[2, 64])), ("clip_g", random(2, &[2, 96]))];
    let mut tensors = plain([4.0, 4.0]);
    let without = write(folder, "without.safetensors", &tensors, &[]);
    tensors.extend(vectors.iter().map(|(part, v)| stored(format!("bundle_emb.sks person.{part}"), v)));
    let with = write(folder, "with.safetensors", &tensors, &[]);
    let word = write(folder, "sks person.safetensors", &vectors.map(|(part, v)| stored(part, &v)), &[]);
    let image = |name: &str, arguments: &[&str], prompt: &str| {
        let path = folder.join(format!("{name}.png"));
        let fixed =
            ["gen", "--steps", "1", "--no-metadata", "--prompt", prompt, "--out", path.to_str().unwrap()];
        let run = difflora(&[&fixed, arguments].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
        (fs::read(path).unwrap(), run.stderr)
    };
    let prompt = "a photo of sks person, smiling";
    let [with, without, word] = [&with, &without, &word].map(|path| path.to_str().unwrap());
    let (plain, _) = image("plain", &["--lora", without], prompt);
    let (used, said) = image("used", &["--lora", with, "--strict"], prompt);
    assert!(said.contains("`sks person` stands for 2 textual inversion vectors"), "{said}");
    assert!(used != plain);
    assert!(used == image("file", &["--lora", without, "--embedding", word], prompt).0);
    let comfyui = ["--lora", with, "--prompt-syntax", "comfyui"];
    assert!(used == image("comfyui", &comfyui, "a photo of embedding:sks person, smiling").0);
    let (_, said) = image("missing", &["--prompt-syntax", "comfyui"], "a embedding:nobody, smiling");
    assert!(said.contains("no embedding for `embedding:nobody,`"), "{said}");
    // Without the words they change nothing, and that is said.
    let other = "a photo of a person";
    let (unused, said) = image("unused", &["--lora", with], other);
    assert!(said.contains("write `sks person` in the prompt"), "{said}");
    assert!(unused == image("other", &["--lora", without], other).0);
    // A converted file keeps them.
    let kept = folder.join("kept.safetensors");
    let kept = kept.to_str().unwrap();
    assert_eq!(difflora(&["lora", "convert", with, kept, "--base", "tiny"]).code, 0);
    assert!(used == image("kept", &["--lora", kept], prompt).0);
    let told = difflora(&["lora", "--base", "tiny", "inspect", kept, "--json"]).stdout;
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["embeddings"]["sks person"], &told["unmatched"]), (&2.into(), &Value::Array(vec![])));
    let peft = folder.join("peft.safetensors");
    let run =
        difflora(&["lora", "convert", with, peft.to_str().unwrap(), "--base", "tiny", "--format", "peft"]);
    assert!(run.code == 0 && run.stderr.contains("has no place for"), "{}", run.stderr);
    // Vectors of another base, and files that are none.
    for (name, shapes, words) in [
        ("wide", [[1, 768], [1, 1280]], "768 and 1280 numbers"),
        ("odd", [[1, 64], [2, 96]], "clip_l has 1 vectors and clip_g 2"),
        ("many", [[80, 64], [80, 96]], "at most 75"),
    ] {
        let tensors = [stored("clip_l", &random(1, &shapes[0])), stored("clip_g", &random(2, &shapes[1]))];
        let file = write(folder, &format!("{name}.safetensors"), &tensors, &[]);
        let out = folder.join("no.png");
        let run = difflora(&[
            "gen",
            "--prompt",
            "x",
            "--out",
            out.to_str().unwrap(),
            "--embedding",
            file.to_str().unwrap(),
        ]);
        assert!(run.code == 4 && run.stderr.contains(words) && run.stderr.contains(name), "{}", run.stderr);
    }
    let run =
        difflora(&["gen", "--prompt", "x", "--lora", word, "--out", folder.join("no.png").to_str().unwrap()]);
    assert!(run.code == 4 && run.stderr.contains("--embedding"), "{}", run.stderr);
}
