//! Class images for prior preservation: images of anybody of the class, drawn by the base where they are missing.

use std::path::Path;

use anyhow::{Context, Result};

use crate::image::images_in;
use crate::progress;
use crate::recipes::dreambooth::config::Settings;
use crate::recipes::dreambooth::lockstep::Networks;
use crate::recipes::dreambooth::previews::Previewer;
use crate::sdxl::pipeline::SdxlLoader;
use crate::sdxl::text::TextEncoders;

/// Generates the images that are missing in `folder`, number by number, so that an interrupted run continues.
/// Images of other names in the folder count too.
pub fn complete(
    folder: &Path,
    model: &SdxlLoader,
    text: &TextEncoders,
    previewer: &Previewer,
    settings: &Settings,
) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
    let there = images_in(folder)?;
    let wanted = settings.objective.class_images as usize;
    let missing = wanted.saturating_sub(there.len());
    if missing == 0 {
        return Ok(());
    }
    let prompt = text.encode_prompts(&[settings.class_prompt().as_str()])?;
    let networks = Networks { unet: model.load_unet()?, text: None };
    let bar = progress::bar(wanted as u64, "class");
    bar.set_position(there.len() as u64);
    bar.reset_eta();
    let names = (1..).map(|number| (number, folder.join(format!("class-{number:05}.png"))));
    for (number, path) in names.filter(|(_, path)| !path.exists()).take(missing) {
        progress::check()?;
        let (steps, guidance) = (settings.samples.steps, settings.samples.guidance);
        let seed = settings.seed + number;
        for image in previewer.draw(&networks, &prompt, seed, steps, guidance)? {
            image.save(&path, None)?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}
