//! The scenes of a dataset of painted people.

use crate::image::Image;
use crate::synthetic::{CaptionOptions, Person, Scene, Style, caption, paint};

/// The `count` training scenes of `seed`, the same for all people.
pub fn training_scenes(seed: u64, count: u64) -> Vec<Scene> {
    (0..count).map(|i| training_scene(seed, i)).collect()
}

fn training_scene(seed: u64, i: u64) -> Scene {
    let scene = Scene::draw(seed, i);
    // Three scenes of four are photos, the style that shows a person best.
    if i.is_multiple_of(4) { scene } else { Scene { style: Style::Photo, ..scene } }
}

/// Captions of training scenes, which do not describe the person.
pub fn training_captions(scenes: &[Scene], seed: u64) -> Vec<String> {
    let options = CaptionOptions { subject: "person", attributes: 0, drop: 0.0 };
    // Without attributes the caption is the same for every person.
    let person = Person::new(0, 0);
    scenes.iter().map(|scene| caption(&person, scene, options, seed)).collect()
}

/// The scene of reference image `i`: a plain photo from any side, which no LoRA is trained on.
pub fn reference_scene(seed: u64, i: u64) -> Scene {
    Scene::draw(seed ^ 0x4ef, i).plain()
}

/// Paints a square image of `size` pixels.
pub fn paint_image(person: &Person, scene: &Scene, size: usize) -> Image {
    Image { width: size, height: size, rgb: paint(person, scene, size, 1) }
}
