//! The painter: portraits as layers of soft shapes, evaluated at every pixel.
//!
//! A shape is a signed distance `d`, negative inside; its coverage is `½ − d / edge`, clamped to
//! [0, 1]. Layers go over one another from back to front, `colour ← (1 − α)·colour + α·ink`. Heads are
//! superellipses; the face is printed on a vertical cylinder, which a turn of the head rotates:
//! `u = W·sin(asin(x / W) − yaw)`, where `W` is half the head's width.
//!
//! Coordinates: `x` right, `y` down, origin in the middle of the head, about 0.5 is half a head wide.
//! `u`, `v` are the same on the unrolled face. Sizes below are in this unit.
mod canvas;
mod clothes;
mod face;
mod hair;
mod head;
mod rgb;
mod scenery;
mod shapes;
mod styles;

use self::canvas::{Canvas, Spot, average, develop};
use self::clothes::{paint_glasses, paint_hat, paint_neck_and_shirt};
use self::face::{
    paint_beard, paint_brow, paint_ears, paint_eye, paint_freckles, paint_head, paint_moustache, paint_mouth,
    paint_nose,
};
use self::hair::{paint_hair_behind, paint_hair_in_front};
use self::head::HeadGeometry;
use self::rgb::cloth_colour;
use self::scenery::{light, paint_backdrop, paint_held};
use self::shapes::bump;
use self::styles::{draw_as_sketch, paint_in_oil, stylise};
use crate::synthetic::people::{Person, Scene, Style};

/// Paints `person` in `scene`: RGB bytes, `size`×`size`×3, rows from the top.
///
/// Every pixel is the mean of `supersample`² points: 1 for training data, 2 for images to look at.
/// A `size` or `supersample` of 0 gives an empty image.
pub fn paint(person: &Person, scene: &Scene, size: usize, supersample: usize) -> Vec<u8> {
    let head = HeadGeometry::new(person, scene);
    let mut canvas = Canvas::new(&head, scene, size * supersample);

    paint_backdrop(&mut canvas, scene);
    paint_hair_behind(&mut canvas, &head);
    paint_neck_and_shirt(&mut canvas, &head);
    paint_ears(&mut canvas, &head);
    paint_head(&mut canvas, &head);
    paint_freckles(&mut canvas, &head);
    paint_beard(&mut canvas, &head);
    paint_nose(&mut canvas, &head);
    paint_moustache(&mut canvas, &head);
    paint_mouth(&mut canvas, &head);
    for side in [-1.0, 1.0] {
        paint_eye(&mut canvas, &head, side);
        paint_brow(&mut canvas, &head, side);
    }
    paint_hair_in_front(&mut canvas, &head);
    paint_glasses(&mut canvas, &head);
    paint_hat(&mut canvas, &head);
    paint_held(&mut canvas, &head, scene.held);
    light(&mut canvas, scene.lighting);

    let colours = match scene.style {
        Style::Photo => canvas.colours,
        Style::Sketch => draw_as_sketch(&canvas, supersample),
        Style::Painting => paint_in_oil(&canvas),
        style => stylise(&canvas, style, cloth_colour(scene.background), head.skin),
    };
    develop(&average(&colours, size, supersample), scene)
}

/// Where the face matters, for the weights of losses: one value a cell of a grid of `side`×`side` over the frame.
pub struct FaceMap {
    /// Share of the cell that the head covers.
    pub head: Vec<f32>,
    /// Eyes with brows, and the mouth: about 1 in their middle, falling off softly.
    pub features: Vec<f32>,
}

impl FaceMap {
    /// Of the image that [`paint`] makes of `person` in `scene`.
    pub fn new(person: &Person, scene: &Scene, side: usize) -> Self {
        let head = HeadGeometry::new(person, scene);
        let canvas = Canvas::new(&head, scene, side);
        let feature = |at: &Spot| {
            let eyes = bump(at.u.abs() - head.eye_x, 0.16, at.v - head.eye_y + 0.03, 0.13);
            let mouth = bump(at.u, 1.2 * head.mouth_width, at.v - head.mouth_y, 0.09 + head.mouth_open);
            at.face * eyes.max(mouth)
        };
        Self {
            head: canvas.spots.iter().map(|at| at.face).collect(),
            features: canvas.spots.iter().map(feature).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Glasses, Hat, World};

    #[test]
    fn the_same_person_and_scene_give_the_same_bytes() {
        let (person, scene) = (Person::new(7, 3), Scene::draw(7, 5));
        assert_eq!(paint(&person, &scene, 64, 2), paint(&person, &scene, 64, 2));
    }

    #[test]
    fn people_differ_in_the_same_scene() {
        let scene = Scene::draw(0, 0).plain();
        let images: Vec<_> = (0..20).map(|number| paint(&Person::new(0, number), &scene, 32, 1)).collect();
        for (index, one) in images.iter().enumerate() {
            for other in &images[..index] {
                let change: u64 = one.iter().zip(other).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
                assert!(change > 2 * one.len() as u64, "mean change {}", change as f64 / one.len() as f64);
            }
        }
    }

    #[test]
    fn every_size_is_painted_whole() {
        let (person, scene) = (Person::new(0, 1), Scene::draw(0, 1));
        for size in [0, 1, 2, 7, 64, 100] {
            for supersample in [1, 2, 3] {
                assert_eq!(paint(&person, &scene, size, supersample).len(), 3 * size * size);
            }
        }
    }

    #[test]
    fn hats_glasses_and_styles_are_seen() {
        let person = Person::new(0, 2);
        let plain = Scene::draw(0, 3).plain();
        let differs = |scene: Scene| {
            let (one, two) = (paint(&person, &plain, 64, 1), paint(&person, &scene, 64, 1));
            one.iter().zip(&two).filter(|(a, b)| a.abs_diff(**b) > 24).count()
        };
        for hat in [Hat::Cap, Hat::Beanie] {
            assert!(differs(Scene { hat, ..plain.clone() }) > 300, "{hat:?}");
        }
        for glasses in [Glasses::Clear, Glasses::Dark] {
            assert!(differs(Scene { glasses, ..plain.clone() }) > 60, "{glasses:?}");
        }
        for style in [Style::Sketch, Style::Painting] {
            assert!(differs(Scene { style, ..plain.clone() }) > 1000, "{style:?}");
        }
    }

    /// FNV-1a, 64 bits.
    fn hash(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    #[test]
    fn the_same_seeds_keep_giving_the_same_images() {
        let images: Vec<u8> = (1..=12)
            .flat_map(|number| {
                let person = Person::new(0, number);
                paint(&person, &Scene::draw_for(&person, number), 64, 1)
            })
            .collect();
        // As commit ce6976a painted them.
        assert_eq!(hash(&images), 0x3f3f89af8bbbdc9, "the painter has changed");
    }

    #[test]
    fn every_style_differs_from_every_other() {
        let person = Person::new(0, 4);
        let scene = World::Aligned.scene(&person, 1);
        let images: Vec<Vec<u8>> = Style::ALL
            .iter()
            .map(|style| paint(&person, &Scene { style: *style, ..scene.clone() }, 64, 1))
            .collect();
        for (i, one) in images.iter().enumerate() {
            for other in &images[..i] {
                let change: u64 = one.iter().zip(other).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
                assert!(change > 2 * one.len() as u64, "{:?} {change}", Style::ALL[i]);
            }
        }
    }
}
