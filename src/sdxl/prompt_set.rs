//! The prompts of a series of images: their texts, and the LoRAs that they call.

use anyhow::Result;

use super::lora_stack::LoraStack;
use super::prompt::{LoraTag, PromptSyntax, calls_embedding, check, emphasis, lora_tags, not_supported};
use crate::failure::Failure;
use crate::progress;

/// Prompts, read in one syntax.
#[derive(Clone, Debug)]
pub struct PromptSet {
    /// In order, without LoRA tags.
    pub texts: Vec<String>,
    /// Negative prompt of all images.
    pub negative: Option<String>,
    /// The LoRAs that every prompt calls.
    pub loras: Vec<LoraTag>,
    /// How the texts are read.
    pub syntax: PromptSyntax,
}

impl PromptSet {
    /// Reads the prompts; warns of what this program reads as text and others do not.
    ///
    /// # Errors
    /// [`Failure::Usage`] for LoRA tags that are wrong or differ between the prompts, and for brackets nested too deep.
    pub fn read(prompts: &[String], negative: Option<&str>, syntax: PromptSyntax) -> Result<Self> {
        if syntax == PromptSyntax::Plain {
            let (texts, negative) = (prompts.to_vec(), negative.map(String::from));
            return Ok(Self { texts, negative, loras: Vec::new(), syntax });
        }
        let mut tags: Option<Vec<LoraTag>> = None;
        let mut texts = Vec::new();
        for prompt in prompts {
            let (text, called) = lora_tags(prompt).map_err(Failure::Usage)?;
            if tags.get_or_insert_with(|| called.clone()) != &called {
                let why = "the prompts call different LoRAs; generate these images in separate calls";
                return Err(Failure::Usage(why.into()).into());
            }
            texts.push(text);
        }
        let negative = negative.map(lora_tags).transpose().map_err(Failure::Usage)?;
        let negative = negative.map(|(text, called)| {
            if let Some(tag) = called.first() {
                progress::warn(format_args!(
                    "<lora:{}> in the negative prompt is ignored: LoRAs apply to both prompts, or with \
                     --lora-positive-only to the prompt",
                    tag.name
                ));
            }
            text
        });
        let all = || texts.iter().chain(&negative);
        let mut unsupported: Vec<&str> = Vec::new();
        for text in all() {
            check(text, syntax).map_err(Failure::Usage)?;
            unsupported.extend(not_supported(text, syntax));
        }
        unsupported.sort_unstable();
        unsupported.dedup();
        if !unsupported.is_empty() {
            let names = unsupported.join(", ");
            progress::warn(format_args!("not supported in prompts, and read as text: {names}"));
        }
        if let Some((word, weight)) = all().find_map(|text| emphasis(text, syntax)) {
            progress::note(format_args!(
                "`{word}` has the weight {weight:.2} by its brackets; write \\( and \\) for brackets in the text, or use \
                 --prompt-syntax plain"
            ));
        }
        Ok(Self { texts, negative, loras: tags.unwrap_or_default(), syntax })
    }

    /// Notes which textual inversions the prompts call, and which they do not.
    pub fn note_embeddings(&self, loras: &LoraStack) {
        let prompts = || self.texts.iter().chain(&self.negative);
        let known = loras.embeddings();
        for (file, embedding) in &known {
            let (name, count) = (&embedding.name, embedding.vectors());
            let word = match self.syntax {
                PromptSyntax::Comfyui => format!("embedding:{name}"),
                _ => name.clone(),
            };
            if prompts().any(|prompt| calls_embedding(prompt, name, self.syntax)) {
                progress::note(format_args!(
                    "`{word}` stands for {count} textual inversion vectors of `{file}`"
                ));
            } else {
                progress::note(format_args!(
                    "`{file}` brings the textual inversion `{name}`, which no prompt calls; write `{word}` in the prompt"
                ));
            }
        }
        let unknown = |word: &&str| {
            let name = word.strip_prefix("embedding:").map(|name| name.trim_end_matches(','));
            name.is_some_and(|name| !known.iter().any(|(_, embedding)| embedding.name.starts_with(name)))
        };
        let comfyui = prompts().filter(|_| self.syntax == PromptSyntax::Comfyui);
        for word in comfyui.flat_map(|prompt| prompt.split_whitespace()).filter(unknown) {
            progress::warn(format_args!("there is no embedding for `{word}`: give its file as --embedding"));
        }
    }
}
