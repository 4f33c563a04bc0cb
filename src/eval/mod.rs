//! How good a hypernetwork or a base is: images from the same noise and prompts, measured by networks that took part
//! in no training.
//!
#![doc = include_str!("../docs/evaluation.md")]

pub mod base_model;
pub mod baselines;
pub mod compression;
pub mod csv;
pub mod dino;
pub mod distribution;
pub mod draw;
pub mod held_out;
pub mod html;
pub mod image_judges;
pub mod image_store;
pub mod judged;
pub mod judges;
pub mod measures;
pub mod methods;
pub mod metrics;
pub mod painted_rows;
pub mod people;
pub mod people_folder;
pub mod perturbation;
pub mod plots;
pub mod prompts;
pub mod renderer;
pub mod report;
pub mod similarity;
pub mod subjects;
pub mod tables;
pub mod weight_space;
