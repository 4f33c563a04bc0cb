//! Reports of an evaluation: JSON and a Markdown table.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};

use crate::eval::html::{Page, PersonRow};
use crate::eval::measures::Measure;
use crate::eval::methods::{Generator, Method, PeopleOptions};
use crate::eval::metrics::Metrics;
use crate::eval::plots;
use crate::eval::prompts::PromptSet;
use crate::eval::renderer::Renderer;
use crate::eval::tables::{accuracy_of, interval, plain, table};
use crate::eval::weight_space::WeightSpace;
use crate::files;
use crate::image::{Image, contact_sheet};
use crate::statistics::Mean;

/// What an evaluation found.
pub struct Findings {
    /// For `table.json`.
    pub report: Value,
    /// The same for readers, in Markdown.
    pub text: String,
    /// Images beside each other.
    pub sheet: Image,
    /// One self-contained file with all of it, for evaluations of people.
    pub html: Option<String>,
    /// A line an image, likewise.
    pub csv: Option<String>,
    /// Of the table, likewise.
    pub rows: Vec<MethodRow>,
}

impl Findings {
    /// Refuses a folder whose files are `inputs`, or files of the user's.
    ///
    /// # Errors
    /// As [`files::refuse_inputs`] and [`files::check_writable`].
    pub fn check_outputs(folder: &Path, inputs: &[PathBuf]) -> Result<()> {
        let written = ["table.json", "table.md", "sheet.png", "report.html", "images.csv"];
        let written = written.map(|name| folder.join(name));
        files::refuse_inputs(&written.each_ref().map(PathBuf::as_path), inputs)?;
        written.iter().try_for_each(|path| files::check_writable(path))
    }

    /// Writes table.json, table.md, sheet.png, and where there are any report.html and images.csv.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(&self.report)? + "\n";
        files::write_whole(&folder.join("table.json"), json.as_bytes())?;
        files::write_whole(&folder.join("table.md"), self.text.as_bytes())?;
        let parameters = format!("contact sheet\n{}", files::version_mark());
        self.sheet.save(&folder.join("sheet.png"), Some(&parameters))?;
        for (name, text) in [("report.html", &self.html), ("images.csv", &self.csv)] {
            if let Some(text) = text {
                files::write_whole(&folder.join(name), text.as_bytes())?;
            }
        }
        Ok(())
    }
}

/// One row of the table.
#[derive(Serialize)]
pub struct MethodRow {
    /// Which LoRA.
    pub method: Method,
    /// Of its images.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// Mean pixel distance to the images with the own LoRA, as a fraction of the range of a pixel.
    pub pixels_from_own: Option<Mean>,
    /// Beside the main metrics.
    pub measures: Vec<Measure>,
}

/// A paired difference in similarity.
#[derive(Serialize)]
pub struct Difference {
    /// Which method.
    pub of: Method,
    /// Against which.
    pub over: Method,
    /// Over the people that both have a similarity for.
    pub similarity: Option<Mean>,
}

/// Results for people.
pub struct PeopleReport<'a> {
    /// How many.
    pub people: usize,
    /// Base and judges.
    pub renderer: &'a Renderer,
    /// The hypernetwork.
    pub generator: Option<&'a Generator>,
    /// How the images were made.
    pub options: &'a PeopleOptions,
    /// Prompts of each person's images.
    pub prompts: &'a PromptSet,
    /// Rows of the table.
    pub methods: Vec<MethodRow>,
    /// The generated LoRA against the other methods.
    pub differences: Vec<Difference>,
    /// Measures that could not be taken, with the reason.
    pub left_out: Vec<String>,
    /// The generated LoRAs themselves, where the people's own ones are known.
    pub weight_space: Option<WeightSpace>,
}

