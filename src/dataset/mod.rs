//! A folder of LoRAs, one a person: the training set of the hypernetwork.

pub mod latents;
pub mod lora_dataset;
