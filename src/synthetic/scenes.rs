//! The scenes of a dataset of painted people.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::image::Image;
use crate::synthetic::descriptions::{Detail, describe};
use crate::synthetic::people::Held;
use crate::synthetic::{CaptionOptions, Person, Scene, Style, World, caption, paint};

/// The `count` training scenes of `seed`, the same for all people.
pub fn training_scenes(world: World, seed: u64, count: u64) -> Vec<Scene> {
    (0..count).map(|i| training_scene(world, seed, i)).collect()
}

fn training_scene(world: World, seed: u64, i: u64) -> Scene {
    let scene = world.shared_scene(seed, i);
    // Three scenes of four are photos, the style that shows a person best.
    if i.is_multiple_of(4) { scene } else { Scene { style: Style::Photo, ..scene } }
}

/// Captions of training scenes, which do not describe the person.
pub fn training_captions(world: World, scenes: &[Scene], seed: u64) -> Vec<String> {
    scenes.iter().map(|scene| scene_caption(world, scene, seed)).collect()
}

/// The caption of a scene that says nothing about the person; in the varied world `seed` decides the order of words.
pub fn scene_caption(world: World, scene: &Scene, seed: u64) -> String {
    // Without words about the person the caption is the same for every person.
    let person = Person::new(0, 0);
    match world {
        World::Varied => {
            let options = CaptionOptions { subject: "person", attributes: 0, drop: 0.0 };
            caption(&person, scene, options, seed)
        }
        World::Aligned => {
            describe(&person, scene, "person", Detail::Scene, &mut ChaCha8Rng::seed_from_u64(seed))
        }
    }
}

/// The scene of reference image `i`: a plain photo from any side, which no LoRA is trained on.
pub fn reference_scene(world: World, seed: u64, i: u64) -> Scene {
    let scene = world.shared_scene(seed ^ 0x4ef, i).plain();
    match world {
        World::Varied => scene,
        World::Aligned => Scene { held: Held::Nothing, scale: Scene::NORMAL_SCALE, ..scene },
    }
}

/// Paints a square image of `size` pixels.
pub fn paint_image(person: &Person, scene: &Scene, size: usize) -> Image {
    Image { width: size, height: size, rgb: paint(person, scene, size, 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_of_scenes_say_nothing_of_the_person_and_stay_the_same() {
        for world in [World::Varied, World::Aligned] {
            let scenes = training_scenes(world, 5, 32);
            let captions = training_captions(world, &scenes, 5);
            assert_eq!(captions, training_captions(world, &scenes, 5));
            for (scene, caption) in scenes.iter().zip(&captions) {
                assert!(caption.contains(scene.style.word()), "{caption}");
                for word in ["hair", "nose", "skin", "eyes", "beard", "jaw"] {
                    assert!(!caption.contains(word), "{caption}");
                }
            }
        }
    }

    #[test]
    fn reference_photos_of_the_aligned_world_show_the_face_at_one_size() {
        for i in 0..50 {
            let scene = reference_scene(World::Aligned, 5, i);
            assert_eq!((scene.style, scene.scale), (Style::Photo, Scene::NORMAL_SCALE));
        }
    }
}
