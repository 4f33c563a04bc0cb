//! Errors of the predicted LoRAs of held-out people, beside baselines.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::dataset::latents::CHUNK;
use crate::dataset::lora_dataset::{LoraDataset, Split};
use crate::hypernet::mixer::GateFigures;
use crate::hypernet::row_source::RowSource;
use crate::hypernet::{Hypernet, LoraCodec, SampleOptions};
use crate::recipes::dit::training_set::LatentTrainingSet;
use crate::statistics::Mean;
use crate::train::trainer::Outcome;

/// Numbers of DDIM steps that are compared.
const STEPS: [usize; 6] = [1, 2, 4, 8, 20, 50];

/// The name of the row that the others are measured against.
const RIDGE: &str = "ridge regression";

/// Predictions for the people of a split.
enum Guess<'a> {
    /// Nothing: the mean LoRA.
    Mean,
    /// Latents, a row a photo (R, L).
    OfPhotos(Tensor),
    /// Latents, a row a person (M, L).
    OfPeople(Tensor),
    /// For each photo the LoRA of this person of another split.
    Others(&'a Split, Vec<u32>),
    /// The true LoRA, there and back.
    ThroughAutoencoder,
}

/// Errors of each person.
struct Figures {
    /// ‖x̂ − x‖², mean over the photos.
    errors: Vec<f64>,
    /// ‖x‖²
    powers: Vec<f64>,
    cosines: Vec<f64>,
}

impl Figures {
    /// Of the first `people` of `split`, whose guesses lie where `codec` computes; `asked` is whose LoRA is the truth for each person, everybody's own by itself.
    fn of(
        codec: &LoraCodec,
        split: &Split,
        people: usize,
        guess: &Guess,
        asked: Option<&[u32]>,
    ) -> Result<Self> {
        let references = split.references();
        let mut figures = Self { errors: Vec::new(), powers: Vec::new(), cosines: Vec::new() };
        for (person, photos) in references.iter().enumerate().take(people) {
            let whose = asked.map_or(person, |asked| asked[person] as usize);
            let vectors = |split: &Split, people: &[usize]| -> Result<Tensor> {
                let vectors = split.vectors.batch(people)?.to_device(codec.device())?;
                Ok(codec.standardise.apply(&vectors)?)
            };
            let truth = vectors(split, &[whose])?; // (1, P)
            let rows = |x: &Tensor, rows: &[u32]| -> Result<Tensor> {
                Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
            };
            let guesses = match guess {
                Guess::Mean => truth.zeros_like()?,
                Guess::OfPhotos(z) => codec.lae.decode(&rows(z, photos)?)?,
                Guess::OfPeople(z) => codec.lae.decode(&z.narrow(0, person, 1)?)?,
                Guess::Others(known, who) => {
                    let who: Vec<usize> = photos.iter().map(|photo| who[*photo as usize] as usize).collect();
                    vectors(known, &who)?
                }
                Guess::ThroughAutoencoder => codec.lae.decode(&codec.lae.encode(&truth)?)?,
            };
            let sums = |x: Tensor| -> Result<Vec<f64>> {
                Ok(x.sum(1)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1()?)
            };
            let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
            let power = mean(sums(truth.sqr()?)?);
            let dots = sums(guesses.broadcast_mul(&truth)?)?;
            let cosines = dots
                .iter()
                .zip(sums(guesses.sqr()?)?)
                .map(|(dot, own)| if own * power > 0.0 { dot / (own * power).sqrt() } else { 0.0 });
            figures.cosines.push(mean(cosines.collect()));
            figures.errors.push(mean(sums(guesses.broadcast_sub(&truth)?.sqr()?)?));
            figures.powers.push(power);
        }
        Ok(figures)
    }

    /// ‖x̂ − x‖² of each person in parts of the mean ‖x‖²: their mean is Σ‖x̂ − x‖² / Σ‖x‖².
    fn relative(&self) -> Vec<f64> {
        let power = self.powers.iter().sum::<f64>() / self.powers.len().max(1) as f64;
        self.errors.iter().map(|error| error / power).collect()
    }

