//! `difflora lora` and LoRAs in `gen`, as a user meets them, with the built-in bundle.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use difflora::diffusion::noise::normal;
use difflora::lora::adapter::{Adapter, AdapterFile, AdapterKind, BiasChange, Magnitude};
use difflora::lora::file::{self, Format};
use difflora::registry::{self, Base, BaseOptions};
use difflora::sdxl::pipeline::Sdxl;
use difflora::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles, TRANSFORMERS_WEIGHTS};
use serde_json::Value;

use crate::Run;
use crate::difflora;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn ok(arguments: &[&str]) -> Run {
    let run = difflora(arguments);
    assert_eq!(run.code, 0, "{arguments:?}: {}", run.stderr);
    run
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&ok(&[arguments, &["--json"]].concat()).stdout).unwrap()
}

/// The shapes of all weights of the built-in base.
fn shapes() -> BTreeMap<String, Vec<usize>> {
    let files = registry::built_in("base").unwrap();
    let mut model = Sdxl::open(&files, DType::F32, &Device::Cpu).unwrap();
    let mut shapes = BTreeMap::new();
    let mut note = |path: &str, layer: difflora::layers::Layer| {
        shapes.insert(path.to_string(), layer.weight().dims().to_vec());
    };
    model.unet.visit_layers(&mut note);
    model.text.visit_layers(&mut note);
    shapes
}

fn small(stream: u64, shape: &[usize]) -> Tensor {
    (normal(1, stream, shape, &Device::Cpu).unwrap() * 0.1).unwrap()
}

/// A plain LoRA of `rank` on the layers whose path contains `part`.
fn low_rank(part: &str, rank: usize) -> AdapterFile {
    let layer = |(stream, (path, shape)): (u64, (String, Vec<usize>))| {
        let mut down = shape.clone();
        down[0] = rank;
        let up = if shape.len() == 4 { vec![shape[0], rank, 1, 1] } else { vec![shape[0], rank] };
        let kind = AdapterKind::LowRank {
            down: small(2 * stream, &down),
            up: small(2 * stream + 1, &up),
            mid: None,
            alpha: 2.0 * rank as f32,
        };
        (path, Adapter { kind, magnitude: None, bias: None })
    };
    let chosen = shapes().into_iter().filter(|(path, shape)| path.contains(part) && shape.len() > 1);
    AdapterFile { modules: (0..).zip(chosen).map(layer).collect(), ..AdapterFile::default() }
}

fn write(path: &Path, changes: &AdapterFile) {
    let base = Base::open(registry::BUILT_IN, &BaseOptions::default()).unwrap();
    file::write_adapters(path, changes, Format::Kohya, &base.block_layout).unwrap();
}

fn draw(folder: &Path, more: &[&str]) -> Vec<u8> {
    let image = folder.join("image.png");
    let arguments = ["gen", "--prompt", "a photo of a person", "--steps", "2", "--out", text(&image)];
    ok(&[&arguments, more].concat());
    difflora::image::Image::open(&image).unwrap().rgb
}

