//! Who → LoRA: mixer, diffusion transformer, autoencoder, and their statistics.

pub mod dit;
pub mod lae;
pub mod mixer;
pub mod pca;
pub mod ridge;
pub mod stats;
