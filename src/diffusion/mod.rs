//! Diffusion as mathematics: noise, schedules, samplers. Knows no network.
//!
//! x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (Ho et al. 2020, eq. 4). A network predicts ε, v or x_0 from x_t and t; a sampler
//! walks from noise to x_0 by asking a closure. The same code draws images with the UNet (ε or v) and samples
//! LoRA latents with the identity DiT (x_0).

pub mod sampler;
pub mod schedule;
pub mod shifted;

mod levels;
pub mod noise;

pub use levels::Levels;
