//! A small SDXL, trained from random weights on painted portraits.

pub mod config;
pub mod patch_pca;
pub mod quality;
pub mod unet;
pub mod vae;
