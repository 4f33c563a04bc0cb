//! Prompt and LoRA → picture: the text encoders, the UNet and the VAE of SDXL.

mod blocks;
pub mod unet;
pub mod vae;
