//! One file a subcommand, to be read aloud; the four rooms meet only here.

pub mod build_dataset;
pub mod dreambooth;
pub mod face;
pub mod r#gen;
pub mod models;
pub mod portraits;
pub mod train_base;
pub mod train_encoder;
