//! Two worlds of the same people: how scenes are chosen, captioned and labelled.

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::named::named;
use crate::synthetic::descriptions::{Detail, describe};
use crate::synthetic::people::{
    Backdrop, Beard, Clothing, Colour, EyeColour, Framing, HairColour, HairStyle, Held, Lighting, Person,
    Scene, Style,
};
use crate::synthetic::{CaptionOptions, caption};

named! {
    /// How scenes vary.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum World {
        /// Head, camera, exposure and grain vary without a word; three styles.
        #[default]
        Varied = "varied",
        /// The face is at one place and size, and everything that varies has a word; sixteen styles, scenes and things.
        Aligned = "aligned",
    }
}

/// One attribute of an image with the words of its classes.
pub type Attribute = (&'static str, Vec<&'static str>);

impl World {
    /// Whether it is the default, which settings files leave out.
    pub fn is_varied(&self) -> bool {
        *self == Self::Varied
    }

    /// Scene number `image` of one person's own list.
    pub fn scene(self, person: &Person, image: u64) -> Scene {
        match self {
            Self::Varied => Scene::draw_for(person, image),
            Self::Aligned => Scene::aligned_for(person, image),
        }
    }

    /// Scene number `image` of a list that all people share.
    pub fn shared_scene(self, seed: u64, image: u64) -> Scene {
        match self {
            Self::Varied => Scene::draw(seed, image),
            Self::Aligned => Scene::aligned_shared(seed, image),
        }
    }

    /// A caption that says a random part of what could be said; `full` is the probability that a caption of the varied
    /// world says all about the person, `drop` the one of leaving a part of the scene out.
    pub fn caption(self, person: &Person, scene: &Scene, full: f64, drop: f32, rng: &mut impl Rng) -> String {
        match self {
            Self::Varied => {
                let attributes = if rng.random_bool(full) { usize::MAX } else { rng.random_range(0..=5) };
                let options = CaptionOptions { subject: "person", attributes, drop };
                caption(person, scene, options, rng.random())
            }
            Self::Aligned => describe(person, scene, "person", Detail::Random, rng),
        }
    }

    /// Attributes of an image as classes. The first six are those of [`Scene::class_words`]; the aligned world has more
    /// styles and backgrounds after the first ones, and more attributes.
    pub fn attributes(self) -> Vec<Attribute> {
        let mut list: Vec<Attribute> =
            Scene::class_words().into_iter().map(|(name, words)| (name, words.to_vec())).collect();
        if self == Self::Aligned {
            list[STYLE].1 = Style::WORDS.to_vec();
            list[BACKGROUND].1.extend(&Backdrop::WORDS[1..]);
            list.extend([
                ("clothing", Clothing::WORDS.to_vec()),
                ("cloth_colour", Colour::WORDS.to_vec()),
                ("held", Held::WORDS.to_vec()),
                ("lighting", Lighting::WORDS.to_vec()),
                ("framing", Framing::WORDS.to_vec()),
                ("hair_style", HairStyle::WORDS.to_vec()),
                ("hair_colour", HairColour::WORDS.to_vec()),
                ("beard", Beard::WORDS.to_vec()),
                ("eye_colour", EyeColour::WORDS.to_vec()),
            ]);
        }
        list
    }

    /// The class of each attribute, in the order of [`World::attributes`].
    pub fn labels(self, person: &Person, scene: &Scene) -> Vec<usize> {
        let mut labels = scene.classes().to_vec();
        if self == Self::Aligned {
            if scene.backdrop != Backdrop::Plain {
                labels[BACKGROUND] = Colour::ALL.len() + scene.backdrop as usize - 1;
            }
            let who = &person.identity;
            labels.extend([
                scene.clothing as usize,
                scene.cloth as usize,
                scene.held as usize,
                scene.lighting as usize,
                scene.framing() as usize,
                who.hair_style_kind() as usize,
                who.hair_colour_kind() as usize,
                who.beard_kind() as usize,
                who.eye_colour_kind() as usize,
            ]);
        }
        labels
    }
}

/// Places of two attributes in [`Scene::class_words`].
const STYLE: usize = 4;
const BACKGROUND: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Facing;

    #[test]
    fn every_label_is_a_class_of_its_attribute_and_every_class_occurs() {
        for world in [World::Varied, World::Aligned] {
            let attributes = world.attributes();
            assert_eq!((attributes[STYLE].0, attributes[BACKGROUND].0), ("style", "background"));
            let mut seen: Vec<Vec<bool>> =
                attributes.iter().map(|(_, words)| vec![false; words.len()]).collect();
            for number in 0..1500 {
                let person = Person::new(2, number);
                let labels = world.labels(&person, &world.scene(&person, 0));
                assert_eq!(labels.len(), attributes.len());
                labels.iter().enumerate().for_each(|(attribute, class)| seen[attribute][*class] = true);
            }
            let missing =
                |(seen, (name, _)): (&Vec<bool>, &Attribute)| seen.contains(&false).then(|| name.to_string());
            assert_eq!(seen.iter().zip(&attributes).find_map(missing), None, "{world:?}");
        }
    }

    #[test]
    fn aligned_faces_move_only_where_a_word_says_so() {
        for number in 0..200 {
            let person = Person::new(3, number);
            let scene = Scene::aligned_for(&person, number % 3);
            assert_eq!((scene.shift, scene.gain, scene.noise), ([0.0, -0.06], 1.0, 0.0));
            assert!(scene.facing() != Facing::Ahead || scene.yaw == 0.0);
            assert!(matches!(scene.lighting, Lighting::Left | Lighting::Right) || scene.light == 0.0);
            assert!((scene.scale - 0.9).abs() < 1e-6 || scene.framing() != Framing::Normal);
        }
    }
}
