//! A folder of LoRAs with embeddings of their people, as `build-dataset` writes it.

mod embeddings;
pub mod latents;
pub mod lora_dataset;
pub mod manifest;
pub mod vectors;
