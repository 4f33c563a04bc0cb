//! Prompt and LoRA → picture: the text encoders, the UNet and the VAE of SDXL.

pub mod vae;
