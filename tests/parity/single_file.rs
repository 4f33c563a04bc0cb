//! One file in LDM layout against the same model as a diffusers folder (`scripts/golden_single_file.py`, in which
//! diffusers itself reads the folder's weights out of the file).

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use difflora::diffusion::noise;
use difflora::sdxl::single_file;
use difflora::sdxl::text::TextEncoders;
use difflora::sdxl::tokenizer::{ClipTokenizer, clip_vocabulary};
use difflora::sdxl::unet::{UNet, UNetConfig, UNetInput};
use difflora::sdxl::vae::{Vae, VaeConfig};
use difflora::weights::model_folder::{DIFFUSERS_WEIGHTS, ModelFiles};
use serde_json::Value;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/single_file")
}

/// What each network of a model computes from the same inputs.
fn outputs(files: &ModelFiles) -> Vec<(&'static str, Tensor)> {
    let text = TextEncoders::open(files, DType::F32, &Device::Cpu).unwrap();
    let conditioning = text.encode_prompts(&["a photo of a person, smiling"]).unwrap();
    let config: UNetConfig = files.config("unet/config.json").unwrap();
    let unet = files.load("unet", DIFFUSERS_WEIGHTS, DType::F32, &Device::Cpu, |vb| UNet::new(&config, vb));
    let config: VaeConfig = files.config("vae/config.json").unwrap();
    let vae = files.load("vae", DIFFUSERS_WEIGHTS, DType::F32, &Device::Cpu, |vb| Vae::new(&config, vb));
    let (unet, vae) = (unet.unwrap(), vae.unwrap());
    let latents = noise::normal(3, 0, (1, 4, 8, 16), &Device::Cpu).unwrap();
    let time_ids = Tensor::new(&[[64f32, 48.0, 0.0, 8.0, 64.0, 96.0]], &Device::Cpu).unwrap();
    let timesteps = Tensor::new(&[500f32], &Device::Cpu).unwrap();
    let predicted = unet
        .forward(&UNetInput {
            latents: &latents,
            timesteps: &timesteps,
            context: &conditioning.context,
            pooled: &conditioning.pooled,
            time_ids: &time_ids,
            guidance_scale: None,
        })
        .unwrap();
    vec![
        ("decoded", vae.decode(&vae.from_latents(&latents).unwrap()).unwrap()),
        ("encoded", vae.encode(&noise::normal(4, 0, (1, 3, 16, 16), &Device::Cpu).unwrap()).unwrap().0),
        ("context", conditioning.context),
        ("pooled", conditioning.pooled),
        ("predicted", predicted),
    ]
}

#[test]
fn one_file_computes_what_the_folder_computes_bit_for_bit() {
    let folder = ModelFiles::folder(golden().join("folder")).unwrap();
    let expected = outputs(&folder);
    let one = golden().join("one.safetensors");
    // Once with the settings from a file and the vocabulary from a folder, once with all from the folder.
    let settings = tempfile::tempdir().unwrap();
    for part in ["tokenizer", "tokenizer_2"] {
        std::fs::create_dir(settings.path().join(part)).unwrap();
        for file in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
            let (from, to) = (golden().join("folder").join(part), settings.path().join(part));
            std::fs::copy(from.join(file), to.join(file)).unwrap();
        }
    }
    let sections: Value =
        serde_json::from_slice(&std::fs::read(golden().join("base-config.json")).unwrap()).unwrap();
    for (section, file) in [
        ("unet", "unet/config.json"),
        ("vae", "vae/config.json"),
        ("text_encoder", "text_encoder/config.json"),
        ("text_encoder_2", "text_encoder_2/config.json"),
    ] {
        let path = settings.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, sections[section].to_string()).unwrap();
    }
    for config in [settings.path().to_path_buf(), golden().join("folder")] {
        let files = single_file::open(&one, Some(&config)).unwrap();
        for ((name, ours), (_, theirs)) in outputs(&files).iter().zip(&expected) {
            let bits = |t: &Tensor| -> Vec<u32> {
                t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
            };
            assert!(bits(ours) == bits(theirs), "{name} differs with {}", config.display());
        }
    }
}

