//! Reports of an evaluation: JSON and a Markdown table.

use serde::Serialize;
use serde_json::{Value, json};

use crate::eval::methods::{Generator, Method, PeopleOptions};
use crate::eval::metrics::Metrics;
use crate::eval::renderer::Renderer;
use crate::eval::tables::{accuracy_of, interval, plain, table};
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
    pub generator: &'a Generator,
    /// How the images were made.
    pub options: &'a PeopleOptions,
    /// Prompts of each person's images.
    pub captions: &'a [String],
    /// Rows of the table.
    pub methods: Vec<MethodRow>,
    /// The generated LoRA against the other methods.
    pub differences: Vec<Difference>,
}

impl PeopleReport<'_> {
    /// Settings, models, and all numbers.
    pub fn to_json(&self) -> Value {
        let PeopleOptions { images, sampling, refinement } = self.options;
        let (judges, sample) = (&self.renderer.judges, &self.generator.options);
        json!({
            "people": self.people,
            "pictures": images,
            "prompts": self.captions,
            "drawing": sampling.to_json(),
            "generating": {
                "steps": sample.steps,
                "guidance": sample.guidance,
                "samples": sample.samples,
                "strength": sample.strength,
            },
            "refining": refinement.map(|refinement| json!({ "steps": refinement.steps, "rate": refinement.rate })),
            "base": self.renderer.base,
            "hypernet": self.generator.name,
            "recogniser": judges.recogniser_id(),
            "judge": judges.record(),
            "rank_1_by_chance": 1.0 / self.people as f64,
            "methods": self.methods,
            "differences": self.differences,
        })
    }

    /// The table, how to read it, the paired differences and the prompts.
    pub fn to_markdown(&self) -> String {
        let mut prompts = self.captions.to_vec();
        prompts.dedup();
        let prompts: String = prompts.iter().take(4).map(|prompt| format!("- {prompt}\n")).collect();
        let differences: String = self
            .differences
            .iter()
            .map(|difference| format!("- {}: {}\n", difference.over.key(), interval(difference.similarity)))
            .collect();
        format!(
            "{}\n{}{}\nDiffLoRA against, in similarity to the person, pair by pair:\n{differences}\nPrompts:\n{prompts}",
            self.table(),
            self.legend(),
            self.judge_legend(),
        )
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
        let row = |MethodRow { method, metrics, pixels_from_own }: &MethodRow| {
            let mut row = vec![
                method.title().to_string(),
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
        let PeopleOptions { images, sampling, .. } = self.options;
        format!(
            "{} held-out people, {images} images each way from the same noise, {} steps, guidance {}, seed {}. \
             Similarity: cosine of SFace to the person's other photos, 95 % intervals over people; rank 1 by chance \
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

/// A contact sheet; small images are shown at twice their size.
pub fn sheet(rows: &[Vec<&Image>]) -> Image {
    let side = rows.iter().flatten().map(|image| image.width.max(image.height)).max().unwrap_or(64);
    contact_sheet(rows, if side <= 128 { 2 * side } else { side }, 6)
}
