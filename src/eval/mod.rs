//! How good a hypernetwork or a base is: images from the same noise and prompts, measured by networks that took part
//! in no training.

pub mod base_model;
pub mod baselines;
pub mod judges;
pub mod methods;
pub mod metrics;
pub mod people;
pub mod prompts;
pub mod renderer;
pub mod report;
pub mod subjects;
pub mod tables;