fn distance(a: &[u8], b: &[u8]) -> u8 {
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn every_part_of_the_model_takes_a_lora_in_both_modes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let plain = draw(folder.path(), &[]);
    for (name, part) in [("te", "text_encoder"), ("conv", "conv1"), ("attention", "attn")] {
        let path = at(name);
        write(&path, &low_rank(part, 2));
        let merged = draw(folder.path(), &["--lora", text(&path)]);
        let beside = draw(folder.path(), &["--lora", text(&path), "--lora-mode", "runtime"]);
        assert!(distance(&plain, &merged) > 5, "{name}: {}", distance(&plain, &merged));
        assert!(distance(&merged, &beside) <= 1, "{name}: {}", distance(&merged, &beside));
    }
    // A norm with DoRA beside it cannot stand beside a weight: it is merged in both modes.
    let mut strange = low_rank("attn1.to_q", 2);
    for (path, change) in &mut strange.modules {
        let out = shapes()[path][0];
        let values = (Tensor::ones((out, 1), DType::F32, &Device::Cpu).unwrap() * 0.5).unwrap();
        change.magnitude = Some(Magnitude { values, on_input: false });
    }
    let norm = shapes()["conv_norm_out"].clone();
    let kind = AdapterKind::Full(small(5, &norm));
    strange.modules.insert(
        "conv_norm_out".into(),
        Adapter { kind, magnitude: None, bias: Some(BiasChange::Added(small(6, &norm))) },
    );
    write(&at("strange"), &strange);
    let merged = draw(folder.path(), &["--lora", text(&at("strange"))]);
    let beside = draw(folder.path(), &["--lora", text(&at("strange")), "--lora-mode", "runtime"]);
    assert!(distance(&plain, &merged) > 5 && distance(&merged, &beside) == 0);

    // Weights by part, and the order of files.
    let (te, conv) = (at("te"), at("conv"));
    let none = draw(folder.path(), &["--lora", &format!("{}:te=0", text(&te))]);
    assert_eq!(distance(&plain, &none), 0);
    let one = draw(folder.path(), &["--lora", text(&te), &format!("{}:unet=0.5,down.0=0", text(&conv))]);
    let two = draw(folder.path(), &["--lora", &format!("{}:down.0=0,unet=0.5", text(&conv)), text(&te)]);
    assert_eq!(distance(&one, &two), 0);
    assert!(distance(&one, &plain) > 5);
    let both = draw(folder.path(), &["--lora", text(&conv), "--lora-mode", "runtime"]);
    let positive =
        draw(folder.path(), &["--lora", text(&conv), "--lora-mode", "runtime", "--lora-positive-only"]);
    assert!(distance(&both, &positive) > 1 && distance(&plain, &positive) > 1);
}

#[test]
fn files_are_converted_without_loss_and_inspected_by_their_header() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut changes = low_rank("attn2", 4);
    changes.modules.extend(low_rank("text_encoder_2", 2).modules);
    changes.metadata.insert("modelspec.trigger_phrase".into(), "sks person".into());
    changes.metadata.insert("ss_tag_frequency".into(), "{\"é\": 1}\n".into());
    write(&at("one"), &changes);
    let (one, two, three, back) = (at("one"), at("two"), at("three"), at("back"));
    let convert = |from: &Path, to: &Path, format: &str| {
        ok(&["lora", "convert", text(from), text(to), "--format", format, "--base", "tiny"]);
    };
    convert(&one, &two, "peft");
    convert(&two, &three, "kohya-diffusers");
    // Alpha is twice the rank, and doubling is exact; the way back has it in `up`.
    convert(&one, &back, "kohya-diffusers");
    convert(&back, &at("again"), "kohya");
    assert!(fs::read(&one).unwrap() == fs::read(at("again")).unwrap());

    let told = json(&["lora", "inspect", text(&one), "--base", "tiny"]);
    let (unet, te2) = (low_rank("attn2", 4).modules.len(), low_rank("text_encoder_2", 2).modules.len());
    assert_eq!(told["kinds"]["LoRA"], unet + te2);
    assert_eq!((&told["ranks"]["4"], &told["ranks"]["2"]), (&unet.into(), &te2.into()));
    assert_eq!((&told["alphas"]["8"], &told["alphas"]["4"]), (&unet.into(), &te2.into()));
    assert_eq!((&told["parts"]["unet"], &told["parts"]["text_encoder_2"]), (&unet.into(), &te2.into()));
    assert_eq!(told["metadata"]["ss_tag_frequency"], "{\"é\": 1}\n");
    assert_eq!(told["metadata"]["modelspec.trigger_phrase"], "sks person");
    assert_eq!(told["unmatched"], Value::Array(vec![]));
    let shown = ok(&["lora", "inspect", text(&two), "--base", "tiny"]).stdout;
    assert!(shown.contains("tell no alpha") && shown.contains("sks person"), "{shown}");

    let compared = json(&["lora", "diff", text(&one), text(&three), "--base", "tiny"]);
    let together = &compared["together"];
    assert!((together["cosine"].as_f64().unwrap() - 1.0).abs() < 1e-9);
    assert!(together["distance"].as_f64().unwrap() < 1e-6);
}