    fn row(&self, name: &str, ridge: Option<&Figures>) -> Value {
        let half = |mean: Option<Mean>| mean.and_then(|mean| mean.half_width);
        let (error, cosine) = (Mean::of(&self.relative()), Mean::of(&self.cosines));
        let mut row = json!({
            "name": name,
            "relative_error": error.map(|mean| mean.mean),
            "cosine": cosine.map(|mean| mean.mean),
            "half_width": { "relative_error": half(error), "cosine": half(cosine) },
        });
        if let Some(ridge) = ridge {
            let differences: Vec<f64> =
                self.relative().iter().zip(ridge.relative()).map(|(own, ridge)| own - ridge).collect();
            row["over_ridge"] = json!(Mean::of(&differences));
        }
        row
    }
}

/// Errors on the people held out: of the hypernetwork from one photo, and of simpler ways.
pub fn report(
    hypernet: &Hypernet,
    data: &LatentTrainingSet,
    set: &LoraDataset,
    end: Outcome,
) -> Result<Value> {
    let Hypernet { codec, denoiser } = hypernet;
    let (new, kind, device) = (&set.held_out, denoiser.config.mixer.kind, codec.device());
    let sample = |faces: &Tensor, images: &Tensor, steps, samples| -> Result<Tensor> {
        let options = SampleOptions { steps, samples, ..hypernet.options() };
        let parts = (0..faces.dim(0)?).step_by(CHUNK).map(|from| {
            let count = CHUNK.min(faces.dim(0)? - from);
            denoiser.sample(&faces.narrow(0, from, count)?, &images.narrow(0, from, count)?, &options)
        });
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
    };
    let linear = data.fit.ridge.forward(&data.stats.seen(kind, &new.faces, &new.images)?)?;
    let linear = linear.to_device(device)?;
    let (faces, images) = (new.faces.to_device(device)?, new.images.to_device(device)?);
    let people = new.people();
    let ridge = Figures::of(codec, new, people, &Guess::OfPhotos(linear.clone()), None)?;

    let mut table = Vec::new();
    let mut add = |name: &str, guess: Guess, asked: Option<&[u32]>| -> Result<()> {
        let figures = Figures::of(codec, new, people, &guess, asked)?;
        table.push(figures.row(name, (name != RIDGE && asked.is_none()).then_some(&ridge)));
        Ok(())
    };
    add("mean LoRA", Guess::Mean, None)?;
    add("nearest person by face", Guess::Others(&set.train, nearest(set)?), None)?;
    add(RIDGE, Guess::OfPhotos(linear.clone()), None)?;
    add("ridge, mean of all photos", Guess::OfPeople(new.mean_per_person(&linear)?), None)?;
    for steps in STEPS {
        add(&format!("DDIM {steps}"), Guess::OfPhotos(sample(&faces, &images, steps, 1)?), None)?;
    }
    // Samples differ by what a face does not tell of a LoRA; their mean leaves that out, as one step does.
    let many = sample(&faces, &images, 20, 16)?;
    add("DDIM 20, mean of 16 samples", Guess::OfPhotos(many), None)?;
    let z = sample(&faces, &images, denoiser.config.steps, 4)?;
    let name = format!("DDIM {}, 4 samples", denoiser.config.steps);
    add(&name, Guess::OfPhotos(z.clone()), None)?;
    add(&format!("{name}, mean of all photos"), Guess::OfPeople(new.mean_per_person(&z)?), None)?;
    // The next person's LoRA is asked for: that is what a shuffled condition gives.
    let next: Vec<u32> = (0..people).map(|person| ((person + 1) % people) as u32).collect();
    add(&format!("{name}, shuffled"), Guess::OfPhotos(z), Some(&next))?;
    add("own LoRA through the autoencoder", Guess::ThroughAutoencoder, None)?;

    // As many people as are held out: all would take long and tell no more.
    let learnt = &set.train;
    let photos = learnt.owners.iter().take_while(|owner| **owner < people).count();
    // A copy, for else all photos would go to the device.
    let first = |x: &Tensor| x.narrow(0, 0, photos)?.force_contiguous()?.to_device(device);
    let seen = sample(&first(&learnt.faces)?, &first(&learnt.images)?, denoiser.config.steps, 1)?;
    let seen = Guess::OfPhotos(seen);
    table.push(Figures::of(codec, learnt, people, &seen, None)?.row("people learnt from", None));

    let gates = denoiser.gates(&faces, &images)?;
    let gates = gates.map(|gates| GateFigures::of(&gates)).transpose()?;
    Ok(json!({
        "finished": matches!(end, Outcome::Finished | Outcome::Stopped { .. }),
        "people": { "train": set.train.people(), "held_out": people, "validation": data.validation.len() },
        "photos": { "train": set.train.owners.len(), "held_out": new.owners.len() },
        "table": table,
        "gates": gates.map(|gates| json!({
            "image": 1.0 - gates.face, "face": gates.face, "spread": gates.spread,
        })),
        "ridge": {
            "penalty": data.fit.penalty,
            "out_of_fold_error_of_latents": data.fit.relative_error,
        },
        "prior": denoiser.config.prior,
        "start": starts(hypernet, data)?,
    }))
}

