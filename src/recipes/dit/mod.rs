//! Trains the mixer (MIF) and the diffusion transformer (DiT) of a hypernetwork.

pub mod best_checkpoint;
pub mod config;
pub mod image_loss;
pub mod learned_prior;
pub mod report;
pub mod train;
pub mod training_set;