#[test]
fn what_is_merged_into_a_base_draws_the_same_and_is_extracted_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut changes = low_rank("attn1", 2);
    changes.modules.extend(low_rank("text_encoder.", 2).modules);
    write(&at("lora"), &changes);
    let (lora, model) = (at("lora"), at("model"));
    let merged = json(&[
        "lora",
        "merge",
        "--base",
        "tiny",
        "--lora",
        &format!("{}:0.7", text(&lora)),
        "--out",
        text(&model),
    ]);
    assert_eq!(merged["modules"], changes.modules.len());
    let one = draw(folder.path(), &["--lora", &format!("{}:0.7", text(&lora))]);
    let two = draw(folder.path(), &["--base", text(&model)]);
    // The folder keeps the base's 16 bits, `gen` adds in 32.
    assert!(distance(&one, &two) <= 1, "{}", distance(&one, &two));

    let found = at("found");
    let kept = json(&["lora", "extract", "tiny", text(&model), "--out", text(&found), "--rank", "2"]);
    assert_eq!(kept["modules"], changes.modules.len());
    // The base is stored in 16 bits, so that what is found is rounded.
    let compared = json(&["lora", "diff", text(&lora), text(&found), "--base", "tiny"]);
    let together = &compared["together"];
    assert!(together["cosine"].as_f64().unwrap() > 0.99, "{together}");
    assert!((together["norm_ratio"].as_f64().unwrap() - 0.7).abs() < 0.02, "{together}");

    let again = difflora(&["lora", "merge", "--base", "tiny", "--lora", text(&lora), "--out", text(&model)]);
    assert!(again.code == 2 && again.stderr.contains("exists already"), "{}", again.stderr);
    let same = difflora(&["lora", "extract", "tiny", "tiny", "--out", text(&found)]);
    assert!(same.code == 4 && same.stderr.contains("nothing to extract"), "{}", same.stderr);
}

#[test]
fn files_are_added_averaged_shortened_and_disturbed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (one, two) = (at("one"), at("two"));
    write(&one, &low_rank("attn1", 3));
    write(&two, &low_rank("attn1", 5));
    let out = at("out");
    let tool = |arguments: &[&str]| json(&[&["lora"], arguments, &["--base", "tiny"]].concat());
    // `merge --base` puts LoRAs into a model, so files are added in diffusers' spelling of SDXL's own layout.
    let spelled = |path: &Path| {
        let to = path.with_extension("d");
        ok(&["lora", "convert", text(path), text(&to), "--format", "kohya-diffusers", "--base", "tiny"]);
        to
    };
    let (a, b) = (spelled(&one), spelled(&two));
    let added = json(&[
        "lora",
        "merge",
        "--lora",
        text(&a),
        &format!("{}:-1", text(&b)),
        "--out",
        text(&out),
        "--format",
        "kohya-diffusers",
    ]);
    let modules = low_rank("attn1", 1).modules.len();
    assert_eq!(added["ranks"]["8"], modules);
    let first = fs::read(&out).unwrap();
    json(&[
        "lora",
        "merge",
        "--lora",
        text(&a),
        &format!("{}:-1", text(&b)),
        "--out",
        text(&out),
        "--format",
        "kohya-diffusers",
    ]);
    assert!(first == fs::read(&out).unwrap(), "the same command writes the same bytes");

    let mean = tool(&["mix", "--lora", text(&one), text(&one), "--out", text(&out), "--rank", "3"]);
    assert!(mean["kept_least"].as_f64().unwrap() > 0.999_999, "{mean}");
    let same = tool(&["diff", text(&one), text(&out)]);
    assert!(same["together"]["distance"].as_f64().unwrap() < 1e-4, "{same}");
    let short = tool(&["resize", text(&two), text(&out), "--rank", "1"]);
    assert_eq!(short["ranks"]["1"], modules);
    let share = tool(&["resize", text(&two), text(&out), "--keep", "0.9"]);
    assert!(share["kept_least"].as_f64().unwrap() >= 0.9, "{share}");
    let count =
        tool(&["perturb", text(&two), text(&out), "--which", "smallest"])["replaced"].as_u64().unwrap();
    assert!(count > 0);
    let near = tool(&["diff", text(&two), text(&out)])["together"]["distance"].as_f64().unwrap();
    tool(&["perturb", text(&two), text(&out), "--which", "largest"]);
    let far = tool(&["diff", text(&two), text(&out)])["together"]["distance"].as_f64().unwrap();
    assert!(near < 0.2 && far > 0.5, "{near} {far}");

    for (arguments, said) in [
        (vec!["resize", text(&two), text(&out)], "how short"),
        (vec!["resize", text(&two), text(&out), "--keep", "1.5"], "at most 1"),
        (vec!["resize", text(&two), text(&out), "--keep", "0.5", "--rank", "2"], "cannot be used with"),
        (
            vec!["mix", "--lora", text(&one), &format!("{}:-1", text(&two)), "--out", text(&out)],
            "add up to zero",
        ),
        (
            vec!["mix", "--lora", &format!("{}:vae=1", text(&one)), text(&two), "--out", text(&out)],
            "no part of a model",
        ),
        (vec!["perturb", text(&two), text(&out), "--share", "0"], "above 0"),
    ] {
        let run = difflora(&[&["lora"], &arguments[..], &["--base", "tiny"]].concat());
        assert!(run.code == 2 && run.stderr.contains(said), "{arguments:?}: {} {}", run.code, run.stderr);
    }
}

