//! Metadata of a LoRA file about its training: sd-scripts' `ss_…` keys, ModelSpec's, and our own.
//!
//! Values as sd-scripts' `train_network.py` writes them (Python's spelling of booleans and of nothing). Times and session
//! numbers are left out, so that the same training gives the same bytes.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::device::Precision;
use crate::diffusion::schedule::Prediction;
use crate::lora::metadata;
use crate::recipes::dreambooth::batch_trainer::BatchTrainer;
use crate::recipes::dreambooth::config::Crop;
use crate::recipes::dreambooth::lockstep::Targets;
use crate::recipes::dreambooth::lora_trainer::LoraTrainer;

/// Key of the SHA-256 of all that decides the LoRA.
pub const SETTINGS_STAMP: &str = "difflora.settings_sha256";

/// SHA-256 of a value's JSON.
pub fn hash(value: &Value) -> String {
    Sha256::digest(value.to_string()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The metadata of a finished LoRA.
pub fn of(room: &BatchTrainer, trainer: &LoraTrainer) -> BTreeMap<String, String> {
    let settings = &room.settings;
    let (lora, training, images) = (&settings.lora, &settings.training, &settings.images);
    let objective = &settings.objective;
    let name = trainer.out.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let python = |value: bool| if value { "True" } else { "False" }.to_string();
    let or_none = |value: f64| if value == 0.0 { "None".to_string() } else { value.to_string() };
    let image_count = trainer.dataset.len();
    let batches = image_count.div_ceil(training.batch).max(1) as u64;
    let epochs = (trainer.steps * training.accumulate).div_ceil(batches);
    let arguments = match lora.targets {
        Targets::Conv => {
            json!({ "conv_dim": lora.rank.to_string(), "conv_alpha": settings.alpha().to_string() })
        }
        _ => json!({}),
    };
    let buckets: BTreeMap<String, Value> = trainer
        .dataset
        .sizes()
        .into_iter()
        .enumerate()
        .map(|(i, (size, count))| (i.to_string(), json!({ "resolution": size, "count": count })))
        .collect();
    let bucketed = images.crop == Crop::Buckets;
    let [beta1, beta2] = training.betas;
    let text_lr = if lora.text_encoders { training.text_encoder_lr.to_string() } else { "None".to_string() };
    let prediction = match room.schedule.config.prediction_type {
        Prediction::Epsilon => "epsilon",
        Prediction::V => "v",
        Prediction::Sample => "sample",
    };
    let entries = [
        ("ss_output_name", name.clone()),
        ("ss_network_args", arguments.to_string()),
        ("ss_network_dropout", "None".into()),
        ("ss_sd_model_name", room.base.name.clone()),
        ("ss_new_sd_model_hash", room.base.sha256.clone()),
        ("ss_resolution", format!("({side}, {side})", side = room.side)),
        ("ss_learning_rate", training.lr.to_string()),
        ("ss_unet_lr", training.lr.to_string()),
        ("ss_text_encoder_lr", text_lr),
        (
            "ss_optimizer",
            format!(
                "torch.optim.adamw.AdamW(betas=({beta1}, {beta2}),eps={:e},weight_decay={})",
                training.eps, training.weight_decay
            ),
        ),
        ("ss_lr_scheduler", json!(training.schedule).as_str().unwrap_or_default().to_string()),
        ("ss_lr_warmup_steps", training.warmup.to_string()),
        ("ss_max_train_steps", trainer.steps.to_string()),
        ("ss_steps", trainer.step().to_string()),
        ("ss_num_epochs", epochs.to_string()),
        ("ss_epoch", epochs.to_string()),
        ("ss_num_batches_per_epoch", batches.to_string()),
        ("ss_num_train_images", image_count.to_string()),
        ("ss_num_reg_images", room.class.as_ref().map_or(0, |class| class.len()).to_string()),
        ("ss_batch_size_per_device", training.batch.to_string()),
        ("ss_total_batch_size", (training.batch as u64 * training.accumulate).to_string()),
        ("ss_gradient_accumulation_steps", training.accumulate.to_string()),
        ("ss_gradient_checkpointing", python(room.networks.unet.recompute)),
        ("ss_max_grad_norm", training.clip.to_string()),
        ("ss_prior_loss_weight", objective.prior_weight.to_string()),
        ("ss_min_snr_gamma", or_none(objective.min_snr_gamma)),
        ("ss_noise_offset", or_none(objective.noise_offset)),
        (
            "ss_mixed_precision",
            match training.dtype {
                Precision::F32 => "no",
                Precision::F16 => "fp16",
                Precision::Bf16 => "bf16",
            }
            .into(),
        ),
        ("ss_full_fp16", "False".into()),
        ("ss_seed", settings.seed.to_string()),
        ("ss_cache_latents", python(images.crop != Crop::Random && images.colour == 0.0)),
        ("ss_enable_bucket", python(bucketed)),
        ("ss_bucket_info", if bucketed { json!({ "buckets": buckets }).to_string() } else { "null".into() }),
        ("ss_random_crop", python(images.crop == Crop::Random)),
        ("ss_flip_aug", python(images.flip)),
        ("ss_color_aug", python(images.colour > 0.0)),
        ("ss_clip_skip", "None".into()),
        ("ss_max_token_length", "None".into()),
        (
            "ss_dataset_dirs",
            json!({ &trainer.name: { "n_repeats": 1, "img_count": image_count } }).to_string(),
        ),
        ("ss_tag_frequency", json!({ &trainer.name: trainer.dataset.caption_counts() }).to_string()),
        ("ss_training_comment", "None".into()),
        (metadata::TITLE, name),
        (metadata::RESOLUTION, metadata::resolution(room.side)),
        ("modelspec.prediction_type", prediction.into()),
        (metadata::TRIGGER_PHRASE, settings.called(trainer.dataset.called.as_deref())),
        // LoRAs of one seed start from the same `down`s; where these are frozen, the LoRAs can be compared by `up` alone.
        ("difflora.down_seed", settings.seed.to_string()),
        ("difflora.down", if lora.freeze_a { "frozen" } else { "trained" }.into()),
        ("difflora.targets", json!(lora.targets).as_str().unwrap_or_default().to_string()),
    ];
    let stamp = room.stamp_of(trainer).map(|stamp| (SETTINGS_STAMP, stamp));
    entries
        .into_iter()
        .chain(metadata::of_base(&room.base))
        .chain(stamp)
        .map(|(key, value)| (key.to_string(), value))
        .collect()
}