#[test]
fn sizes_are_inferred_and_what_tensors_do_not_tell_is_asked_for() {
    let refused = |config: Option<&Path>| {
        let error = single_file::open(&golden().join("one.safetensors"), config).unwrap_err();
        format!("{error:#}")
    };
    let message = refused(None);
    assert!(message.contains("attention_head_dim") && message.contains("--base-config"), "{message}");
    // The settings in a file bring no vocabulary, and this model has 712 tokens.
    let message = refused(Some(&golden().join("base-config.json")));
    assert!(message.contains("712 tokens") && message.contains("tokenizer/vocab.json"), "{message}");

    let folder = ModelFiles::folder(golden().join("folder")).unwrap();
    let files = single_file::open(&golden().join("one.safetensors"), Some(&golden().join("folder"))).unwrap();
    let sizes = |files: &ModelFiles| files.config::<UNetConfig>("unet/config.json").unwrap();
    let (ours, theirs) = (sizes(&files), sizes(&folder));
    assert_eq!(ours.down_block_types, theirs.down_block_types);
    assert_eq!(ours.transformer_layers_per_block, theirs.transformer_layers_per_block);

    // Without the folder's word for them, sizes come from the tensors alone.
    let heads = tempfile::tempdir().unwrap();
    for part in ["tokenizer", "tokenizer_2", "unet", "text_encoder", "text_encoder_2"] {
        std::fs::create_dir(heads.path().join(part)).unwrap();
    }
    for part in ["tokenizer", "tokenizer_2"] {
        let file = format!("{part}/vocab.json");
        std::fs::copy(golden().join("folder").join(&file), heads.path().join(&file)).unwrap();
    }
    std::fs::write(heads.path().join("unet/config.json"), r#"{"attention_head_dim": [1, 2, 4]}"#).unwrap();
    for part in ["text_encoder", "text_encoder_2"] {
        std::fs::write(heads.path().join(part).join("config.json"), r#"{"num_attention_heads": 2}"#).unwrap();
    }
    let files = single_file::open(&golden().join("one.safetensors"), Some(heads.path())).unwrap();
    let ours = sizes(&files);
    for (ours, theirs) in [
        (ours.block_out_channels, theirs.block_out_channels),
        (
            vec![ours.layers_per_block, ours.cross_attention_dim],
            vec![theirs.layers_per_block, theirs.cross_attention_dim],
        ),
        (
            vec![ours.addition_time_embed_dim, ours.projection_class_embeddings_input_dim],
            vec![theirs.addition_time_embed_dim, theirs.projection_class_embeddings_input_dim],
        ),
        (vec![ours.in_channels, ours.out_channels], vec![theirs.in_channels, theirs.out_channels]),
    ] {
        assert_eq!(ours, theirs);
    }
    assert_eq!(
        (ours.down_block_types, ours.up_block_types),
        (theirs.down_block_types, theirs.up_block_types)
    );
}

#[test]
fn the_vocabulary_of_single_files_is_clips() {
    let (vocabulary, merges) = clip_vocabulary().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("tokenizer");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("vocab.json"), vocabulary).unwrap();
    std::fs::write(place.join("merges.txt"), merges).unwrap();
    std::fs::copy(
        golden().join("folder/tokenizer/tokenizer_config.json"),
        place.join("tokenizer_config.json"),
    )
    .unwrap();
    let tokenizer = ClipTokenizer::new(&ModelFiles::folder(folder.path()).unwrap(), "tokenizer").unwrap();
    // transformers 5.23 with SDXL's own files:
    // CLIPTokenizer.from_pretrained(…)("a photo of an Astronaut riding a horse, naïve café 🙂").input_ids
    let expected =
        [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 267, 1097, 35689, 563, 15304, 14860, 49407];
    let ids = tokenizer.encode("a photo of an Astronaut riding a horse, naïve café 🙂").unwrap();
    assert_eq!(ids[..expected.len()], expected);
}

/// Tensors of a file: key, type, shape, bytes.
type Stored = (String, safetensors::Dtype, Vec<usize>, Vec<u8>);

/// The file of the golden model with other tensors and metadata, and the model in it.
fn changed(
    folder: &Path,
    change: impl FnOnce(&mut Vec<Stored>),
    metadata: &[(&str, &str)],
) -> anyhow::Result<ModelFiles> {
    let bytes = std::fs::read(golden().join("one.safetensors"))?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let own = |(key, view): (String, safetensors::tensor::TensorView)| {
        (key, view.dtype(), view.shape().to_vec(), view.data().to_vec())
    };
    let mut tensors: Vec<Stored> = file.tensors().into_iter().map(own).collect();
    tensors.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    change(&mut tensors);
    let views = tensors.iter().map(|(key, dtype, shape, bytes)| {
        (key, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let path = folder.join("changed.safetensors");
    std::fs::write(&path, safetensors::serialize(views, Some(metadata))?)?;
    single_file::open(&path, Some(&golden().join("folder")))
}

/// What the scheduler is told of a model, with no settings but the file's.
fn prediction(folder: &Path, tensors: &[&str], metadata: &[(&str, &str)]) -> anyhow::Result<[Value; 2]> {
    let settings = folder.join("settings");
    for part in ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"] {
        std::fs::create_dir_all(settings.join(part))?;
        for entry in std::fs::read_dir(golden().join("folder").join(part))? {
            let entry = entry?;
            std::fs::copy(entry.path(), settings.join(part).join(entry.file_name()))?;
        }
    }
    let mark = |key: &&str| (key.to_string(), safetensors::Dtype::F32, vec![0], vec![]);
    changed(folder, |all| all.extend(tensors.iter().map(mark)), metadata)?;
    let files = single_file::open(&folder.join("changed.safetensors"), Some(&settings))?;
    let mut config: Value = files.json("scheduler/scheduler_config.json")?;
    Ok([config["prediction_type"].take(), config["rescale_betas_zero_snr"].take()])
}

fn f32s(key: &str, shape: &[usize], numbers: &[f32]) -> Stored {
    let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    (key.to_string(), safetensors::Dtype::F32, shape.to_vec(), bytes)
}

fn assert_same_outputs(one: &ModelFiles, two: &ModelFiles) {
    for ((name, a), (_, b)) in outputs(one).into_iter().zip(outputs(two)) {
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&a), values(&b), "{name}");
    }
}

#[test]
fn left_overs_of_training_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let extra = |tensors: &mut Vec<Stored>| {
        for key in [
            "first_stage_model.model_ema.decay",
            "first_stage_model.model_ema.num_updates",
            "first_stage_model.model_ema.encoderconv_inweight",
            "first_stage_model.loss.logvar",
            "first_stage_model.loss.discriminator.main.0.weight",
            "first_stage_model.loss.discriminator.main.1.num_batches_tracked",
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
            "conditioner.embedders.1.model.logit_scale",
            "conditioner.embedders.1.model.attn_mask",
            "model_ema.decay",
        ] {
            if tensors.iter().all(|(other, ..)| other != key) {
                tensors.push(f32s(key, &[1], &[0.5]));
            }
        }
    };
    let odd = changed(folder.path(), extra, &[]).unwrap();
    assert_same_outputs(&odd, &ModelFiles::folder(golden().join("folder")).unwrap());
    let unknown = |tensors: &mut Vec<Stored>| {
        tensors.push(f32s("first_stage_model.encoder.extra.weight", &[1], &[0.5]))
    };
    let error = changed(folder.path(), unknown, &[]).unwrap_err().to_string();
    assert!(error.contains("names that no SDXL has") && error.contains("encoder.extra.weight"), "{error}");
}

