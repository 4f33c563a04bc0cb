//! Complete trainings, one folder each: what is trained, on which data, with which loss.

pub mod base;
pub mod dit;
pub mod dreambooth;
pub mod encoder;
pub mod hypernet_config;
pub mod lae;
pub mod lora_dataset;
