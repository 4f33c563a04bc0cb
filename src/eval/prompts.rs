//! The prompts that people are evaluated with.

use std::path::Path;

use anyhow::Result;

use crate::eval::metrics::{RequestedClasses, requested_classes};
use crate::failure::Failure;
use crate::files;
use crate::named::Named;
use crate::synthetic::scenes::scene_caption;
use crate::synthetic::{Backdrop, Colour, Expression, Glasses, Hat, Held, Lighting, Scene, World};

/// Stands for the class word of a person in a prompt.
pub const CLASS: &str = "{class}";

/// The sets that are built in, with a line about each.
pub const BUILT_IN: [(&str, &str); 2] = [
    ("photomaker-40", include_str!("prompt_sets/photomaker_40.txt")),
    ("dreambooth-25", include_str!("prompt_sets/dreambooth_25.txt")),
];

/// Images of a painted person unless another number is asked for: each of the four prompts once.
const PAINTED_IMAGES: u64 = 4;

/// Largest file of prompts, in bytes.
const MOST_BYTES: u64 = 4 << 20;

/// A prompt, and the number that selects its noise.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// With [`CLASS`] in the place of the person.
    pub text: String,
    /// The same for every person and method.
    pub grain: u64,
    /// The attributes that it asks for, where it describes a painted scene.
    pub requested: RequestedClasses,
}

/// The prompts of an evaluation, one for each image of a person.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptSet {
    /// For the report.
    pub name: String,
    /// In the order of the images.
    pub prompts: Vec<Prompt>,
}

impl PromptSet {
    /// `images` portraits of a painted world, four prompts in turn.
    pub fn painted(world: World, images: u64) -> Self {
        let prompt = |i| {
            let scene = scene(world, i);
            Prompt {
                text: scene_caption(world, &scene, 0),
                grain: scene.grain,
                requested: requested_classes(world, None, &scene),
            }
        };
        Self { name: format!("{} world", world.name()), prompts: (0..images).map(prompt).collect() }
    }

    /// The set called `name`; without a name that of the painted `world`, else PhotoMaker's.
    ///
    /// # Errors
    /// As [`PromptSet::open`].
    pub fn choose(name: Option<&str>, world: Option<World>, images: Option<u64>) -> Result<Self> {
        match (name, world) {
            (None, Some(world)) => Ok(Self::painted(world, images.unwrap_or(PAINTED_IMAGES))),
            (name, _) => Self::open(name.unwrap_or(BUILT_IN[0].0), images),
        }
    }

    /// `images` prompts of a set that is built in, or of a text file with one a line; one of each by default.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a file that is missing, empty or not UTF-8.
    pub fn open(name: &str, images: Option<u64>) -> Result<Self> {
        let built_in = BUILT_IN.iter().find(|(known, _)| *known == name);
        let text = match built_in {
            Some((_, text)) => (*text).to_string(),
            None if !Path::new(name).exists() => {
                let known: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
                let why = format!("there is no such file, and the built-in sets are {}", known.join(" and "));
                return Err(Failure::unusable(Path::new(name), why));
            }
            None => files::read_text(Path::new(name), MOST_BYTES)?,
        };
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let lines: Vec<&str> = lines.collect();
        if lines.is_empty() {
            return Err(Failure::unusable(Path::new(name), "it has no prompt; write one a line"));
        }
        let prompts = (0..images.unwrap_or(lines.len() as u64))
            .map(|i| Prompt { text: lines[i as usize % lines.len()].into(), grain: i, requested: Vec::new() })
            .collect();
        Ok(Self { name: name.to_string(), prompts })
    }

    /// The texts for a person of class `word`, such as `woman`.
    pub fn texts(&self, word: &str) -> Vec<String> {
        self.prompts.iter().map(|prompt| prompt.text.replace(CLASS, word)).collect()
    }
}

/// The scene of image `i`: three portraits in turn, and one with glasses and a cap.
fn scene(world: World, i: u64) -> Scene {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_prompts_alternate_with_noise_of_their_own() {
        let set = PromptSet::painted(World::Varied, 8);
        let texts = set.texts("person");
        assert_eq!(texts[0], "a photo of a person, smiling, red background");
        assert_eq!(texts[3], "a photo of a person, neutral, wearing glasses, wearing cap, green background");
        assert_eq!(texts[5], texts[1]);
        assert_ne!(set.prompts[5].grain, set.prompts[1].grain, "the same prompt has other noise");
    }

    #[test]
    fn prompts_of_the_aligned_world_are_plain_portraits() {
        let caption = &PromptSet::painted(World::Aligned, 1).texts("person")[0];
        for part in ["a photo of a person", "smiling", "red background"] {
            assert!(caption.contains(part), "{caption}");
        }
    }

    #[test]
    fn built_in_sets_have_the_number_of_prompts_in_their_name_and_the_class_in_each() -> Result<()> {
        for (name, _) in BUILT_IN {
            let set = PromptSet::open(name, None)?;
            let number: usize = name.rsplit('-').next().unwrap().parse()?;
            assert_eq!(set.prompts.len(), number, "{name}");
            for text in set.texts("woman") {
                assert!(text.contains(" woman") && !text.contains('{'), "{text}");
            }
            let mut texts = set.texts("man");
            texts.sort();
            texts.dedup();
            assert_eq!(texts.len(), number, "no prompt twice");
        }
        assert_eq!(PromptSet::open("photomaker-40", Some(50))?.prompts.len(), 50);
        Ok(())
    }

    #[test]
    fn a_file_of_prompts_has_comments_and_must_hold_something() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("prompts.txt");
        std::fs::write(&path, "# two\na {class} at sea\r\n\n a {class} in snow \n")?;
        let set = PromptSet::open(&path.display().to_string(), Some(3))?;
        assert_eq!(set.texts("man"), ["a man at sea", "a man in snow", "a man at sea"]);
        std::fs::write(&path, "\n# nothing\n")?;
        let error = PromptSet::open(&path.display().to_string(), None).unwrap_err().to_string();
        assert!(error.contains("prompts.txt") && error.contains("no prompt"), "{error}");
        std::fs::write(&path, b"\xff\xfe")?;
        assert!(PromptSet::open(&path.display().to_string(), None).is_err());
        let error = PromptSet::open("photomaker40", None).unwrap_err().to_string();
        assert!(error.contains("photomaker-40"), "{error}");
        Ok(())
    }
}
