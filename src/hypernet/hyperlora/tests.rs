//! Against numbers of the official code in f64, and against PyTorch (`scripts/golden_hyperlora.py`).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::json;

use super::*;
use crate::weights;

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Apart by at most `most` of the largest number, or of 1.
fn assert_near(found: &[f32], wanted: &[f32], most: f32, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let largest = wanted.iter().fold(1f32, |largest, x| largest.max(x.abs()));
    for (i, (a, b)) in found.iter().zip(wanted).enumerate() {
        assert!((a - b).abs() <= most * largest, "{what} [{i}]: {a}, wanted {b}, the largest is {largest}");
    }
}

/// The names of `modules` attention modules and their sizes: width of queries, of keys' input in attn2.
fn listed(modules: &[(usize, Option<usize>)]) -> serde_json::Value {
    let entry = |(i, (width, context)): (usize, &(usize, Option<usize>))| {
        let attn = if context.is_some() { 2 } else { 1 };
        let name = format!("lora_unet_mid_block_attentions_{i}_transformer_blocks_0_attn{attn}");
        (name, json!({ "hidden_size": width, "cross_attention_dim": context }))
    };
    modules.iter().enumerate().map(entry).collect::<serde_json::Map<_, _>>().into()
}

/// `0.5·sin(0.7·j + h)` with h the sum of the name's bytes; norms have 1 added to their weight.
fn fill(name: &str, shape: &[usize], is_norm: bool) -> Tensor {
    let h = name.bytes().map(f64::from).sum::<f64>();
    let one = f64::from(is_norm && name.ends_with(".weight"));
    let count: usize = shape.iter().product();
    let numbers: Vec<f32> = (0..count).map(|j| (0.5 * (0.7 * j as f64 + h).sin() + one) as f32).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

/// A folder of the sizes and numbers for which the official code's results are known.
fn official(folder: &Path) -> ModelFiles {
    const MODULES: [(usize, Option<usize>); 4] = [(16, None), (16, Some(20)), (24, None), (24, Some(20))];
    const D: usize = 32;
    let mut resampler: Vec<(String, Vec<usize>)> = vec![("latents".into(), vec![1, 32, D])];
    for (name, out, input) in [("proj_in", D, 24), ("proj_in_2", D, 24), ("proj_out", 6, D)] {
        resampler.extend([(format!("{name}.weight"), vec![out, input]), (format!("{name}.bias"), vec![out])]);
    }
    for layer in 0..2 {
        for norm in ["norm_attn1", "norm_attn2_l", "norm_attn2_x", "norm_attn3_l", "norm_attn3_y", "norm_ff"]
        {
            resampler.extend(["weight", "bias"].map(|it| (format!("layers.{layer}.{norm}.{it}"), vec![D])));
        }
        for attn in ["attn1", "attn2", "attn3"] {
            for to in ["to_q", "to_k", "to_v"] {
                resampler.push((format!("layers.{layer}.{attn}.{to}.weight"), vec![24, D]));
            }
            resampler.push((format!("layers.{layer}.{attn}.to_out.0.weight"), vec![D, 24]));
        }
        for (name, out, input) in [("ff.net.0.proj", 2 * D, D), ("ff.net.2", D, 2 * D)] {
            let name = format!("layers.{layer}.{name}");
            resampler
                .extend([(format!("{name}.weight"), vec![out, input]), (format!("{name}.bias"), vec![out])]);
        }
    }
    let projector =
        [("0.weight", vec![72, 10]), ("0.bias", vec![72]), ("2.weight", vec![24]), ("2.bias", vec![24])];
    let mut bases = Vec::new();
    for (i, (width, context)) in MODULES.iter().enumerate() {
        for to in ["to_q", "to_k", "to_v", "to_out"] {
            let input = if to == "to_k" || to == "to_v" { context.unwrap_or(*width) } else { *width };
            bases.push((format!("{i}.{to}.id_down_basis"), vec![6, input, 4]));
            bases.push((format!("{i}.{to}.id_up_basis"), vec![6, 4, *width]));
        }
    }
    let save = |stem: &str, tensors: HashMap<String, Tensor>| {
        candle_core::safetensors::save(&tensors, folder.join(format!("{stem}.safetensors"))).unwrap();
    };
    let projector =
        projector.iter().map(|(name, shape)| (name.to_string(), fill(name, shape, name.starts_with('2'))));
    save("id_projector", projector.collect());
    let filled = |(name, shape): (String, Vec<usize>)| {
        let tensor = fill(&name, &shape, name.contains("norm"));
        (name, tensor)
    };
    save("resampler", resampler.into_iter().map(filled).collect());
    save("hyper_lora_modules", bases.into_iter().map(filled).collect());
    std::fs::write(folder.join(FILES[0]), listed(&MODULES).to_string()).unwrap();
    ModelFiles::folder(folder).unwrap()
}

fn person(photos: Vec<Conditions>, weight: f64) -> (Vec<Conditions>, f64) {
    (photos, weight)
}

fn open(files: &ModelFiles) -> HyperLora {
    Shapes::with_heads_of(8, files).unwrap().load(files, &Device::Cpu).unwrap()
}

fn official_photo(i: usize) -> Conditions {
    let face: Vec<f64> = (0..10).map(|k| (0.3 * k as f64 + i as f64).cos()).collect();
    let length = face.iter().map(|x| x * x).sum::<f64>().sqrt();
    let clip =
        (0..7 * 24).map(|at| (0.11 * (at % 24) as f64 + 0.5 * (at / 24) as f64 + i as f64).sin() as f32);
    Conditions {
        face: face.into_iter().map(|x| (x / length) as f32).collect(),
        clip: Tensor::from_iter(clip, &Device::Cpu).unwrap().reshape((7, 24)).unwrap(),
    }
}

/// The official code's numbers; what tells mistakes apart is larger: an ε of 1e-6 2e-5, the mean after normalising 1e-4.
const NEAR: f32 = 5e-6;

#[test]
fn the_official_code_s_numbers_come_out() {
    let folder = tempfile::tempdir().unwrap();
    let files = official(folder.path());
    let network = open(&files);
    let e = Tensor::cat(
        &[0, 1].map(|i| Tensor::from_vec(official_photo(i).face, (1, 10), &Device::Cpu).unwrap()),
        0,
    );
    let x = network.id_projector.forward(&e.unwrap()).unwrap();
    let x = x.to_vec3::<f32>().unwrap();
    assert_near(&x[0][0][..3], &[2.520_394_9, 1.384_731_3, 0.049_829_553], NEAR, "x[0, 0]");
    assert_near(&x[1][2][22..], &[-0.088_179_68, 0.497_647_04], NEAR, "x[1, 2]");
    let tokens = network.coefficients(&[person(vec![official_photo(0), official_photo(1)], 1.0)]).unwrap();
    let rows = tokens.to_vec2::<f32>().unwrap();
    for (row, wanted) in [
        (0, [-0.637_723_7, 0.407_114_98, -0.205_435_38, -0.054_633_51, 0.364_221_16, -0.499_720_24]),
        (13, [-0.392_341_58, 0.126_414_64, 0.117_720_93, -0.353_336_88, 0.556_685_4, -0.617_643_6]),
        (31, [-0.417_928_86, 0.173_325_87, 0.083_317_96, -0.330_448_63, 0.533_180_5, -0.628_39]),
    ] {
        assert_near(&rows[row], &wanted, NEAR, "token");
    }
    let sum =
        |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    assert!((sum(&tokens) + 18.544_650_249).abs() < 1e-4);
    assert!((sum(&tokens.abs().unwrap()) - 69.023_701_121).abs() < 1e-4);
    let alone =
        network.coefficients(&[person(vec![official_photo(0)], 1.0)]).unwrap().to_vec2::<f32>().unwrap();
    let wanted = [-0.638_023, 0.407_243_47, -0.205_832_63, -0.054_150_64, 0.364_013_05, -0.499_274_03];
    assert_near(&alone[0], &wanted, NEAR, "photo 0 alone");

    let lora = network.lora(&tokens).unwrap();
    let path = |i: usize, attn: usize, to: &str| {
        format!("mid_block.attentions.{i}.transformer_blocks.0.attn{attn}.{to}")
    };
    for (path, wanted) in [
        (path(0, 1, "to_q"), [0.199_965_84, 0.203_218_18, 0.208_342_99, 0.032_387_724, 0.502_815_2]),
        (path(1, 2, "to_k"), [-0.018_895_88, -0.018_611_484, -0.013_866_39, 0.004_680_873, 0.057_656_134]),
        (path(3, 2, "to_out.0"), [-0.471_961_73, -0.472_431_96, -0.399_224_46, 0.031_185_463, 0.831_137_4]),
    ] {
        let layer = &lora.layers[&path];
        let (down, up) = (layer.down.to_vec2::<f32>().unwrap(), layer.up.to_vec2::<f32>().unwrap());
        let delta = layer.delta().unwrap();
        let norm = sum(&delta.sqr().unwrap()).sqrt() as f32;
        let found = [down[0][0], down[1][2], up[0][1], delta.to_vec2::<f32>().unwrap()[0][0], norm];
        assert_near(&found, &wanted, NEAR, &path);
    }
}

fn golden(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(file)
}

#[test]
fn every_layer_is_pytorch_s() {
    let files = ModelFiles::folder(golden("hyperlora")).unwrap();
    let network = open(&files);
    let wanted = weights::read_file(&golden("hyperlora.safetensors")).unwrap();
    let near = |found: &Tensor, name: &str| assert_near(&values(found), &values(&wanted[name]), 1e-5, name);
    let x = network.id_projector.forward(&wanted["face"]).unwrap();
    near(&x, "x");
    let [x_in, y_in] = network.resampler.tokens(&x, &wanted["clip"]).unwrap();
    let mut z = network.resampler.queries(2).unwrap();
    assert_eq!(network.resampler.layers.len(), 2);
    for (i, layer) in network.resampler.layers.iter().enumerate() {
        z = layer.forward(&z, &x_in, &y_in).unwrap();
        near(&z, &format!("z{i}"));
    }
    near(&network.resampler.forward(&x, &wanted["clip"]).unwrap(), "out");

    let photo = |i: usize| Conditions {
        face: values(&wanted["face"].get(i).unwrap()),
        clip: wanted["clip"].get(i).unwrap(),
    };
    let mean = network.coefficients(&[person(vec![photo(0), photo(1)], 1.0)]).unwrap();
    near(&mean, "mean");
    near(
        &network.coefficients(&[person(vec![photo(0)], 0.3), person(vec![photo(1)], 0.7)]).unwrap(),
        "mixed",
    );
    let lora = network.lora(&mean).unwrap();
    let deltas = wanted.keys().filter(|name| name.ends_with(".delta")).count();
    assert_eq!((lora.layers.len(), deltas), (16, 16));
    for (path, layer) in &lora.layers {
        let name = keys_of(path);
        near(&layer.down, &format!("{name}.down"));
        near(&layer.up, &format!("{name}.up"));
        near(&layer.delta().unwrap(), &format!("{name}.delta"));
    }
}

/// `mid_block.….attn1.to_out.0` → `lora_unet_mid_block_…_attn1.to_out`.
fn keys_of(path: &str) -> String {
    let (module, projection) = path.trim_end_matches(".0").rsplit_once('.').unwrap();
    format!("lora_unet_{}.{projection}", module.replace('.', "_"))
}

#[test]
fn what_does_not_fit_is_refused_with_file_and_sizes() {
    let folder = tempfile::tempdir().unwrap();
    official(folder.path());
    let message = || {
        let files = ModelFiles::folder(folder.path()).unwrap();
        Shapes::with_heads_of(8, &files).err().map(|error| format!("{error:#}")).unwrap_or_default()
    };
    assert_eq!(message(), "");
    let list = folder.path().join(FILES[0]);
    let write = |modules: &serde_json::Value| std::fs::write(&list, modules.to_string()).unwrap();
    write(&listed(&[(24, None), (16, Some(20)), (16, None), (24, Some(20))]));
    assert!(message().contains("`0.to_q.id_down_basis` has shape [6, 16, 4]"), "{}", message());
    assert!(message().contains("wants [6, 24, 4]"), "{}", message());
    write(&listed(&[(16, None), (16, Some(20)), (24, None)]));
    assert!(message().contains("32 tensors, the 3 modules"), "{}", message());
    write(&json!({ "lora_unet": { "hidden_size": 16, "cross_attention_dim": null } }));
    assert!(message().contains("`lora_unet` is no attention module"), "{}", message());
    std::fs::write(&list, r#"{"a": {"hidden_size": 1}, "a": {"hidden_size": 1}}"#).unwrap();
    assert!(message().contains("`a` occurs twice"), "{}", message());
    std::fs::remove_file(&list).unwrap();
    assert!(message().contains(FILES[0]), "{}", message());

    official(folder.path());
    let projector = folder.path().join("id_projector.safetensors");
    let narrow = BTreeMap::from([
        ("0.weight", Tensor::zeros((32, 10), DType::F32, &Device::Cpu).unwrap()),
        ("2.weight", Tensor::zeros(16, DType::F32, &Device::Cpu).unwrap()),
    ]);
    std::fs::write(&projector, safetensors::serialize(narrow, None).unwrap()).unwrap();
    assert!(message().contains("tokens of 16, the resampler wants tokens of 24"), "{}", message());
    std::fs::write(&projector, [0; 100]).unwrap();
    assert!(message().contains("id_projector.safetensors"), "{}", message());

    let files = official(folder.path());
    let message = format!("{:#}", Shapes::read(&files).err().unwrap());
    assert!(message.contains("24 does not part into heads of 64"), "{message}");
    let network = open(&files);
    let wide = Conditions { face: vec![0.1; 12], ..official_photo(0) };
    let message = format!("{:#}", network.coefficients(&[person(vec![wide], 1.0)]).unwrap_err());
    assert!(message.contains("12 numbers, wanted 10"), "{message}");
}

#[test]
fn the_released_sizes_give_sdxl_s_560_layers() {
    // The list of modules without weights, as the publisher's file has it but for its order, which is not known.
    let places = [
        ("down_blocks_1", 2, 2, 640),
        ("down_blocks_2", 2, 10, 1280),
        ("up_blocks_0", 3, 10, 1280),
        ("up_blocks_1", 3, 2, 640),
        ("mid_block", 1, 10, 1280),
    ];
    let mut modules = serde_json::Map::new();
    for (block, attentions, depth, width) in places {
        for (a, t, attn) in
            (0..attentions).flat_map(|a| (0..depth).flat_map(move |t| [1, 2].map(|attn| (a, t, attn))))
        {
            let name = format!("lora_unet_{block}_attentions_{a}_transformer_blocks_{t}_attn{attn}");
            let context = (attn == 2).then_some(2048);
            modules.insert(name, json!({ "hidden_size": width, "cross_attention_dim": context }));
        }
    }
    assert_eq!(modules.len(), 140);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(FILES[0]), serde_json::Value::from(modules).to_string()).unwrap();
    let modules = basis::read_modules(&ModelFiles::folder(folder.path()).unwrap()).unwrap();
    let layers: Vec<_> = modules.iter().flat_map(basis::Module::layers).collect();
    let numbers: usize = layers.iter().map(|(_, out, input)| 8 * (out + input)).sum();
    let paths: std::collections::BTreeSet<&String> = layers.iter().map(|(path, ..)| path).collect();
    assert_eq!((layers.len(), paths.len()), (560, 560));
    // 2 972 712 960 bytes of bases hold 128 matrices a factor.
    assert_eq!(2 * 128 * numbers, 2_972_712_960);
}

#[test]
fn trigger_words_come_first_and_once() {
    let prompt = with_trigger("a man, smiling", TRIGGER);
    assert_eq!(prompt, "fcsks fxhks fhyks, a man, smiling");
    assert_eq!(with_trigger(&prompt, TRIGGER), prompt);
}
