//! Surroundings of the person: backdrops, held things, the colour of the light.
//!
//! Places are in frame coordinates, right and down from −1 to 1, so that they do not move with the head.

use super::canvas::{Canvas, LOWERED};
use super::head::HeadGeometry;
use super::rgb::{Rgb, cloth_colour};
use super::shapes::{bump, coverage, ellipse, hill};
use crate::synthetic::people::{Backdrop, Held, Lighting, Scene};

/// The backdrop; a plain one has its colour and a little light from above.
pub(super) fn paint_backdrop(canvas: &mut Canvas, scene: &Scene) {
    let edge = 2.0 / canvas.side as f32;
    match scene.backdrop {
        Backdrop::Plain => {
            let colour = cloth_colour(scene.background);
            canvas.over(super::canvas::Area::ALL, |at| (colour * (1.0 - 0.10 * (1.0 + at.y + LOWERED)), 1.0));
        }
        Backdrop::Beach => canvas.over_frame(|x, y| {
            let sky = Rgb(0.45, 0.72, 0.95).mix(Rgb(0.86, 0.93, 0.97), 0.5 * (y + 1.0));
            let sun = coverage(ellipse(x - 0.68, y + 0.66, 0.2, 0.2), edge);
            let sea = Rgb(0.10, 0.42, 0.62) * (1.0 + 0.12 * (24.0 * y).sin());
            let sand = Rgb(0.90, 0.78, 0.54) * (1.0 - 0.12 * (y - 0.4));
            let colour = sky.mix(Rgb(1.0, 0.93, 0.55), sun).mix(sea, coverage(-0.05 - y, edge));
            (colour.mix(sand, coverage(0.32 - y + 0.04 * (4.0 * x).sin(), edge)), 1.0)
        }),
        Backdrop::Forest => canvas.over_frame(|x, y| {
            let leaves = Rgb(0.22, 0.48, 0.20).mix(Rgb(0.55, 0.72, 0.34), 0.5 * (1.0 - y));
            let trunk = |middle: f32, half: f32| coverage((x - middle).abs() - half, edge);
            let trunks =
                trunk(-0.86, 0.07).max(trunk(-0.55, 0.045)).max(trunk(0.62, 0.05)).max(trunk(0.9, 0.08));
            let crown = coverage(y + 0.62 + 0.10 * (9.0 * x).sin() + 0.05 * (23.0 * x).sin(), edge);
            let ground = coverage(0.55 - y, edge);
            let colour = leaves.mix(Rgb(0.30, 0.20, 0.12), trunks).mix(Rgb(0.10, 0.30, 0.12), crown);
            (colour.mix(Rgb(0.26, 0.36, 0.14), ground), 1.0)
        }),
        Backdrop::City => canvas.over_frame(|x, y| {
            let sky = Rgb(0.62, 0.70, 0.82).mix(Rgb(0.95, 0.82, 0.66), 0.5 * (y + 1.0));
            // Eight houses, each a quarter of a half frame wide; windows on a grid of a sixteenth of the frame.
            let house = ((x + 1.0) * 4.0).clamp(0.0, 7.9) as usize;
            let height = [0.55, 0.85, 0.35, 0.6, 0.5, 0.3, 0.9, 0.65][house];
            let wall = Rgb(0.32, 0.34, 0.42) * [1.0, 0.8, 1.15, 0.9, 0.9, 1.1, 0.75, 1.0][house];
            let cell = |place: f32| ((place + 1.0) * 8.0).fract();
            let window = (cell(x) - 0.5).abs() < 0.22 && (cell(y) - 0.5).abs() < 0.28;
            let wall = if window { Rgb(0.95, 0.85, 0.50) } else { wall };
            (sky.mix(wall, coverage(0.35 - height - y, edge)), 1.0)
        }),
        Backdrop::Mountains => canvas.over_frame(|x, y| {
            let sky = Rgb(0.40, 0.62, 0.90).mix(Rgb(0.85, 0.92, 0.97), 0.5 * (y + 1.0));
            let top = (0.9 * (x + 0.62).abs() - 0.62).min(1.1 * (x - 0.70).abs() - 0.5).min(0.12);
            let snow = coverage(y - top - 0.22 - 0.03 * (30.0 * x).sin(), edge);
            let rock = Rgb(0.42, 0.42, 0.48).mix(Rgb(0.96, 0.97, 1.0), snow);
            let meadow = Rgb(0.35, 0.58, 0.28);
            (sky.mix(rock, coverage(top - y, edge)).mix(meadow, coverage(0.45 - y, edge)), 1.0)
        }),
        Backdrop::Night => canvas.over_frame(|x, y| {
            let sky = Rgb(0.03, 0.04, 0.13).mix(Rgb(0.12, 0.12, 0.32), 0.5 * (y + 1.0));
            let moon = coverage(ellipse(x + 0.68, y + 0.66, 0.17, 0.17), edge)
                * (1.0 - coverage(ellipse(x + 0.60, y + 0.70, 0.15, 0.15), edge));
            let stars = STARS.iter().map(|&(a, b)| bump(x - a, 0.022, y - b, 0.022)).fold(0.0, f32::max);
            (sky.mix(Rgb(0.98, 0.96, 0.82), moon.max(stars)), 1.0)
        }),
        Backdrop::Library => canvas.over_frame(|x, y| {
            // Books an eighth of a half frame wide on shelves half a half frame apart.
            let (shelf, book) = (((y + 1.0) * 2.0) as usize, ((x + 1.0) * 8.0) as usize);
            let (down, across) = (((y + 1.0) * 2.0).fract(), ((x + 1.0) * 8.0).fract());
            let spine = BOOKS[(book * 5 + shelf * 3) % BOOKS.len()];
            let tall = [0.18, 0.30, 0.12, 0.24][(book + 2 * shelf) % 4];
            let wood = Rgb(0.36, 0.22, 0.12);
            let inside = if down < tall { wood * 0.5 } else { spine * (1.0 - 0.5 * hill(across, 0.18)) };
            (if down > 0.86 { wood } else { inside }, 1.0)
        }),
    }
}