#[test]
fn velocity_models_are_known_by_every_mark() {
    let folder = tempfile::tempdir().unwrap();
    const TYPE: &str = "modelspec.prediction_type";
    for (tensors, metadata, wanted, zero) in [
        (&[][..], &[][..], "epsilon", false),
        (&["v_pred"], &[], "v_prediction", false),
        (&["v_pred", "ztsnr"], &[(TYPE, "epsilon")], "v_prediction", true),
        (&[], &[(TYPE, "v")], "v_prediction", false),
        (&[], &[(TYPE, "v_prediction")], "v_prediction", false),
        (&[], &[(TYPE, "V-Prediction"), ("ss_zero_terminal_snr", "True")], "v_prediction", true),
        (&[], &[(TYPE, "epsilon"), ("ss_v_parameterization", "True")], "epsilon", false),
        (&[], &[("ss_v_parameterization", "True")], "v_prediction", false),
    ] {
        let told = prediction(folder.path(), tensors, metadata).unwrap();
        assert_eq!(told, [Value::from(wanted), Value::from(zero)], "{tensors:?} {metadata:?}");
    }
    let error = prediction(folder.path(), &[], &[(TYPE, "flow")]).unwrap_err().to_string();
    assert!(error.contains("`flow`") && error.contains("changed.safetensors"), "{error}");
}

