//! The canvas: colours under construction, and what is known about each point before painting starts.

use rand::RngCore;

use super::head::HeadGeometry;
use super::rgb::Rgb;
use super::shapes::coverage;
use crate::synthetic::people::{Scene, stream};

/// Size of the head unit in half frames: larger faces tell more about a person.
pub(super) const ZOOM: f32 = 1.24;

/// How far the head sits below the middle of the frame, in head units; hats need the room above.
pub(super) const LOWERED: f32 = 0.045;

/// One point of the canvas before anything is painted there.
pub(super) struct Spot {
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) u: f32,
    pub(super) v: f32,
    /// Distance to the outline of the head.
    pub(super) head: f32,
    /// Coverage by the head.
    pub(super) face: f32,
}

/// A rectangle of the image, in head units; layers are evaluated only there.
#[derive(Clone, Copy)]
pub(super) struct Area {
    pub(super) x: (f32, f32),
    pub(super) y: (f32, f32),
}

impl Area {
    pub(super) const ALL: Self = Self::rows(-9.0, 9.0);

    pub(super) const fn rows(top: f32, bottom: f32) -> Self {
        Self { x: (-9.0, 9.0), y: (top, bottom) }
    }
}

/// The image while it is painted.
pub(super) struct Canvas {
    pub(super) side: usize,
    /// Half frames per head unit.
    pub(super) zoom: f32,
    /// Head units from the middle of the frame to the middle of the head.
    pub(super) middle: (f32, f32),
    pub(super) spots: Vec<Spot>,
    pub(super) colours: Vec<Rgb>,
}

impl Canvas {
    pub(super) fn new(head: &HeadGeometry, scene: &Scene, side: usize) -> Self {
        let zoom = ZOOM * scene.scale;
        let middle = (scene.shift[0] / zoom, scene.shift[1] / zoom + LOWERED);
        let edge = 2.0 / (side as f32 * zoom);
        let position = |index: usize| ((2 * index + 1) as f32 / side as f32 - 1.0) / zoom;
        let mut spots = Vec::with_capacity(side * side);
        for row in 0..side {
            let y = position(row) - middle.1;
            spots.extend((0..side).map(|column| {
                let x = position(column) - middle.0;
                let distance = head.head_distance(x, y);
                Spot { x, y, u: head.face_u(x, y), v: y, head: distance, face: coverage(distance, edge) }
            }));
        }
        Self { side, zoom, middle, spots, colours: vec![Rgb::BLACK; side * side] }
    }

    /// Place of a spot in the frame: right and down, −1 to 1.
    pub(super) fn in_frame(&self, at: &Spot) -> (f32, f32) {
        ((at.x + self.middle.0) * self.zoom, (at.y + self.middle.1) * self.zoom)
    }

    /// Lays ink over the whole frame: `ink` gives colour and opacity at a place in it, right and down from −1 to 1.
    pub(super) fn over_frame(&mut self, ink: impl Fn(f32, f32) -> (Rgb, f32)) {
        let (zoom, middle) = (self.zoom, self.middle);
        self.over(Area::ALL, |at| ink((at.x + middle.0) * zoom, (at.y + middle.1) * zoom));
    }

    /// Width of a soft edge, in head units, of so many pixels.
    pub(super) fn edge(&self, pixels: f32) -> f32 {
        pixels * 2.0 / (self.side as f32 * self.zoom)
    }

    /// Lays ink over an area: `ink` gives colour and opacity at a spot.
    pub(super) fn over(&mut self, area: Area, ink: impl Fn(&Spot) -> (Rgb, f32)) {
        let (left, right) = self.pixels(area.x, self.middle.0);
        let (top, bottom) = self.pixels(area.y, self.middle.1);
        for row in top..bottom {
            let row = row * self.side + left..row * self.side + right;
            for (spot, colour) in self.spots[row.clone()].iter().zip(&mut self.colours[row]) {
                let (ink, alpha) = ink(spot);
                if alpha > 0.0 {
                    *colour = colour.mix(ink, alpha.min(1.0));
                }
            }
        }
    }

    /// Lays ink over the face only: nothing beside the head is touched.
    pub(super) fn over_face(&mut self, area: Area, ink: impl Fn(&Spot) -> (Rgb, f32)) {
        self.over(area, |spot| {
            if spot.face == 0.0 {
                return (Rgb::BLACK, 0.0);
            }
            let (colour, alpha) = ink(spot);
            (colour, spot.face * alpha)
        });
    }

    /// The pixels between two places along one axis, with one more at both ends.
    pub(super) fn pixels(&self, places: (f32, f32), middle: f32) -> (usize, usize) {
        let pixel = |place: f32| ((place + middle) * self.zoom + 1.0) * 0.5 * self.side as f32;
        let inside = |pixel: f32| pixel.clamp(0.0, self.side as f32) as usize;
        (inside(pixel(places.0).floor() - 1.0), inside(pixel(places.1).ceil() + 1.0))
    }
}

/// Means over squares of `supersample`² points.
pub(super) fn average(colours: &[Rgb], size: usize, supersample: usize) -> Vec<Rgb> {
    let side = size * supersample;
    let share = 1.0 / (supersample * supersample) as f32;
    let mean = |index: usize| {
        let (row, column) = (index / size * supersample, index % size * supersample);
        let mut sum = Rgb::BLACK;
        for points in colours[row * side..].chunks(side).take(supersample) {
            for &point in &points[column..column + supersample] {
                sum = sum + point;
            }
        }
        sum * share
    };
    if supersample == 0 { Vec::new() } else { (0..size * size).map(mean).collect() }
}

/// Exposure, grain, and rounding to bytes.
pub(super) fn develop(colours: &[Rgb], scene: &Scene) -> Vec<u8> {
    let mut rng = stream(scene.grain, *b"grain...", 0, 0);
    // The sum of four bytes is nearly normal, with this standard deviation.
    let deviation = (4.0 * (256.0f32 * 256.0 - 1.0) / 12.0).sqrt();
    let mut grain = || {
        let sum: u32 = rng.next_u32().to_le_bytes().into_iter().map(u32::from).sum();
        scene.noise * (sum as f32 - 510.0) / deviation
    };
    let byte = |value: f32| (255.0 * value.clamp(0.0, 1.0) + 0.5) as u8;
    let mut bytes = Vec::with_capacity(3 * colours.len());
    for &colour in colours {
        let Rgb(red, green, blue) = colour * scene.gain;
        bytes.extend([byte(red + grain()), byte(green + grain()), byte(blue + grain())]);
    }
    bytes
}
