//! Trains the LoRA autoencoder (LAE).

pub mod config;
pub mod report;
pub mod train;
