//! Comparison with the reference implementations; the golden files come from `scripts/golden_*.py`.

mod denoiser;
mod face;
mod golden;
mod hypernet;
mod insightface;
mod lora;
mod lora_damage;
mod lora_kinds;
mod lora_round_trip;
mod pipeline;
mod samplers;
mod sdxl_parts;
mod single_file;
mod train;
mod train_lora;
mod unet;
