//! VAE, text encoders, image encoder and tokenizer against diffusers and transformers
//! (`scripts/golden_sdxl_parts.py`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use difflora::identity::clip::{ClipPreprocessor, ClipVision, ClipVisionConfig};
use difflora::image::Image;
use difflora::sdxl::text::{ClipTextConfig, ClipTextModel};
use difflora::sdxl::tokenizer::{ClipTokenizer, build_vocabulary};
use difflora::sdxl::vae::{Vae, VaeConfig};
use difflora::weights::model_folder::ModelFiles;
use serde::de::DeserializeOwned;

/// Tensors, config and weights of one golden file; the weights are variables, so that gradients can be compared.
struct Golden {
    tensors: HashMap<String, Tensor>,
    config: serde_json::Value,
    vars: BTreeMap<String, Var>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let bytes = std::fs::read(format!("tests/data/golden/{name}.safetensors")).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let config = serde_json::from_str(&header.metadata().as_ref().unwrap()["config"]).unwrap();
        let tensors = difflora::weights::read_bytes(&bytes).unwrap();
        let vars = tensors
            .iter()
            .filter_map(|(name, value)| {
                Some((name.strip_prefix("weights.")?.to_string(), Var::from_tensor(value).unwrap()))
            })
            .collect();
        Self { tensors, config, vars }
    }

    fn config<T: DeserializeOwned>(&self) -> T {
        let mut config = self.config.clone();
        config.as_object_mut().unwrap().retain(|key, _| !key.starts_with('_'));
        serde_json::from_value(config).unwrap()
    }

    fn builder(&self) -> VarBuilder<'static> {
        let tensors = self.vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        difflora::weights::frozen(tensors, DType::F32, &Device::Cpu)
    }

    /// Compares the outputs, then the gradients of their weighted sum in every weight and in `input`.
    fn check(&self, outputs: &[(&str, &Tensor)], input: Option<&Var>) {
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
        for (name, output) in outputs {
            let error = apart(output, &self.tensors[*name], 0.0);
            println!("{name}: {error:.1e}");
            assert!(error < 1e-5, "{name}: {error:e}");
            let part = (*output * &self.tensors[&format!("weighting.{name}")]).unwrap();
            loss = (loss + part.sum_all().unwrap()).unwrap();
        }
        let grads = loss.backward().unwrap();
        let norms = self.tensors.iter().filter(|(name, _)| name.starts_with("grad")).map(|(_, g)| norm(g));
        // The gradient of a key's bias is zero but for rounding, so small ones are held against the largest.
        let floor = 1e-2 * norms.fold(0.0, f64::max);
        let mut worst = (0.0, "");
        let inputs = input.map(|var| ("grad_x".to_string(), "input", var));
        let weights = self.vars.iter().map(|(name, var)| (format!("grad.{name}"), name.as_str(), var));
        for (key, name, var) in weights.chain(inputs) {
            let expected =
                self.tensors.get(&key).unwrap_or_else(|| panic!("{name} has no gradient in the golden file"));
            let grad = grads.get(var).unwrap_or_else(|| panic!("no gradient reaches {name}"));
            let error = apart(grad, expected, floor);
            // Sums over pixels and tokens that nearly cancel; 9e-6 was measured.
            assert!(error < 3e-5, "gradient of {name}: {error:e}");
            if error > worst.0 {
                worst = (error, name);
            }
        }
        println!("worst gradient: {:.1e} ({})", worst.0, worst.1);
    }
}

fn norm(x: &Tensor) -> f64 {
    f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
}

/// ‖a − b‖ / max(‖b‖, floor).
fn apart(a: &Tensor, b: &Tensor, floor: f64) -> f64 {
    assert_eq!(a.dims(), b.dims());
    norm(&(a - b).unwrap()) / norm(b).max(floor)
}

#[test]
fn the_vae_encodes_and_decodes_as_diffusers_with_the_same_gradients() {
    for name in ["vae", "vae_plain"] {
        let golden = Golden::open(name);
        let vae = Vae::new(&golden.config::<VaeConfig>(), golden.builder()).unwrap();
        let x = Var::from_tensor(&golden.tensors["x"]).unwrap();
        let (mean, logvar) = vae.encode(&x).unwrap();
        let decoded = vae.decode(&mean).unwrap();
        golden.check(&[("mean", &mean), ("logvar", &logvar), ("decoded", &decoded)], Some(&x));
        let back = vae.from_latents(&vae.to_latents(&mean).unwrap()).unwrap();
        assert!(apart(&back, &mean, 0.0) < 1e-6);
    }
}

