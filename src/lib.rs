//! difflora predicts a personal SDXL LoRA from one photo of a face, and generates images with it (DiffLoRA,
//! Wu et al. 2024, arXiv 2408.06740).
//!
//! ```text
//! photo ──► identity ──────► hypernet ─────────────────► lora ──────────► sdxl ──► images
//!           face + CLIP      mixer ─► DiT: noise ─► z     .safetensors     text, UNet, VAE
//!           embeddings       LAE decoder: z ─► LoRA       or merge
//! ```
//!
//! | to find | look in |
//! |---|---|
//! | LoRA autoencoder (LAE), weight-preserved loss | [`hypernet::lae`], [`recipes`] |
//! | photos of a person → their LoRA, the whole way | [`personal_lora`] |
//! | gated mixer (MIF), diffusion transformer (DiT) | [`hypernet::mixer`], [`hypernet::dit`] |
//! | HyperLoRA's networks, its face preparation | [`hypernet::hyperlora`], [`identity::hyperlora`] |
//! | DDIM and the other samplers, schedules | [`diffusion`] |
//! | merging ΔW into a model | [`lora::apply`] |
//! | DreamBooth, the dataset of LoRAs | [`recipes::dreambooth`], [`dataset`] |
//! | evaluation against baselines | [`eval`] |
//!
//! Modules are listed from top to bottom; one imports only those below it. [`commands`] alone knows command-line
//! arguments and prints.
//!
//! Dimension key, used in every shape comment:
//! `B` batch · `N` tokens · `D` width · `H` heads · `R` LoRA rank · `P` LoRA parameters, flattened ·
//! `C` channels · `L` latent length.
//!
#![doc = include_str!("docs/install.md")]
#![deny(missing_docs)]

pub mod cli;
pub mod commands;
pub mod eval;
pub mod personal_lora;
pub mod recipes;
pub mod registry;

// The four stages, in the order in which data passes.
pub mod identity;

pub mod hypernet;

pub mod lora;

pub mod sdxl;

// What they are built on.
pub mod dataset;
pub mod diffusion;
pub mod layers;
pub mod synthetic;
pub mod train;

pub mod device;
pub mod diagnostics;
pub mod failure;
pub mod files;
pub mod guides;
pub mod image;
pub mod limits;
pub mod named;
pub mod progress;
pub mod statistics;
pub mod threads;
pub mod weights;
