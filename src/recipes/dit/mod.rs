//! The hypernetwork's diffusion transformer (DiT): from a person's embeddings to the latent of a LoRA.

pub mod best_checkpoint;
pub mod learned_prior;
pub mod report;
pub mod training_set;