#[test]
fn unusable_files_end_with_4_and_say_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("good"), &low_rank("attn2.to_k", 2));
    let good = fs::read(at("good")).unwrap();
    fs::write(at("cut"), &good[..good.len() - 1]).unwrap();
    fs::write(at("empty"), "").unwrap();
    fs::write(at("zip"), b"PK\x03\x04\x14\x00\x00\x00\x08\x00").unwrap();
    fs::create_dir(at("folder")).unwrap();
    let strange = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
    let save = |name: &str, key: &str| {
        let tensors = std::collections::HashMap::from([(key.to_string(), strange.clone())]);
        candle_core::safetensors::save(&tensors, at(name)).unwrap();
    };
    save("flux", "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight");
    save("half", "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight");
    // Another base: SD 1.5 listens to 768 numbers a word.
    let mut foreign = low_rank("attn2.to_k", 2);
    for change in foreign.modules.values_mut() {
        let AdapterKind::LowRank { down, .. } = &mut change.kind else { panic!() };
        *down = small(3, &[2, 768]);
    }
    write(&at("foreign"), &foreign);
    for (name, said) in [
        ("missing", "No such file"),
        ("cut", "the file holds"),
        ("empty", "is empty"),
        ("zip", "zip archive"),
        ("folder", "the folder holds no .safetensors file"),
        ("flux", "LoRA for Flux"),
        ("half", "lacks its `down`"),
        ("foreign", "SD 1.5: 768-wide"),
    ] {
        let path = at(name);
        let out = at("never.png");
        let run = difflora(&["gen", "--prompt", "x", "--lora", text(&path), "--out", text(&out)]);
        assert!(run.code == 4 && run.stderr.contains(said), "{name}: {} {}", run.code, run.stderr);
        assert!(run.stderr.contains(name) && !run.stderr.contains("panicked"), "{}", run.stderr);
        assert!(!out.exists());
        if !["half", "foreign"].contains(&name) {
            let run = difflora(&["lora", "inspect", text(&path)]);
            assert!(run.code == 4 && run.stderr.contains(said), "{name}: {} {}", run.code, run.stderr);
        }
    }
    let run = difflora(&["gen", "--prompt", "x", "--lora", text(&at("good")), "--lora-positive-only"]);
    assert!(run.code == 2 && run.stderr.contains("--lora-mode runtime"), "{}", run.stderr);
}