#[test]
fn scaled_8_bit_weights_are_multiplied_by_their_scale() {
    let folder = tempfile::tempdir().unwrap();
    let key = |tensors: &[Stored], end: &str| {
        let fits = |(key, _, shape, _): &&Stored| {
            key.starts_with("model.diffusion_model.") && key.ends_with(end) && shape.len() == 2
        };
        let (key, _, shape, _) = tensors.iter().find(fits).unwrap();
        (key.clone(), shape.clone())
    };
    // E4M3: 1, −1.5, 0.5, 0, of which each product with the scale is exact.
    let pattern = [(0x38u8, 1f32), (0xbc, -1.5), (0x30, 0.5), (0x00, 0.0)];
    for (name, per_row) in [("scale_weight", false), ("weight_scale", false), ("weight_scale", true)] {
        let numbers = |shape: &[usize]| -> Vec<(u8, f32)> {
            pattern.iter().cycle().take(shape.iter().product()).copied().collect()
        };
        let scale = |row: usize| if per_row { 0.25 / (1 << (row % 4)) as f32 } else { 0.25 };
        let scaled = |tensors: &mut Vec<Stored>| {
            let (key, shape) = key(tensors, "attn1.to_q.weight");
            tensors.retain(|(other, ..)| *other != key);
            let bytes = numbers(&shape).into_iter().map(|(byte, _)| byte).collect();
            tensors.push((key.clone(), safetensors::Dtype::F8_E4M3, shape.clone(), bytes));
            let layer = key.strip_suffix(".weight").unwrap();
            let scales: Vec<f32> = (0..if per_row { shape[0] } else { 1 }).map(scale).collect();
            let sizes = if per_row { vec![shape[0], 1] } else { vec![] };
            tensors.push(f32s(&format!("{layer}.{name}"), &sizes, &scales));
            tensors.push(f32s(&format!("{layer}.scale_input"), &[], &[3.0]));
            tensors.push((
                "model.diffusion_model.scaled_fp8".into(),
                safetensors::Dtype::F8_E4M3,
                vec![2],
                vec![0, 0],
            ));
        };
        let plain = |tensors: &mut Vec<Stored>| {
            let (key, shape) = key(tensors, "attn1.to_q.weight");
            tensors.retain(|(other, ..)| *other != key);
            let values: Vec<f32> =
                numbers(&shape).iter().enumerate().map(|(i, (_, x))| x * scale(i / shape[1])).collect();
            tensors.push(f32s(&key, &shape, &values));
        };
        let odd = tempfile::tempdir_in(folder.path()).unwrap();
        let same = tempfile::tempdir_in(folder.path()).unwrap();
        let odd = changed(odd.path(), scaled, &[]).map(|files| (odd, files)).unwrap();
        let same = changed(same.path(), plain, &[]).map(|files| (same, files)).unwrap();
        assert_same_outputs(&odd.1, &same.1);
    }
    let four_bits = |tensors: &mut Vec<Stored>| {
        let (key, _) = key(tensors, "attn1.to_q.weight");
        tensors.push(f32s(&format!("{key}.absmax"), &[1], &[1.0]));
    };
    let error = changed(folder.path(), four_bits, &[]).unwrap_err().to_string();
    assert!(error.contains("bitsandbytes 4-bit"), "{error}");
}

#[test]
fn a_projection_in_transformers_layout_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let transposed = |tensors: &mut Vec<Stored>| {
        let name = "conditioner.embedders.1.model.text_projection";
        let at = tensors.iter().position(|(key, ..)| key == name).unwrap();
        let (_, dtype, shape, bytes) = tensors.remove(at);
        let width = bytes.len() / (shape[0] * shape[1]);
        let number = |row: usize, column: usize| &bytes[(row * shape[1] + column) * width..][..width];
        let turned = (0..shape[1]).flat_map(|j| (0..shape[0]).flat_map(move |i| number(i, j).to_vec()));
        tensors.push((format!("{name}.weight"), dtype, vec![shape[1], shape[0]], turned.collect()));
    };
    let odd = changed(folder.path(), transposed, &[]).unwrap();
    assert_same_outputs(&odd, &ModelFiles::folder(golden().join("folder")).unwrap());
}
