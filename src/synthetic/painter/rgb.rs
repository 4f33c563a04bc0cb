//! Colours, and the palettes of skin, hair, eyes and cloth.

use super::shapes::between;
use crate::synthetic::people::{Colour, EyeColour, HairColour};

/// A colour, red, green and blue, each about [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rgb(pub(super) f32, pub(super) f32, pub(super) f32);

impl Rgb {
    pub(super) const BLACK: Self = Self(0.0, 0.0, 0.0);
    pub(super) const WHITE: Self = Self(1.0, 1.0, 1.0);

    pub(super) fn grey(value: f32) -> Self {
        Self(value, value, value)
    }

    pub(super) fn map(self, change: impl Fn(f32) -> f32) -> Self {
        Self(change(self.0), change(self.1), change(self.2))
    }

    /// From this colour, at 0, to the other, at 1.
    pub(super) fn mix(self, other: Self, share: f32) -> Self {
        Self(
            between(self.0, other.0, share),
            between(self.1, other.1, share),
            between(self.2, other.2, share),
        )
    }

    /// Through a filter of this colour.
    pub(super) fn tint(self, filter: Self) -> Self {
        Self(self.0 * filter.0, self.1 * filter.1, self.2 * filter.2)
    }

    pub(super) fn shift(self, by: f32) -> Self {
        self.map(|value| value + by)
    }

    pub(super) fn luma(self) -> f32 {
        0.30 * self.0 + 0.59 * self.1 + 0.11 * self.2
    }
}

impl std::ops::Mul<f32> for Rgb {
    type Output = Self;
    fn mul(self, factor: f32) -> Self {
        self.map(|value| value * factor)
    }
}

impl std::ops::Add for Rgb {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0, self.1 + other.1, self.2 + other.2)
    }
}

pub(super) fn skin_colour(dark: f32, hue: f32) -> Rgb {
    let base = Rgb(0.98, 0.84, 0.74).mix(Rgb(0.36, 0.21, 0.14), dark.powf(1.15));
    let hue = hue - 0.5;
    base.tint(Rgb(1.0 + 0.10 * hue, 1.0 - 0.04 * hue, 1.0 - 0.24 * hue))
}

pub(super) fn hair_colour(colour: HairColour, shade: f32) -> Rgb {
    let base = match colour {
        HairColour::Black => Rgb(0.07, 0.06, 0.06),
        HairColour::DarkBrown => Rgb(0.28, 0.16, 0.09),
        HairColour::Brown => Rgb(0.50, 0.32, 0.16),
        HairColour::Blond => Rgb(0.86, 0.70, 0.38),
        HairColour::Red => Rgb(0.62, 0.22, 0.08),
        HairColour::Grey => Rgb(0.70, 0.70, 0.70),
    };
    base * (1.0 + 0.35 * (shade - 0.5))
}

pub(super) fn iris_colour(colour: EyeColour) -> Rgb {
    match colour {
        EyeColour::Brown => Rgb(0.20, 0.11, 0.06),
        EyeColour::Hazel => Rgb(0.42, 0.26, 0.10),
        EyeColour::Green => Rgb(0.25, 0.45, 0.22),
        EyeColour::Blue => Rgb(0.22, 0.45, 0.75),
        EyeColour::Grey => Rgb(0.45, 0.50, 0.55),
    }
}

pub(super) fn cloth_colour(colour: Colour) -> Rgb {
    match colour {
        Colour::Red => Rgb(0.80, 0.16, 0.14),
        Colour::Green => Rgb(0.18, 0.62, 0.25),
        Colour::Blue => Rgb(0.18, 0.32, 0.80),
        Colour::Yellow => Rgb(0.93, 0.82, 0.22),
        Colour::White => Rgb(0.93, 0.93, 0.93),
        Colour::Black => Rgb(0.12, 0.12, 0.14),
        Colour::Purple => Rgb(0.55, 0.25, 0.65),
        Colour::Orange => Rgb(0.92, 0.52, 0.15),
    }
}
