//! Captions of portraits, from what is known about them.
//!
//! ```text
//! a STYLE of a SUBJECT[, IDENTITY WORDS][, EXPRESSION][, facing left|right][, wearing glasses][, wearing cap]
//! [, COLOUR background]
//! ```
//! for example `a photo of a person, brown hair, smiling, facing left, wearing cap, red background`.

use rand::Rng;
use rand::seq::SliceRandom;

use crate::synthetic::descriptions;
use crate::synthetic::people::{
    Beard, Colour, Expression, EyeColour, Facing, Glasses, HairColour, HairStyle, Hat, Identity, Person,
    Scene, Style, stream,
};

/// Content of a caption.
#[derive(Clone, Copy, Debug)]
pub struct CaptionOptions<'a> {
    /// Subject of the caption: `person`, or `sks person` for the person of a LoRA.
    pub subject: &'a str,
    /// At most so many words about the identity, chosen at random; 0 for none.
    pub attributes: usize,
    /// Probability of leaving out each of expression, direction and background. Glasses and hats are
    /// always named, since a model that meets them unnamed paints them anywhere.
    pub drop: f32,
}

impl Default for CaptionOptions<'_> {
    fn default() -> Self {
        Self { subject: "person", attributes: 0, drop: 0.0 }
    }
}

/// The caption of a portrait of `person` in `scene`; equal for an equal `seed`.
pub fn caption(person: &Person, scene: &Scene, options: CaptionOptions, seed: u64) -> String {
    let mut rng = stream(seed, *b"captions", person.number, scene.grain);
    let mut parts = vec![format!("a {} of a {}", scene.style.word(), options.subject)];

    let mut attributes = identity_words(&person.identity);
    attributes.shuffle(&mut rng);
    parts.extend(attributes.into_iter().take(options.attributes).map(str::to_owned));

    let mut said = || rng.random::<f32>() >= options.drop;
    if said() {
        parts.push(scene.expression.word().to_owned());
    }
    if said() && scene.facing() != Facing::Ahead {
        parts.push(scene.facing().word().to_owned());
    }
    if scene.glasses != Glasses::None {
        parts.push(format!("wearing {}", scene.glasses.word()));
    }
    if scene.hat != Hat::None {
        parts.push(format!("wearing {}", scene.hat.word()));
    }
    if said() {
        parts.push(format!("{} background", scene.background.word()));
    }
    parts.join(", ")
}

/// Every word that captions can contain, each once, in a fixed order.
pub fn vocabulary() -> Vec<&'static str> {
    let frame: &[&str] = &["a of person sks wearing background"];
    let styles = &Style::WORDS[..Style::FIRST.len()];
    let phrases = [
        frame,
        styles,
        Expression::WORDS,
        &Facing::WORDS[1..],
        &Glasses::WORDS[1..],
        &Hat::WORDS[1..],
        Colour::WORDS,
        HairStyle::WORDS,
        HairColour::WORDS,
        EyeColour::WORDS,
        &Beard::WORDS[1..],
        SKIN_WORDS,
        FACE_WORDS,
        &[FRECKLES],
    ];
    let mut words = Vec::new();
    let first = phrases.into_iter().flatten().flat_map(|phrase| phrase.split(' '));
    for word in first.chain(descriptions::words()) {
        if !words.contains(&word) {
            words.push(word);
        }
    }
    words
}

const SKIN_WORDS: &[&str] = &["pale skin", "tan skin", "dark skin"];
const FACE_WORDS: &[&str] = &["narrow face", "oval face", "wide face"];
const FRECKLES: &str = "freckles";

/// Words that describe the person.
pub fn identity_words(identity: &Identity) -> Vec<&'static str> {
    let mut words = vec![identity.hair_style_kind().word()];
    if identity.hair_style_kind() != HairStyle::Bald {
        words.push(identity.hair_colour_kind().word());
    }
    if identity.beard_kind() != Beard::None {
        words.push(identity.beard_kind().word());
    }
    words.push(SKIN_WORDS[((identity.skin * 3.0) as usize).min(2)]);
    words.push(identity.eye_colour_kind().word());
    if identity.freckles > 0.85 {
        words.push(FRECKLES);
    }
    words.push(match identity.face_width {
        width if width < 0.3 => FACE_WORDS[0],
        width if width > 0.7 => FACE_WORDS[2],
        _ => FACE_WORDS[1],
    });
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caption_names_style_subject_and_scene() {
        let scene = Scene {
            style: Style::Photo,
            expression: Expression::Smiling,
            yaw: -0.3,
            glasses: Glasses::Dark,
            hat: Hat::Cap,
            background: Colour::Red,
            ..Scene::draw(0, 0)
        };
        let options = CaptionOptions { subject: "sks person", ..Default::default() };
        assert_eq!(
            caption(&Person::new(0, 1), &scene, options, 0),
            "a photo of a sks person, smiling, facing left, wearing sunglasses, wearing cap, red background"
        );
        let bare = Scene { glasses: Glasses::None, hat: Hat::None, ..scene };
        assert_eq!(
            caption(&Person::new(0, 1), &bare, CaptionOptions { drop: 1.0, ..Default::default() }, 0),
            "a photo of a person"
        );
    }

    #[test]
    fn every_word_of_every_caption_is_in_the_vocabulary() {
        let known = vocabulary();
        for number in 0..300 {
            let person = Person::new(9, number);
            let options = CaptionOptions { subject: "sks person", attributes: 99, drop: 0.2 };
            let text = caption(&person, &Scene::draw_for(&person, 0), options, 1);
            for word in text.split([',', ' ']).filter(|word| !word.is_empty()) {
                assert!(known.contains(&word), "`{word}` of `{text}`");
            }
        }
    }

    #[test]
    fn an_equal_seed_gives_an_equal_caption_and_attributes_are_limited() {
        let person = Person::new(2, 5);
        let scene = Scene::draw(2, 1);
        let options = CaptionOptions { attributes: 2, drop: 0.5, ..Default::default() };
        assert_eq!(caption(&person, &scene, options, 4), caption(&person, &scene, options, 4));
        let text = caption(&person, &scene, options, 4);
        let named = identity_words(&person.identity).into_iter().filter(|word| text.contains(word)).count();
        assert!(named >= 2, "{text}");
    }
}
