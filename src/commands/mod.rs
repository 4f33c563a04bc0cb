//! One file a subcommand, to be read aloud; the four rooms meet only here.

pub mod build_dataset;
mod device;
pub mod dreambooth;
pub mod eval;
pub mod face;
mod functional;
pub mod r#gen;
pub mod lora;
mod lora_set;
pub mod models;
mod photos;
pub mod portraits;
pub mod shell;
pub mod train_base;
pub mod train_dit;
pub mod train_encoder;
pub mod train_lae;
pub mod train_lora;
