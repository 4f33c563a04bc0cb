//! How good a hypernetwork or a base is: metrics over generated images, and tables of them.

pub mod metrics;
pub mod tables;
