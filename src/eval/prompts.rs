//! The prompts that people are evaluated with.

use crate::synthetic::scenes::scene_caption;
use crate::synthetic::{Backdrop, Colour, Expression, Glasses, Hat, Held, Lighting, Scene, World};

/// The scene of image `i`: three portraits in turn, and one with glasses and a cap.
pub fn scene(world: World, i: u64) -> Scene {
    let (expression, background) = match i % 4 {
        0 => (Expression::Smiling, Colour::Red),
        1 => (Expression::Neutral, Colour::Blue),
        2 => (Expression::Surprised, Colour::White),
        _ => (Expression::Neutral, Colour::Green),
    };
    let plain = world.shared_scene(0, i).plain();
    let scene = Scene { expression, background, yaw: 0.0, ..plain };
    let scene = match world {
        World::Varied => scene,
        World::Aligned => Scene {
            backdrop: Backdrop::Plain,
            held: Held::Nothing,
            lighting: Lighting::Even,
            light: 0.0,
            scale: Scene::NORMAL_SCALE,
            ..scene
        },
    };
    if i % 4 == 3 { Scene { glasses: Glasses::Clear, hat: Hat::Cap, ..scene } } else { scene }
}

/// The caption of a scene, without words about the person.
pub fn caption_of(world: World, scene: &Scene) -> String {
    scene_caption(world, scene, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_prompts_alternate_with_noise_of_their_own() {
        let scene = |i| scene(World::Varied, i);
        let captions: Vec<String> = (0..4).map(|i| caption_of(World::Varied, &scene(i))).collect();
        assert_eq!(captions[0], "a photo of a person, smiling, red background");
        assert_eq!(
            captions[3],
            "a photo of a person, neutral, wearing glasses, wearing cap, green background"
        );
        assert_eq!(caption_of(World::Varied, &scene(5)), captions[1]);
        assert_ne!(scene(5).grain, scene(1).grain, "the same prompt has other noise");
    }

    #[test]
    fn prompts_of_the_aligned_world_are_plain_portraits() {
        let caption = caption_of(World::Aligned, &scene(World::Aligned, 0));
        for part in ["a photo of a person", "smiling", "red background"] {
            assert!(caption.contains(part), "{caption}");
        }
    }
}
