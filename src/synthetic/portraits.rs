//! A folder of painted images of one person, with captions and the attributes that they were painted from.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{CaptionOptions, Detail, Person, Scene, World, describe, identity_words, paint};
use crate::image::Image;
use crate::{files, progress, train};

/// How the images are painted.
pub struct Portraits {
    /// Images per person.
    pub images: u64,
    /// How scenes vary.
    pub world: World,
    /// Seed of scenes that all people share; scenes of their own where it is `None`.
    pub scenes: Option<u64>,
    /// Side in pixels.
    pub size: usize,
    /// Samples per pixel side.
    pub supersample: usize,
    /// Word for the person in captions.
    pub subject: String,
    /// Most attributes of the person in a caption.
    pub attributes: usize,
}

impl Portraits {
    /// Writes the images and captions of one person into `folder`, then person.json. `painted` is called for each image.
    ///
    /// # Errors
    /// A folder that cannot be written, or Ctrl-C.
    pub fn paint(&self, person: &Person, folder: &Path, painted: impl Fn()) -> Result<()> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
        // person.json is written last, and by this program alone.
        let is_own = folder.join("person.json").is_file();
        let write = |path: &Path, bytes: &[u8]| match is_own {
            true => files::write_whole(path, bytes),
            false => files::write_new(path, bytes),
        };
        let options = CaptionOptions { subject: &self.subject, attributes: self.attributes, drop: 0.0 };
        let mut records = Vec::new();
        for number in 1..=self.images {
            progress::check()?;
            let scene = match self.scenes {
                Some(seed) => self.world.shared_scene(seed, number),
                None => self.world.scene(person, number),
            };
            let rgb = paint(person, &scene, self.size, self.supersample);
            let caption = match (self.world, self.attributes) {
                (World::Varied, _) => super::caption(person, &scene, options, person.seed),
                (World::Aligned, attributes) => {
                    let detail = if attributes == 0 { Detail::Short } else { Detail::All };
                    describe(person, &scene, &self.subject, detail, &mut train::rng(person.seed, scene.grain))
                }
            };
            let image = format!("{number:04}.png");
            let painted_image = Image { width: self.size, height: self.size, rgb };
            write(&folder.join(&image), &painted_image.to_png(None)?)?;
            write(&folder.join(&image).with_extension("txt"), format!("{caption}\n").as_bytes())?;
            records.push(serde_json::to_string(&Record { image, caption, scene })?);
            painted();
        }
        files::write_whole(&folder.join("person.json"), about(person, &records)?.as_bytes())
    }
}

/// What is known about one image.
#[derive(Serialize)]
struct Record {
    #[serde(rename = "picture")]
    image: String,
    caption: String,
    scene: Scene,
}

/// `person.json`: seed, number, identity words and factors, and one line an image.
fn about(person: &Person, records: &[String]) -> Result<String> {
    let Person { seed, number, identity } = person;
    let words = serde_json::to_string(&identity_words(identity))?;
    let factors = serde_json::to_string(identity)?;
    let images = records.join(",\n");
    Ok(format!(
        "{{\"seed\":{seed},\"number\":{number},\"words\":{words},\n\"identity\":{factors},\n\"pictures\":[\n{images}\n]}}\n"
    ))
}
