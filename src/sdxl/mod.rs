//! Prompt and LoRA → image: the text encoders, the UNet and the VAE of SDXL.
//!
#![doc = include_str!("../docs/generate.md")]

pub mod architecture;
mod blocks;
pub mod counts;
pub mod folder;
pub mod infotext;
pub mod pipeline;
pub mod preview;
pub mod single_file;
pub mod text;
pub mod tokenizer;
pub mod unet;
pub mod vae;

pub use crate::weights::model_folder as files;