impl PeopleReport<'_> {
    /// Settings, models, and all numbers.
    pub fn to_json(&self) -> Value {
        let PeopleOptions { sampling, refinement, .. } = self.options;
        let judges = &self.renderer.judges;
        let sample = self.generator.map(|generator| &generator.options);
        json!({
            "people": self.people,
            "pictures": self.prompts.prompts.len(),
            "prompt_set": self.prompts.name,
            "prompts": self.texts(),
            "drawing": sampling.to_json(),
            "generating": sample.map(|sample| json!({
                "steps": sample.steps,
                "guidance": sample.guidance,
                "samples": sample.samples,
                "strength": sample.strength,
            })),
            "refining": refinement.map(|refinement| json!({ "steps": refinement.steps, "rate": refinement.rate })),
            "base": self.renderer.base,
            "hypernet": self.generator.map(|generator| &generator.name),
            "recogniser": judges.recogniser_ids().first(),
            "recognisers": judges.recogniser_ids(),
            "image_encoders": judges.encoders.iter().map(|encoder| json!({
                "measure": encoder.title,
                "name": encoder.id.name,
                "sha256": encoder.id.sha256,
            })).collect::<Value>(),
            "judge": judges.record(),
            "rank_1_by_chance": 1.0 / self.people as f64,
            "methods": self.methods,
            "differences": self.differences,
            "left_out": self.left_out,
            "weight_space": self.weight_space,
        })
    }

    /// The table, how to read it, the further measures, the paired differences and the prompts.
    pub fn to_markdown(&self) -> String {
        let mut prompts = self.texts();
        prompts.dedup();
        let more = prompts.len().saturating_sub(SHOWN_PROMPTS);
        let mut text: String =
            prompts.iter().take(SHOWN_PROMPTS).map(|prompt| format!("- {prompt}\n")).collect();
        if more > 0 && self.prompts.prompts.iter().all(|prompt| prompt.requested.is_empty()) {
            text += &format!("- and {more} more of `{}`\n", self.prompts.name);
        }
        let mut parts = format!("{}\n{}{}", self.table(), self.legend(), self.judge_legend());
        let measures = self.measures();
        if !measures.is_empty() {
            parts += &format!("\nFurther measures, means over people with 95 % intervals:\n\n{measures}");
        }
        if let Some(table) = self.weights() {
            parts += &format!("\nThe LoRAs themselves, by inner products of ΔW:\n\n{table}");
        }
        for why in &self.left_out {
            parts += &format!("\nLeft out: {why}.\n");
        }
        if !self.differences.is_empty() {
            parts += "\nDiffLoRA against, in similarity to the person, pair by pair:\n";
            for difference in &self.differences {
                parts += &format!("- {}: {}\n", difference.over.key(), interval(difference.similarity));
            }
        }
        format!("{parts}\nPrompts:\n{text}")
    }

    /// The prompts of a person.
    fn texts(&self) -> Vec<String> {
        self.prompts.texts("person")
    }

    /// A row a measure, a column a method: there are more measures than fit beside each other.
    fn measures(&self) -> String {
        let with: Vec<&MethodRow> = self.methods.iter().filter(|row| !row.measures.is_empty()).collect();
        let mut names: Vec<&str> = Vec::new();
        for measure in with.iter().flat_map(|row| &row.measures) {
            if !names.contains(&measure.name.as_str()) {
                names.push(&measure.name);
            }
        }
        if names.is_empty() {
            return String::new();
        }
        let head: Vec<String> =
            std::iter::once("measure".to_string()).chain(with.iter().map(|row| row.method.title())).collect();
        let cell = |row: &MethodRow, name: &str| {
            let measure = row.measures.iter().find(|measure| measure.name == name);
            interval(measure.map(|measure| measure.value))
        };
        let rows = names.iter().map(|name| {
            std::iter::once((*name).to_string()).chain(with.iter().map(|row| cell(row, name))).collect()
        });
        table(&head, &rows.collect::<Vec<Vec<String>>>())
    }

    /// `report.html` with everyone's images.
    pub fn to_html(&self, people: Vec<PersonRow>) -> Result<String> {
        let mut tables = vec![("Methods".to_string(), self.table())];
        let measures = self.measures();
        if !measures.is_empty() {
            tables.push(("Further measures".into(), measures));
        }
        tables.extend(self.weights().map(|table| ("The LoRAs themselves".to_string(), table)));
        let bar = |of: &dyn Fn(&MethodRow) -> Option<Mean>| -> Vec<(String, (f64, f64))> {
            let value = |row: &MethodRow| {
                let mean = of(row)?;
                Some((row.method.title(), (mean.mean, mean.half_width.unwrap_or(0.0))))
            };
            self.methods.iter().filter_map(value).collect()
        };
        let recogniser = self.recogniser();
        let plots = vec![
            plots::bars(
                &format!("Similarity to the person ({recogniser})"),
                &bar(&|row| row.metrics.similarity),
            )?,
            plots::bars("Same − different", &bar(&|row| row.metrics.same_minus_different))?,
            plots::bars("Right among all people", &bar(&|row| row.metrics.rank_1))?,
        ];
        let mut notes = vec![self.legend(), self.judge_legend()];
        notes.extend(self.left_out.iter().map(|why| format!("Left out: {why}.")));
        let base = &self.renderer.base.name;
        let title = match self.generator {
            Some(generator) => format!("Evaluation of `{}` on the base `{base}`", generator.name),
            None => format!("Evaluation of LoRAs on the base `{base}`"),
        };
        Ok(Page { title, tables, plots, notes, people }.to_html())
    }

    /// Name of the first recogniser.
    fn recogniser(&self) -> String {
        self.renderer.judges.recogniser_ids().into_iter().next().map_or(String::new(), |id| id.name)
    }

    fn weights(&self) -> Option<String> {
        let space = self.weight_space.as_ref()?;
        let rows = [
            ("relative error ‖ΔŴ − ΔW‖ / ‖ΔW‖", interval(space.relative_error)),
            ("cosine", interval(space.cosine)),
            ("cosine without the mean LoRA", interval(space.centred_cosine)),
            ("relative error of the singular values", interval(space.singular_value_error)),
            ("right person's LoRA is the nearest", interval(space.retrieval)),
            ("nearest training LoRA, cosine without the mean", interval(space.nearest_training)),
            ("the same of the held-out people's own LoRAs", interval(space.nearest_training_of_own)),
            ("nearer to a training LoRA than every held-out one", plain(Some(space.copy_rate))),
        ];
        let head = ["generated LoRAs".to_string(), format!("{} training LoRAs", space.training)];
        Some(table(&head, &rows.map(|(name, value)| vec![name.to_string(), value])))
    }

    fn attributes(&self) -> impl Iterator<Item = &'static str> {
        self.methods.first().into_iter().flat_map(|row| &row.metrics.prompt_accuracy).map(|row| row.attribute)
    }

    fn table(&self) -> String {
        let factors = self.renderer.judges.attributes.is_some();
        let mut head = vec![
            "method",
            "similarity",
            "similarity (missing = 0)",
            "face found",
            "same − different",
            "rank 1",
        ];
        head.push("distance to own LoRA");
        head.extend(factors.then_some("factors"));
        head.extend(self.attributes());
        let row = |MethodRow { method, metrics, pixels_from_own, .. }: &MethodRow| {
            let mut row = vec![
                method.title(),
                interval(metrics.similarity),
                interval(metrics.similarity_misses_zero),
                plain(metrics.detection.map(|mean| mean.mean)),
                interval(metrics.same_minus_different),
                plain(metrics.rank_1.map(|mean| mean.mean)),
                plain(pixels_from_own.map(|mean| mean.mean)),
            ];
            row.extend(factors.then(|| plain(metrics.factor_correlation)));
            row.extend(self.attributes().map(|attribute| accuracy_of(&metrics.prompt_accuracy, attribute)));
            row
        };
        let head: Vec<String> = head.into_iter().map(String::from).collect();
        table(&head, &self.methods.iter().map(row).collect::<Vec<_>>())
    }

    fn legend(&self) -> String {
        let PeopleOptions { sampling, .. } = self.options;
        let images = self.prompts.prompts.len();
        let recogniser = self.recogniser();
        format!(
            "{} people, {images} images each way from the same noise, {} steps, guidance {}, seed {}. \
             Similarity: cosine of {recogniser} to the person's other photos, 95 % intervals over people; rank 1 by chance \
             {:.3}. Distance to own LoRA: mean absolute pixel difference to its images, as a fraction of the range.\n\
             Images without a LoRA and with the mean LoRA are the same for everyone and generated once.\n",
            self.people,
            sampling.steps,
            sampling.guidance,
            sampling.seed,
            1.0 / self.people as f64
        )
    }

    fn judge_legend(&self) -> String {
        let Some(record) = self.renderer.judges.record() else { return String::new() };
        let known: Vec<String> = record
            .attributes
            .iter()
            .filter(|known| self.attributes().any(|attribute| attribute == known.name))
            .map(|known| format!("{} {:.2}", known.name, known.accuracy))
            .collect();
        format!(
            "Factors: correlation with the truth of the {} factors that the attribute classifier sees in painted photos.\n\
             Accuracy of the attribute classifier on painted images: {}.\n",
            self.renderer.judges.visible_factors().len(),
            known.join(", ")
        )
    }
}

/// Prompts that a table lists.
const SHOWN_PROMPTS: usize = 4;

/// A contact sheet; small images are shown at twice their size.
pub fn sheet(rows: &[Vec<&Image>]) -> Image {
    let side = rows.iter().flatten().map(|image| image.width.max(image.height)).max().unwrap_or(64);
    contact_sheet(rows, if side <= 128 { 2 * side } else { side }, 6)
}