#[test]
fn a_vae_that_asks_for_other_blocks_is_refused_by_name() {
    let golden = Golden::open("vae");
    let mut config: VaeConfig = golden.config();
    config.down_block_types[1] = "AttnDownEncoderBlock2D".into();
    let error = format!("{:#}", Vae::new(&config, golden.builder()).unwrap_err());
    assert!(error.contains("down_block_types") && error.contains("AttnDownEncoderBlock2D"), "{error}");
    let unknown = serde_json::from_str::<VaeConfig>(r#"{"temporal_compression": 4}"#).unwrap_err();
    assert!(unknown.to_string().contains("temporal_compression"), "{unknown}");
}

#[test]
fn both_kinds_of_text_encoder_agree_with_transformers() {
    for name in ["clip_text", "clip_text_projected"] {
        let golden = Golden::open(name);
        let config: ClipTextConfig = golden.config();
        assert_eq!(config.with_projection(), name == "clip_text_projected");
        let model = ClipTextModel::new(&config, golden.builder()).unwrap();
        let out = model.forward(&golden.tensors["ids"]).unwrap();
        golden
            .check(&[("penultimate", &out.penultimate), ("last", &out.last), ("pooled", &out.pooled)], None);
    }
}

#[test]
fn layers_of_a_text_encoder_carry_the_names_of_their_weights() {
    let golden = Golden::open("clip_text_projected");
    let mut model = ClipTextModel::new(&golden.config(), golden.builder()).unwrap();
    let mut names = Vec::new();
    model.visit_layers(&mut |name, layer| {
        assert_eq!(layer.weight().dims(), golden.vars[&format!("{name}.weight")].dims());
        names.push(name.to_string());
    });
    assert_eq!(names.len(), 3 * 8 + 2);
}

#[test]
fn the_image_encoder_and_its_preprocessing_agree_with_transformers() {
    let golden = Golden::open("clip_vision");
    let (height, width, _) = golden.tensors["picture"].dims3().unwrap();
    let rgb = golden.tensors["picture"].flatten_all().unwrap().to_vec1().unwrap();
    let settings = r#"{"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}"#;
    let settings: ClipPreprocessor = serde_json::from_str(settings).unwrap();
    assert_eq!(settings, ClipPreprocessor::sized(24));
    let pixels = settings.apply(&Image { width, height, rgb }, &Device::Cpu).unwrap();
    let error = apart(&pixels.unsqueeze(0).unwrap(), &golden.tensors["pixels"], 0.0);
    println!("pixels: {error:.1e}");
    assert!(error < 1e-5, "{error:e}");

    let model = ClipVision::new(&golden.config::<ClipVisionConfig>(), golden.builder()).unwrap();
    let x = Var::from_tensor(&golden.tensors["x"]).unwrap();
    golden.check(&[("embedding", &model.forward(&x).unwrap())], Some(&x));
}

#[test]
fn the_image_encoder_gives_transformers_penultimate_tokens() {
    let golden = Golden::open("clip_vision_tokens");
    let model = ClipVision::new(&golden.config::<ClipVisionConfig>(), golden.builder()).unwrap();
    let x = &golden.tensors["x"];
    for (name, ours) in
        [("embedding", model.forward(x).unwrap()), ("penultimate", model.penultimate(x).unwrap())]
    {
        let error = apart(&ours, &golden.tensors[name], 0.0);
        println!("{name}: {error:.1e}");
        assert!(error < 1e-5, "{name}: {error:e}");
    }
}

#[derive(serde::Deserialize)]
struct TokenizerGolden {
    words: Vec<String>,
    prompts: Vec<String>,
    vocab: String,
    merges: String,
    configs: BTreeMap<String, serde_json::Value>,
    ids: BTreeMap<String, Vec<Vec<u32>>>,
}

#[test]
fn prompts_become_the_numbers_that_transformers_gives() {
    let text = std::fs::read_to_string("tests/data/golden/clip_tokenizer.json").unwrap();
    let golden: TokenizerGolden = serde_json::from_str(&text).unwrap();
    for (name, config) in &golden.configs {
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| write(root.path(), file, text);
        write("tokenizer/vocab.json", &golden.vocab);
        write("tokenizer/merges.txt", &golden.merges);
        write("tokenizer/tokenizer_config.json", &config.to_string());
        let files = ModelFiles::folder(root.path()).unwrap();
        let tokenizer = ClipTokenizer::new(&files, "tokenizer").unwrap();
        for (prompt, ids) in golden.prompts.iter().zip(&golden.ids[name]) {
            assert_eq!(&tokenizer.encode(prompt).unwrap(), ids, "{name}: {prompt:?}");
        }
        assert_eq!(tokenizer.max_length(), golden.ids[name][0].len());
    }
}

#[test]
fn a_vocabulary_makes_one_token_of_each_of_its_words() {
    let text = std::fs::read_to_string("tests/data/golden/clip_tokenizer.json").unwrap();
    let golden: TokenizerGolden = serde_json::from_str(&text).unwrap();
    let words: Vec<&str> = golden.words.iter().map(String::as_str).collect();
    let (vocab, merges) = build_vocabulary(&words).unwrap();
    let parse = |text: &str| serde_json::from_str::<BTreeMap<String, u32>>(text).unwrap();
    assert_eq!(parse(&vocab), parse(&golden.vocab));
    assert_eq!(merges, golden.merges);

    let root = tempfile::tempdir().unwrap();
    write(root.path(), "t/vocab.json", &vocab);
    write(root.path(), "t/merges.txt", &merges);
    write(root.path(), "t/tokenizer_config.json", r#"{"model_max_length": 8}"#);
    let tokenizer = ClipTokenizer::new(&ModelFiles::folder(root.path()).unwrap(), "t").unwrap();
    let end = parse(&vocab)["<|endoftext|>"];
    for word in words {
        let tokens = tokenizer.encode(word).unwrap().iter().filter(|id| **id < end - 1).count();
        let pieces = match word {
            "high-key" => 3,
            "don't" => 2,
            _ => 1,
        };
        assert_eq!(tokens, pieces, "{word}");
    }
}

fn write(root: &Path, file: &str, text: &str) {
    let path = root.join(file);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}
