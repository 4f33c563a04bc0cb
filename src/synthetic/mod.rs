//! The small world: procedural people with captions, made to train small models and to judge them.
//!
#![doc = include_str!("../docs/small-world.md")]

mod captions;
pub mod image_set;
pub mod judge;
mod people;
mod portraits;

pub use captions::{CaptionOptions, caption, identity_words, vocabulary};
pub use people::{
    Beard, Colour, Expression, EyeColour, Facing, Glasses, HairColour, HairStyle, Hat, Identity, Person,
    Scene, Style,
};
pub use portraits::paint;
