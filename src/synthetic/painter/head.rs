//! Measures of one person in one scene.

use std::f32::consts::PI;

use super::canvas::{Area, Spot};
use super::rgb::{Rgb, cloth_colour, hair_colour, iris_colour, skin_colour};
use super::shapes::{between, coverage};
use crate::synthetic::people::{Beard, Clothing, Expression, Glasses, HairStyle, Hat, Person, Scene};

/// The person of one image, measured: lengths in head units, colours as they are painted.
pub(super) struct HeadGeometry {
    pub(super) half_width: f32,
    pub(super) half_height: f32,
    /// Exponent of the superellipse below the eyes: 2 is an ellipse, more is squarer.
    pub(super) corner: f32,
    /// Share of the width that is lost at the chin.
    pub(super) narrowing: f32,
    pub(super) yaw: f32,
    pub(super) light: f32,

    pub(super) eye_x: f32,
    pub(super) eye_y: f32,
    pub(super) eye_width: f32,
    pub(super) eye_open: f32,
    pub(super) eye_slope: f32,
    pub(super) brow_y: f32,
    pub(super) brow_thickness: f32,
    pub(super) brow_slope: f32,
    pub(super) nose_y: f32,
    pub(super) nose_width: f32,
    pub(super) mouth_y: f32,
    pub(super) mouth_width: f32,
    pub(super) mouth_curve: f32,
    pub(super) mouth_open: f32,
    pub(super) lip: f32,
    pub(super) ear: f32,
    pub(super) hairline: f32,
    pub(super) hair_volume: f32,
    /// Below this height the hair is free; a hat presses it down above.
    pub(super) hat_line: f32,
    pub(super) freckles: f32,

    pub(super) hair_style: HairStyle,
    pub(super) beard: Beard,
    pub(super) expression: Expression,
    pub(super) glasses: Glasses,
    pub(super) hat: Hat,
    pub(super) clothing: Clothing,

    pub(super) skin: Rgb,
    pub(super) hair: Rgb,
    pub(super) iris: Rgb,
    pub(super) lips: Rgb,
    pub(super) cloth: Rgb,
}

impl HeadGeometry {
    pub(super) fn new(person: &Person, scene: &Scene) -> Self {
        let who = &person.identity;
        let (smile, surprise, sadness) = match scene.expression {
            Expression::Neutral => (0.0, 0.0, 0.0),
            Expression::Smiling => (1.0, 0.0, 0.0),
            Expression::Surprised => (0.0, 1.0, 0.0),
            Expression::Sad => (0.0, 0.0, 1.0),
        };
        let half_height = between(0.56, 0.69, who.face_height);
        let eye_y = between(-0.13, 0.03, who.eye_height);
        let eye_width = between(0.070, 0.112, who.eye_size);
        let eye_open =
            eye_width * between(0.40, 0.68, who.eye_opening) * (1.0 + 0.30 * surprise - 0.12 * smile);
        let brow_y = eye_y - eye_open - between(0.055, 0.120, who.brow_height) - 0.04 * surprise;
        let nose_y = eye_y + between(0.21, 0.36, who.nose_length);
        let skin = skin_colour(who.skin, who.skin_hue);
        let hairline = between(-0.50, -0.33, who.hairline) * half_height / 0.62;
        Self {
            half_width: between(0.39, 0.54, who.face_width),
            half_height,
            corner: between(1.85, 3.2, who.jaw),
            narrowing: between(0.03, 0.38, who.chin),
            yaw: scene.yaw,
            light: scene.light,
            eye_x: between(0.150, 0.230, who.eye_spacing),
            eye_y,
            eye_width,
            eye_open,
            eye_slope: 0.55 * (who.eye_tilt - 0.5),
            brow_y,
            brow_thickness: between(0.012, 0.038, who.brow_thickness),
            brow_slope: 0.55 * (who.brow_angle - 0.5) - 0.28 * sadness,
            nose_y,
            nose_width: between(0.050, 0.130, who.nose_width),
            mouth_y: nose_y + between(0.125, 0.205, who.mouth_height),
            mouth_width: between(0.115, 0.225, who.mouth_width)
                * (1.0 + 0.20 * smile - 0.20 * surprise - 0.06 * sadness),
            mouth_curve: 0.050 * smile - 0.036 * sadness,
            mouth_open: 0.075 * surprise + 0.022 * smile,
            lip: between(0.020, 0.054, who.lip_thickness),
            ear: between(0.070, 0.125, who.ear_size),
            hairline,
            hair_volume: between(0.03, 0.13, who.hair_volume),
            hat_line: (hairline + 0.06).min(brow_y - 0.055),
            freckles: (4.0 * (who.freckles - 0.75)).clamp(0.0, 1.0),
            hair_style: who.hair_style_kind(),
            beard: who.beard_kind(),
            expression: scene.expression,
            glasses: scene.glasses,
            hat: scene.hat,
            clothing: scene.clothing,
            skin,
            hair: hair_colour(who.hair_colour_kind(), who.hair_shade()),
            iris: iris_colour(who.eye_colour_kind()),
            lips: skin.tint(Rgb(0.92, 0.62, 0.60).mix(Rgb(0.98, 0.40, 0.44), who.lip_colour)),
            cloth: cloth_colour(scene.cloth),
        }
    }

