//! The prompts that people are evaluated with.

use crate::synthetic::{CaptionOptions, Colour, Expression, Glasses, Hat, Person, Scene, caption};

/// The scene of image `i`: three portraits in turn, and one with glasses and a cap.
pub fn scene(i: u64) -> Scene {
    let (expression, background) = match i % 4 {
        0 => (Expression::Smiling, Colour::Red),
        1 => (Expression::Neutral, Colour::Blue),
        2 => (Expression::Surprised, Colour::White),
        _ => (Expression::Neutral, Colour::Green),
    };
    let plain = Scene::draw(0, i).plain();
    let scene = Scene { expression, background, yaw: 0.0, ..plain };
    if i % 4 == 3 { Scene { glasses: Glasses::Clear, hat: Hat::Cap, ..scene } } else { scene }
}

/// The caption of a scene, without words about the person.
pub fn caption_of(scene: &Scene) -> String {
    caption(&Person::new(0, 0), scene, CaptionOptions::default(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_prompts_alternate_with_noise_of_their_own() {
        let captions: Vec<String> = (0..4).map(|i| caption_of(&scene(i))).collect();
        assert_eq!(captions[0], "a photo of a person, smiling, red background");
        assert_eq!(
            captions[3],
            "a photo of a person, neutral, wearing glasses, wearing cap, green background"
        );
        assert_eq!(caption_of(&scene(5)), captions[1]);
        assert_ne!(scene(5).grain, scene(1).grain, "the same prompt has other noise");
    }
}
