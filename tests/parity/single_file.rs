//! One file in LDM layout against the same model as a diffusers folder (`scripts/golden_single_file.py`, in which
//! diffusers itself reads the folder's weights out of the file).

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use difflora::diffusion::noise;
use difflora::sdxl::single_file;
use difflora::sdxl::text::TextEncoders;
use difflora::sdxl::tokenizer::{ClipTokenizer, clip_vocabulary};
use difflora::sdxl::unet::{UNet, UNetConfig};
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
    let predicted =
        unet.forward(&latents, &timesteps, &conditioning.context, &conditioning.pooled, &time_ids).unwrap();
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
