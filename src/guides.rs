//! Guides: the documents of the modules, which `difflora help TOPIC` prints.

/// A guide in Markdown, which is also the documentation of a module.
pub struct Guide {
    /// Name by which it is asked for.
    pub name: &'static str,
    /// Its subject, in a line.
    pub about: &'static str,
    /// Markdown.
    pub text: &'static str,
}

/// All guides.
pub static GUIDES: [Guide; 8] = [
    Guide {
        name: "generate",
        about: "LoRAs from photos, images from prompts, precision and memory",
        text: include_str!("docs/generate.md"),
    },
    Guide {
        name: "lora-files",
        about: "LoRA formats, weights by part, merging and the tools",
        text: include_str!("docs/lora-files.md"),
    },
    Guide {
        name: "faces",
        about: "reference photos, face encoders and their licences",
        text: include_str!("docs/faces.md"),
    },
    Guide {
        name: "train-lora",
        about: "DreamBooth training, settings, many people at once",
        text: include_str!("docs/train-lora.md"),
    },
    Guide {
        name: "hypernetwork",
        about: "the dataset of LoRAs, autoencoder, transformer",
        text: include_str!("docs/hypernetwork.md"),
    },
    Guide {
        name: "evaluation",
        about: "people, methods, measures, figures of the paper",
        text: include_str!("docs/evaluation.md"),
    },
    Guide {
        name: "small-world",
        about: "the built-in models and how they were made",
        text: include_str!("docs/small-world.md"),
    },
    Guide {
        name: "install",
        about: "cargo features, completions, folders and variables",
        text: include_str!("docs/install.md"),
    },
];

impl Guide {
    /// The text without the marks around code blocks, which are indented instead.
    pub fn plain(&self) -> String {
        let mut code = false;
        let mut text = String::with_capacity(self.text.len());
        for line in self.text.lines() {
            if line.starts_with("```") {
                code = !code;
            } else if code && !line.is_empty() {
                text.extend(["    ", line, "\n"]);
            } else {
                text.extend([line, "\n"]);
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guides_have_a_title_and_no_measurements_in_tables_of_numbers() {
        for guide in &GUIDES {
            assert!(guide.text.starts_with("# "), "{}", guide.name);
            assert!(
                !guide.text.contains(" ± "),
                "{}: measurements belong into tests/bench/RESULTS.md",
                guide.name
            );
        }
    }
}