/// The model that lies in the golden files twice: as a folder, and as one file.
fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/single_file").join(name)
}

/// All tensors of UNet and text encoders, as a folder names them.
fn tensors(model: &Path) -> BTreeMap<String, Tensor> {
    let files = if model.is_file() {
        difflora::sdxl::single_file::open(model, Some(&golden("folder"))).unwrap()
    } else {
        ModelFiles::folder(model).unwrap()
    };
    let mut all = BTreeMap::new();
    for (part, stem) in [
        ("unet", DIFFUSERS_WEIGHTS),
        ("text_encoder", TRANSFORMERS_WEIGHTS),
        ("text_encoder_2", TRANSFORMERS_WEIGHTS),
    ] {
        for (name, tensor) in files.tensors(part, stem).unwrap() {
            let name = name.trim_start_matches("text_model.");
            all.insert(format!("{part}/{name}"), tensor);
        }
    }
    all
}

fn far(a: &Tensor, b: &Tensor) -> f32 {
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
    (wide(a) - wide(b)).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// A LoRA on a layer of every sort: of the UNet, of both text encoders, a convolution, a norm, with biases.
fn on_every_sort(weights: &BTreeMap<String, Tensor>) -> AdapterFile {
    let bias = |name: &str| small(900, weights[name].dims());
    let mut modules = BTreeMap::new();
    for (stream, (name, module)) in (0..).zip([
        (
            "unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("unet/down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv1"),
        ("text_encoder/encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        (
            "text_encoder_2/encoder.layers.0.self_attn.k_proj",
            "text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj",
        ),
        ("text_encoder_2/text_projection", "text_encoder_2.text_projection"),
    ]) {
        let shape = weights[&format!("{name}.weight")].dims();
        let (mut down, mut up) = (shape.to_vec(), vec![shape[0], 2]);
        down[0] = 2;
        up.resize(shape.len(), 1);
        let kind = AdapterKind::LowRank {
            down: small(2 * stream, &down),
            up: small(2 * stream + 1, &up),
            mid: None,
            alpha: 8.0,
        };
        let bias = (stream == 3).then(|| BiasChange::Added(bias(&format!("{name}.bias"))));
        modules.insert(module.to_string(), Adapter { kind, magnitude: None, bias });
    }
    let kind = AdapterKind::Full(small(800, weights["unet/conv_norm_out.weight"].dims()));
    let norm =
        Adapter { kind, magnitude: None, bias: Some(BiasChange::Added(bias("unet/conv_norm_out.bias"))) };
    modules.insert("conv_norm_out".into(), norm);
    modules.insert(
        "conv_out".into(),
        Adapter {
            kind: AdapterKind::BiasOnly,
            magnitude: None,
            bias: Some(BiasChange::Added(bias("unet/conv_out.bias"))),
        },
    );
    AdapterFile { modules, ..AdapterFile::default() }
}

#[test]
fn one_file_and_a_folder_are_merged_alike_and_compared_with_each_other() {
    let temporary = tempfile::tempdir().unwrap();
    let at = |name: &str| temporary.path().join(name);
    let (one, folder) = (golden("one.safetensors"), golden("folder"));
    let (one, folder) = (text(&one), text(&folder));
    let before = tensors(Path::new(folder));
    let changes = on_every_sort(&before);
    let layout = Base::open(folder, &BaseOptions::default()).unwrap().block_layout;
    let lora = at("lora.safetensors");
    file::write_adapters(&lora, &changes, Format::Kohya, &layout).unwrap();

    let (file_out, folder_out) = (at("merged.safetensors"), at("merged"));
    let weighted = format!("{}:0.5", text(&lora));
    let lora_merge = |base: &str, out: &Path, lora: &str| {
        json(&["lora", "merge", "--base", base, "--base-config", folder, "--lora", lora, "--out", text(out)])
    };
    let told = lora_merge(one, &file_out, &weighted);
    assert_eq!(
        (&told["modules"], &told["loras"][0]["weight"]),
        (&changes.modules.len().into(), &"0.5".into())
    );
    assert_eq!(lora_merge(folder, &folder_out, &weighted)["modules"], changes.modules.len());
    let (a, b) = (tensors(&file_out), tensors(&folder_out));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let mut touched = 0;
    for (name, a) in &a {
        assert_eq!((a.dtype(), far(a, &b[name])), (before[name].dtype(), 0.0), "{name}");
        touched += usize::from(far(a, &before[name]) > 0.0);
    }
    // Five weights and a norm's, and three biases.
    assert_eq!(touched, 9);
    let module = "text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj";
    let original = &before["text_encoder_2/encoder.layers.0.self_attn.k_proj.weight"];
    let by_hand = changes.modules[module].delta(original, 0.5).unwrap();
    let by_hand =
        (original.to_dtype(DType::F32).unwrap() + by_hand).unwrap().to_dtype(original.dtype()).unwrap();
    assert_eq!(far(&by_hand, &a["text_encoder_2/encoder.layers.0.self_attn.k_proj.weight"]), 0.0);
    let header = difflora::weights::header::Header::read(&mut fs::File::open(&file_out).unwrap()).unwrap();
    assert_eq!(header.metadata["difflora.merged"], "lora.safetensors:0.5");
    assert_eq!(header.metadata["format"], "pt");

    // A file beside a folder: everything comes back, biases and norms too.
    let found = at("found.safetensors");
    let extract = |after: &Path, more: &[&str]| {
        let arguments = [
            "lora",
            "extract",
            one,
            text(after),
            "--base-config",
            folder,
            "--out",
            text(&found),
            "--rank",
            "64",
        ];
        json(&[&arguments, more].concat())
    };
    let told = extract(&folder_out, &[]);
    assert_eq!(
        (&told["modules"], &told["biases_and_norms"]),
        (&changes.modules.len().into(), &3.into()),
        "{told}"
    );
    assert_eq!(told["left_out"], Value::Array(vec![]));
    lora_merge(one, &at("again.safetensors"), text(&found));
    for (name, again) in tensors(&at("again.safetensors")) {
        // What is left of the difference after the SVD may round to the other side: one step of bf16 at most.
        let step = 0.008
            * before[&name]
                .to_dtype(DType::F32)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
        assert!(far(&again, &a[&name]) <= step, "{name}: {}", far(&again, &a[&name]));
    }
    let told = extract(&file_out, &["--layers-only"]);
    assert_eq!((&told["modules"], &told["biases_and_norms"]), (&5.into(), &0.into()), "{told}");
    let left_out = told["left_out"].as_array().unwrap();
    assert_eq!(left_out.len(), 4);
    assert!(left_out.contains(&"unet/conv_norm_out.weight".into()), "{left_out:?}");

    // An embedding is no layer: it is named.
    let path = folder_out.join("text_encoder/model.safetensors");
    let mut weights: std::collections::HashMap<String, Tensor> = difflora::weights::read_file(&path).unwrap();
    let name = weights.keys().find(|name| name.ends_with("token_embedding.weight")).unwrap().clone();
    let changed = (&weights[&name] * 2.0).unwrap();
    weights.insert(name.clone(), changed);
    candle_core::safetensors::save(&weights, &path).unwrap();
    let told = extract(&folder_out, &[]);
    // As the model before spells it, which is the file with `text_model.` in its names.
    let bare = name.trim_start_matches("text_model.");
    assert_eq!(told["left_out"], Value::Array(vec![format!("text_encoder/text_model.{bare}").into()]));

    // A bias that the base has no place for, and results of the wrong sort.
    let mut strange = changes.clone();
    let module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";
    strange.modules.get_mut(module).unwrap().bias = Some(BiasChange::Added(small(7, &[8])));
    file::write_adapters(&at("strange"), &strange, Format::Kohya, &layout).unwrap();
    for (base, lora, out, code, said) in [
        (one, "strange", "new.safetensors", 4, "has none to add it to"),
        (folder, "strange", "new", 4, "has none to add it to"),
        (one, "lora.safetensors", "new", 2, "the base is one file"),
        (folder, "lora.safetensors", "new.safetensors", 2, "the base is a folder"),
        (folder, "lora.safetensors", "merged", 2, "exists already"),
    ] {
        let (lora, out) = (at(lora), at(out));
        let arguments = [
            "lora",
            "merge",
            "--base",
            base,
            "--base-config",
            folder,
            "--lora",
            text(&lora),
            "--out",
            text(&out),
        ];
        let run = difflora(&arguments);
        assert!(run.code == code && run.stderr.contains(said), "{said}: {} {}", run.code, run.stderr);
        assert!(out.ends_with("merged") || !out.exists());
    }
}

#[test]
fn gen_tells_what_each_lora_is_and_records_where_its_own_comes_from() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut changes = low_rank("attn2", 4);
    changes.modules.extend(low_rank("text_encoder_2", 2).modules);
    // A module that this base does not have.
    let stray = changes.modules.first_key_value().unwrap().1.clone();
    changes.modules.insert("up_blocks.0.attentions.0.transformer_blocks.9.attn2.to_q".into(), stray);
    write(&at("anna.safetensors"), &changes);
    let (anna, image, own) = (at("anna.safetensors"), at("image.png"), at("own.safetensors"));
    let photo = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/astronaut.png");
    let arguments = [
        "gen",
        "--ref",
        photo,
        "--prompt",
        "x",
        "--steps",
        "1",
        "--lora",
        &format!("{}:0.5", text(&anna)),
        "--out",
        text(&image),
        "--lora-out",
        text(&own),
        "--json",
    ];
    let run = ok(&arguments);
    let told: Value = serde_json::from_str(&run.stdout).unwrap();
    let (mine, theirs) = (&told["loras"][0], &told["loras"][1]);
    assert_eq!((&mine["name"], &mine["kinds"]["LoRA"]), (&"own".into(), &told["person"]["modules"]));
    assert_eq!((&theirs["name"], &theirs["weight"]), (&"anna".into(), &0.5.into()));
    assert_eq!(theirs["kinds"]["LoRA"], changes.modules.len());
    assert_eq!(
        (&theirs["alphas"]["8"], &theirs["unmatched"]),
        (&theirs["ranks"]["4"], &Value::Array(vec![]))
    );
    assert_eq!(theirs["without_place"].as_array().unwrap().len(), 1);
    let line = run.stderr.lines().find(|line| line.starts_with("note: LoRA `anna`")).unwrap();
    assert!(line.contains("LoRA, rank 2 (×") && line.contains("alpha") && line.contains("unet"), "{line}");
    assert!(run.stderr.contains("1 of") && run.stderr.contains("transformer_blocks.9"), "{}", run.stderr);
    let quiet = ok(&[&arguments[..], &["--quiet"]].concat());
    assert!(!quiet.stderr.contains("note: LoRA"), "{}", quiet.stderr);

    let header = difflora::weights::header::Header::read(&mut fs::File::open(&own).unwrap()).unwrap();
    let mut files = Vec::new();
    for file in ["config.json", "lae.safetensors", "dit.safetensors", "stats.safetensors"] {
        files.extend(registry::built_in("hypernet").unwrap().read(file).unwrap().iter());
    }
    assert_eq!(header.metadata["difflora.hypernet_sha256"], difflora::weights::sha256::of_bytes(&files));
    assert_eq!(
        header.metadata["difflora.reference_sha256"],
        difflora::weights::sha256::of_file(Path::new(photo)).unwrap()
    );
    assert_eq!(header.metadata["modelspec.resolution"], "128x128");
    for key in ["hypernet", "base_sha256", "face_encoder", "face_encoder_sha256", "identity_seed", "version"]
    {
        assert!(!header.metadata[&format!("difflora.{key}")].is_empty(), "{key}");
    }
}
