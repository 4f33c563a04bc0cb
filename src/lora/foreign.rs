//! What a file holds that is not read: kinds of adapters by name, and files of other models.

/// Names of adapter kinds that are not implemented, by what only their keys contain.
pub(super) fn kind(key: &str) -> Option<&'static str> {
    let kinds = [
        (".lokr_t1", "LoKr with a decomposed first matrix of a convolution"),
        (".bm.weight", "GLoRA with a Tucker factor"),
        (".q_layer.weight", "T-LoRA"),
        (".ia3_l.", "PEFT's IA3"),
        (".oft_r.", "PEFT's OFT"),
        (".oft_R.", "PEFT's OFT"),
        (".boft_", "PEFT's BOFT"),
        (".lora_embedding_", "LoRA of an embedding"),
        (".vera_lambda_", "VeRA"),
        (".vblora_", "VB-LoRA"),
        (".randlora_", "RandLoRA"),
        (".lora_E", "AdaLoRA"),
        (".hra_u", "HRA"),
        (".fourierft_", "FourierFT"),
        (".shira_", "SHiRA"),
        (".bone_", "Bone"),
        (".miss_", "MiSS"),
        (".delora_", "DeLoRA"),
        (".road_theta", "RoAd"),
        (".reshape_weight", "a weight that ComfyUI reshapes"),
    ];
    kinds.into_iter().find_map(|(mark, kind)| key.contains(mark).then_some(kind))
}

const TRANSFORMER: &str = "this is a LoRA for a diffusion transformer, not for SDXL's UNet";
const EMBEDDING: &str = "this is a textual inversion embedding: give it to `gen` as --embedding";

/// What the keys of such a file contain. The first that fits counts.
const MARKS: [(&str, &str); 38] = [
    (
        "id_encoder.",
        "this is PhotoMaker's adapter, an identity encoder and a LoRA in one, which is not supported",
    ),
    ("pulid_", "this is PuLID's adapter, which is not supported"),
    ("double_blocks", "this is a LoRA for Flux"),
    ("single_transformer_blocks", "this is a LoRA for Flux"),
    ("lora_prior_", "this is a LoRA for Stable Cascade"),
    ("joint_blocks", "this is a LoRA for Stable Diffusion 3"),
    ("lora_transformer_", TRANSFORMER),
    ("transformer.transformer_blocks", TRANSFORMER),
    ("transformer.single_", TRANSFORMER),
    ("diffusion_model.layers.", TRANSFORMER),
    ("diffusion_model.blocks.", TRANSFORMER),
    ("diffusion_model.transformer_blocks.", TRANSFORMER),
    ("transformer.layers.", TRANSFORMER),
    ("transformer.blocks.", TRANSFORMER),
    ("lora_unet_layers_", TRANSFORMER),
    ("lora_unet_blocks_", TRANSFORMER),
    ("lora_unet_transformer_blocks_", TRANSFORMER),
    ("img_mod", TRANSFORMER),
    ("adaLN_modulation", TRANSFORMER),
    ("cross_attn.", TRANSFORMER),
    ("motion_modules.", "this is a motion module of AnimateDiff"),
    ("lora_controlnet", "this is a ControlLoRA"),
    ("control_model.", "this is a ControlNet"),
    ("controlnet", "this is a ControlNet"),
    ("adapter.body.", "this is a T2I-Adapter"),
    ("model.diffusion_model.", "this is a whole checkpoint: give it as --base"),
    ("first_stage_model.", "this is a whole checkpoint: give it as --base"),
    ("ip_adapter.", "this is an IP-Adapter"),
    ("to_k_ip.", "this is an IP-Adapter"),
    ("image_proj.", "this is an IP-Adapter"),
    ("bundle_emb.", "it holds nothing but textual inversion embeddings"),
    ("string_to_param", EMBEDDING),
    ("emb_params", EMBEDDING),
    ("model.layers.", "this belongs to a language model"),
    ("down_blocks.", "these are a model's own weights: give its folder as --base"),
    ("input_blocks.", "these are a model's own weights: give the whole checkpoint as --base"),
    ("text_model.", "these are a text encoder's own weights"),
    ("decoder.conv_in.", "this is a VAE"),
];

/// What a file without any known key seems to be.
pub(super) fn guess(keys: &[String]) -> Option<&'static str> {
    if keys.iter().any(|key| key == "clip_g" || key == "clip_l") {
        return Some(EMBEDDING);
    }
    MARKS.into_iter().find_map(|(mark, guess)| keys.iter().any(|key| key.contains(mark)).then_some(guess))
}

/// The trigger words of the textual inversions that a LoRA brings along (A1111's and OneTrainer's
/// `bundle_emb.TOKEN.clip_l`, `bundle_emb.TOKEN.clip_g`), by the keys that belong to no layer.
pub fn bundled_embeddings(keys: &[String]) -> std::collections::BTreeSet<&str> {
    fn token(key: &str) -> Option<&str> {
        let rest = key.strip_prefix("bundle_emb.")?;
        Some(&rest[..rest.find(".string_to_param").or_else(|| rest.rfind('.'))?])
    }
    keys.iter().filter_map(|key| token(key)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guessed(key: &str) -> &'static str {
        guess(&[key.to_string()]).unwrap_or("")
    }

    #[test]
    fn files_of_other_models_are_named() {
        for (key, words) in [
            ("id_encoder.fuse_module.mlp1.fc1.weight", "PhotoMaker"),
            ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "diffusion transformer"),
            ("transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight", "diffusion transformer"),
            ("diffusion_model.blocks.0.cross_attn.k.lora_A.weight", "diffusion transformer"),
            ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "language model"),
            ("clip_g", "textual inversion"),
            ("down_blocks.0.resnets.0.conv1.weight", "own weights"),
        ] {
            assert!(guessed(key).contains(words), "{key}: {}", guessed(key));
        }
    }

    #[test]
    fn bundled_embeddings_are_named_by_their_trigger() {
        let keys = [
            "bundle_emb.sks person.clip_l",
            "bundle_emb.sks person.clip_g",
            "bundle_emb.v1.5.string_to_param.*",
            "extra",
            "äöü",
            "bundle_emb.",
        ];
        let keys = keys.map(String::from);
        assert_eq!(bundled_embeddings(&keys).into_iter().collect::<Vec<_>>(), ["sks person", "v1.5"]);
    }
}
