//! Prompt and LoRA → image: the text encoders, the UNet and the VAE of SDXL.
//!
#![doc = include_str!("../docs/generate.md")]

pub mod architecture;
mod blocks;
mod chunks;
pub mod counts;
pub mod folder;
pub mod image_series;
pub mod infotext;
mod ldm_names;
pub mod loader;
pub mod lora_stack;
pub mod pipeline;
pub mod preview;
pub mod prompt;
pub mod prompt_set;
pub mod single_file;
pub mod text;
pub mod tokenizer;
pub mod unet;
mod unet_config;
pub mod vae;
