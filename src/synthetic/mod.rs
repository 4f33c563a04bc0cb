//! The synthetic world: procedural people with captions, made to train small models and to evaluate them.
//!
#![doc = include_str!("../docs/small-world.md")]

pub mod attribute_classifier;
mod captions;
mod descriptions;
pub mod image_set;
mod painter;
mod people;
pub mod portraits;
pub mod scenes;
mod world;

pub use captions::{CaptionOptions, caption, identity_words, vocabulary};
pub use descriptions::{Detail, describe, graded_words};
pub use painter::{FaceMap, paint};
pub use people::{
    Backdrop, Beard, Clothing, Colour, Expression, EyeColour, Facing, Framing, Glasses, HairColour,
    HairStyle, Hat, Held, Identity, Lighting, Person, Scene, Style,
};
pub use world::{Attribute, World};
