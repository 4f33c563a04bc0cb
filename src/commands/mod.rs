//! The subcommands, one file each: their arguments, the models that names stand for, and what is printed.

pub mod build_dataset;
pub mod doctor;
pub mod eval;
pub mod face;
pub mod r#gen;
pub mod help;
pub mod lora;
pub mod models;
pub mod output;
pub mod portraits;
pub mod run_args;
pub mod shell;
pub mod train_base;
pub mod train_dit;
pub mod train_encoder;
pub mod train_lae;
pub mod train_lora;
pub mod values;
