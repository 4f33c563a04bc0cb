//! difflora: from one photo of a face to a personal SDXL LoRA, and the images it draws.
//!
//! ```text
//! photo ──► identity ──► hypernet ──► lora ──► sdxl ──► images
//! ```
//!
//! Four rooms in the order in which data passes; they meet only in [`commands`].
//! [`dataset`] and [`train`] make what the hypernetwork learns from.
//!
//! Dimension key, used in every shape comment:
//! `B` batch · `N` tokens · `D` width · `H` heads · `R` LoRA rank · `P` LoRA parameters, flattened ·
//! `C` channels · `L` latent length.

pub mod cli;
pub mod commands;
pub mod eval;
pub mod recipes;

// The four rooms, in the order in which data passes.
pub mod identity;

pub mod hypernet;

pub mod lora;

pub mod sdxl;

// What the rooms stand on.
pub mod dataset;
pub mod diffusion;
pub mod layers;
pub mod synthetic;
pub mod train;

pub mod device;
pub mod diagnostics;
pub mod failure;
pub mod files;
pub mod image;
pub mod output;
pub mod progress;
pub mod statistics;
pub mod weights;
