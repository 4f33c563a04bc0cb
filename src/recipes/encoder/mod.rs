//! The small image encoder, and the attribute classifier that judges generated portraits.

pub mod attributes;
pub mod config;
pub mod image;
mod randomise;