    /// Half the width of the head at the height `y`, before its outline rounds off.
    pub(super) fn width_at(&self, y: f32) -> f32 {
        let down = (y / self.half_height).clamp(0.0, 1.0);
        self.half_width * (1.0 - self.narrowing * down * down.sqrt())
    }

    /// Distance to the outline of the head.
    pub(super) fn head_distance(&self, x: f32, y: f32) -> f32 {
        let corner = if y > 0.0 { self.corner } else { 2.15 };
        let power = (x.abs() / self.width_at(y)).powf(corner) + (y.abs() / self.half_height).powf(corner);
        (power.powf(1.0 / corner) - 1.0) * self.half_width
    }

    /// Radius of the cylinder that the face is printed on.
    pub(super) fn radius(&self, y: f32) -> f32 {
        1.02 * self.width_at(y)
    }

    /// Where a point of the image lies on the unrolled face; far outside when it is beside the head.
    pub(super) fn face_u(&self, x: f32, y: f32) -> f32 {
        let sine = x / self.radius(y);
        if sine.abs() < 1.0 { self.radius(y) * (sine.asin() - self.yaw).sin() } else { 3.0 * x }
    }

    /// Where a point of the unrolled face lies in the image.
    pub(super) fn image_x(&self, u: f32, v: f32) -> f32 {
        let angle = (u / self.radius(v)).clamp(-1.0, 1.0).asin() + self.yaw;
        self.radius(v) * angle.clamp(-0.5 * PI, 0.5 * PI).sin()
    }

    /// The part of the image that holds this part of the face.
    pub(super) fn on_face(&self, u: (f32, f32), v: (f32, f32)) -> Area {
        let left = self.image_x(u.0, v.0).min(self.image_x(u.0, v.1));
        let right = self.image_x(u.1, v.0).max(self.image_x(u.1, v.1));
        Area { x: (left, right), y: v }
    }

    /// Brightness of hair: strands, lit from above and from the side.
    pub(super) fn strands(&self, at: &Spot) -> f32 {
        let strand = 0.10 * (46.0 * at.x + 6.0 * (5.0 * at.y + 70.0 * self.hair_volume).sin()).sin()
            + 0.05 * (71.0 * at.x + 13.0 * at.y).sin();
        1.0 + strand - 0.25 * (at.y + 0.3) + 0.18 * at.x * self.light
    }

    /// How far a hat draws the loose hair in at the height `y`.
    pub(super) fn drawn_in(&self, y: f32) -> f32 {
        match self.hat {
            Hat::None => 0.0,
            Hat::Cap | Hat::Beanie => 0.08 * (1.0 - (y - self.hat_line) / 0.3).clamp(0.0, 1.0),
        }
    }

    /// How much of the hair a hat leaves free at the height `y`.
    pub(super) fn below_hat(&self, y: f32) -> f32 {
        match self.hat {
            Hat::None => 1.0,
            Hat::Cap | Hat::Beanie => coverage(self.hat_line - y, 0.04),
        }
    }
}