const STARS: [(f32, f32); 14] = [
    (-0.9, -0.25),
    (-0.75, 0.2),
    (-0.82, 0.62),
    (-0.35, -0.88),
    (-0.1, -0.94),
    (0.2, -0.86),
    (0.45, -0.72),
    (0.62, -0.9),
    (0.8, -0.55),
    (0.9, -0.82),
    (0.72, -0.2),
    (0.9, 0.1),
    (0.78, 0.45),
    (-0.6, -0.05),
];

const BOOKS: [Rgb; 6] = [
    Rgb(0.60, 0.16, 0.14),
    Rgb(0.16, 0.30, 0.46),
    Rgb(0.20, 0.42, 0.24),
    Rgb(0.78, 0.62, 0.28),
    Rgb(0.44, 0.22, 0.42),
    Rgb(0.80, 0.76, 0.66),
];

/// The held object, before the right shoulder of the image, with the hand that holds it.
pub(super) fn paint_held(canvas: &mut Canvas, head: &HeadGeometry, held: Held) {
    let edge = 3.0 / canvas.side as f32;
    let hand = move |x: f32, y: f32| coverage(ellipse(x - 0.64, y - 0.94, 0.17, 0.13), edge);
    match held {
        Held::Nothing => return,
        Held::Cup => canvas.over_frame(|x, y| {
            let handle = (ellipse(x - 0.82, y - 0.70, 0.11, 0.12).abs() - 0.03).max(0.78 - x);
            let body = ((x - 0.62).abs() - 0.18).max((y - 0.70).abs() - 0.20);
            let coffee = coverage(ellipse(x - 0.62, y - 0.52, 0.15, 0.035), edge);
            let china = Rgb(0.95, 0.94, 0.90) * (0.92 - 0.35 * (x - 0.62));
            (china.mix(Rgb(0.25, 0.14, 0.08), coffee), coverage(body.min(handle), edge))
        }),
        Held::Flower => canvas.over_frame(|x, y| {
            let stem = ((x - 0.64).abs() - 0.018).max(0.5 - y);
            let (right, down) = (x - 0.64, y - 0.45);
            let radius = right.hypot(down);
            let petals = radius - 0.15 * (1.0 + 0.28 * (5.0 * down.atan2(right)).cos());
            let colour = if radius < 0.06 { Rgb(0.98, 0.82, 0.20) } else { Rgb(0.92, 0.35, 0.60) };
            let colour = if petals > stem { Rgb(0.20, 0.50, 0.20) } else { colour };
            (colour, coverage(stem.min(petals), edge))
        }),
        Held::Book => canvas.over_frame(|x, y| {
            let cover = ((x - 0.64).abs() - 0.26).max((y - 0.72).abs() - 0.24);
            let title = ((x - 0.66).abs() - 0.14).max((y - 0.64).abs() - 0.045);
            let pages = coverage(x - 0.42, edge);
            let colour = Rgb(0.12, 0.30, 0.55).mix(Rgb(0.93, 0.90, 0.80), pages.max(coverage(title, edge)));
            (colour, coverage(cover, edge))
        }),
    }
    canvas.over_frame(|x, y| (head.skin * 0.86, hand(x, y)));
}

/// Dim, warm or cold light on everything; light from a side is part of the shading of the head.
pub(super) fn light(canvas: &mut Canvas, lighting: Lighting) {
    let filter = match lighting {
        Lighting::Even | Lighting::Left | Lighting::Right => return,
        Lighting::Dim => Rgb(0.46, 0.46, 0.52),
        Lighting::Warm => Rgb(1.12, 0.92, 0.62),
        Lighting::Cold => Rgb(0.66, 0.88, 1.14),
    };
    canvas.colours.iter_mut().for_each(|colour| *colour = colour.tint(filter));
}