/// How near the start of sampling is to its end, over photos learnt from: mean cosine between the Gaussian's mean and
/// x_0, and between a start and x_0 (Corgi's figure 12).
fn starts(hypernet: &Hypernet, data: &LatentTrainingSet) -> Result<Value> {
    let Some(prior) = &hypernet.denoiser.stats.prior else { return Ok(Value::Null) };
    let rows: Vec<u32> = (0..data.clusters.len().min(1024) as u32).collect();
    let x0 = data.x0(&rows)?;
    let shift = prior.shift(&Tensor::new(&data.clusters[..rows.len()], x0.device())?)?;
    let start = shift.colour(&crate::diffusion::noise::normal(0, 0, x0.shape(), x0.device())?)?;
    let norm = |x: &Tensor| x.sqr()?.sum(1)?.sqrt();
    let cosine = |x: &Tensor| -> Result<f64> {
        let dots = ((x * &x0)?.sum(1)? / ((norm(x)? * norm(&x0)?)? + 1e-12)?)?;
        Ok(f64::from(dots.mean_all()?.to_scalar::<f32>()?))
    };
    Ok(json!({ "cosine_of_mean": cosine(&shift.mean)?, "cosine_of_start": cosine(&start)? }))
}

/// For each photo of the people held out, the person learnt from whose faces are most alike.
fn nearest(set: &LoraDataset) -> Result<Vec<u32>> {
    let known = set.train.mean_per_person(&set.train.faces)?;
    let unit = |x: &Tensor| x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.sqrt()?);
    let likeness = unit(&set.held_out.faces)?.matmul(&unit(&known)?.t()?)?;
    Ok(likeness.argmax(1)?.to_vec1()?)
}

/// The report as text.
pub fn as_text(report: &Value) -> String {
    let mut lines = Vec::new();
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    lines.push(format!(
        "{} people to learn from, {} held out, one photo each unless said otherwise; ± is the 95 % interval over people",
        report["people"]["train"],
        report["people"]["held_out"]
    ));
    lines.push(format!("{:<36} {:>15} {:>15} {:>16}", "", "relative error", "cosine", "error over ridge"));
    for row in report["table"].as_array().into_iter().flatten() {
        let name = row["name"].as_str().unwrap_or_default();
        let pair =
            |name: &str| format!("{:.3} ± {:.3}", number(&row[name]), number(&row["half_width"][name]));
        let over = match &row["over_ridge"] {
            Value::Null => String::new(),
            over => format!("{:+.3} ± {:.3}", number(&over["mean"]), number(&over["half_width"])),
        };
        lines.push(format!("{name:<36} {:>15} {:>15} {over:>16}", pair("relative_error"), pair("cosine")));
    }
    if let Value::Object(gates) = &report["gates"] {
        let gate = |name: &str| number(&gates[name]);
        lines.push(format!(
            "gates: face {:.2} ± {:.2} over photos, image {:.2}",
            gate("face"),
            gate("spread"),
            gate("image")
        ));
    }
    if let Value::Object(start) = &report["start"] {
        lines.push(format!(
            "prior: cosine to the end {:.2} of the Gaussians' means, {:.2} of starts",
            number(&start["cosine_of_mean"]),
            number(&start["cosine_of_start"])
        ));
    }
    lines.join("\n")
}
