//! DreamBooth LoRAs: one person, or many in one forward pass.
//!
#![doc = include_str!("../../docs/train-lora.md")]

pub mod augment;
pub mod batch_trainer;
pub mod class_images;
pub mod config;
pub mod data_order;
pub mod functional_loss;
pub mod image_dataset;
pub mod lockstep;
pub mod lora_trainer;
pub mod loss;
pub mod metadata;
pub mod previews;
pub mod refine;
pub mod setup;
pub mod targets;
pub mod training_folder;
