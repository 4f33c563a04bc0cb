//! How near generated LoRAs are to the people's own in what they do to the weights, and whether they are copies of
//! training LoRAs. All by inner products of ΔW, never by raw factors.

use anyhow::Result;
use candle_core::{Device, Tensor};
use serde::Serialize;

use crate::hypernet::delta_metrics::DeltaSpace;
use crate::hypernet::row_source::RowSource;
use crate::lora::layout::LoraLayout;
use crate::lora::low_rank::LowRank;
use crate::statistics::{Mean, rank};

/// Generated LoRAs against own and training ones. "Centred" is without the mean LoRA.
#[derive(Clone, Debug, Serialize)]
pub struct WeightSpace {
    /// ‖ΔŴ − ΔW‖ / ‖ΔW‖ of each person.
    pub relative_error: Option<Mean>,
    /// cos(ΔŴ, ΔW).
    pub cosine: Option<Mean>,
    /// The same, centred.
    pub centred_cosine: Option<Mean>,
    /// ‖σ̂ − σ‖ / ‖σ‖ of the singular values of each layer, mean over layers.
    pub singular_value_error: Option<Mean>,
    /// Share of generated LoRAs whose nearest own LoRA is that of the right person, by the centred cosine.
    pub retrieval: Option<Mean>,
    /// Centred cosine of a generated LoRA to its nearest training LoRA.
    pub nearest_training: Option<Mean>,
    /// The same of the held-out people's own LoRAs: what is to be expected of people who are no copies.
    pub nearest_training_of_own: Option<Mean>,
    /// Share of generated LoRAs that lie nearer to a training LoRA than every held-out person's own one does.
    pub copy_rate: f64,
    /// Training LoRAs.
    pub training: usize,
}

/// Compares `generated` (H, P) with the same people's `own` (H, P), and both with `training`, M rows of P; `mean` (1, P)
/// is the mean LoRA.
pub fn compare(
    layout: &LoraLayout,
    generated: &Tensor,
    own: &Tensor,
    mean: &Tensor,
    training: &dyn RowSource,
) -> Result<WeightSpace> {
    let space = DeltaSpace::new(layout, &Device::Cpu)?;
    let inner = |a: &Tensor, b: &Tensor| -> Result<Vec<f64>> {
        Ok(space.inner(a, b)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    };
    let mm = inner(mean, mean)?[0];
    let of_generated = Side::new(generated, mean, mm, &inner)?;
    let of_own = Side::new(own, mean, mm, &inner)?;
    let pairs = inner(generated, own)?;
    let people = pairs.len();
    let error = |i: usize| {
        let squared = of_generated.squares[i] + of_own.squares[i] - 2.0 * pairs[i];
        (squared.max(0.0) / of_own.squares[i].max(f64::MIN_POSITIVE)).sqrt()
    };
    let cosine =
        |i: usize| pairs[i] / (of_generated.squares[i] * of_own.squares[i]).sqrt().max(f64::MIN_POSITIVE);
    let mut cosines = vec![Vec::with_capacity(people); people]; // [generated][own]
    for other in 0..people {
        let products = inner(generated, &own.narrow(0, other, 1)?)?;
        for (i, (row, product)) in cosines.iter_mut().zip(products).enumerate() {
            row.push(of_generated.centred_cosine(i, &of_own, other, product));
        }
    }
    let mut nearest = [vec![f64::NEG_INFINITY; people], vec![f64::NEG_INFINITY; people]];
    training.each(&mut |_, rows| {
        for at in 0..rows.dim(0)? {
            crate::progress::check()?;
            let row = rows.narrow(0, at, 1)?;
            let side = Side::new(&row, mean, mm, &inner)?;
            for ((from, rows), nearest) in
                [(&of_generated, generated), (&of_own, own)].iter().zip(&mut nearest)
            {
                for (i, product) in inner(rows, &row)?.into_iter().enumerate() {
                    nearest[i] = nearest[i].max(from.centred_cosine(i, &side, 0, product));
                }
            }
        }
        Ok(())
    })?;
    let [of_generated, of_own] = nearest;
    let closest = of_own.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let copies = of_generated.iter().filter(|cosine| **cosine > closest).count();
    let of = |value: &dyn Fn(usize) -> f64| Mean::of(&(0..people).map(value).collect::<Vec<_>>());
    Ok(WeightSpace {
        relative_error: of(&error),
        cosine: of(&cosine),
        centred_cosine: of(&|i| cosines[i][i]),
        singular_value_error: Mean::of(&singular_value_errors(layout, generated, own)?),
        retrieval: of(&|i| f64::from(u8::from(rank(&cosines[i], i) == 1))),
        nearest_training: Mean::of(&of_generated),
        nearest_training_of_own: Mean::of(&of_own),
        copy_rate: copies as f64 / people.max(1) as f64,
        training: training.count(),
    })
}

/// Inner products of rows with themselves and with the mean LoRA.
struct Side {
    squares: Vec<f64>,
    with_mean: Vec<f64>,
    mean_square: f64,
}

impl Side {
    fn new(
        rows: &Tensor,
        mean: &Tensor,
        mean_square: f64,
        inner: &dyn Fn(&Tensor, &Tensor) -> Result<Vec<f64>>,
    ) -> Result<Self> {
        Ok(Self { squares: inner(rows, rows)?, with_mean: inner(rows, mean)?, mean_square })
    }

    /// Of row `i` and row `j` of `other`, whose inner product is `product`; 0 where one is the mean.
    fn centred_cosine(&self, i: usize, other: &Self, j: usize, product: f64) -> f64 {
        let square = |side: &Self, at: usize| side.squares[at] - 2.0 * side.with_mean[at] + side.mean_square;
        let (a, b) = (square(self, i), square(other, j));
        // What rounding leaves of a difference of nothing has no direction.
        if a.min(b) <= 1e-6 * a.max(b) {
            return 0.0;
        }
        (product - self.with_mean[i] - other.with_mean[j] + self.mean_square) / (a * b).sqrt()
    }
}

/// The mean over layers of the relative error of the singular values, for each row.
fn singular_value_errors(layout: &LoraLayout, generated: &Tensor, own: &Tensor) -> Result<Vec<f64>> {
    let values = |row: &Tensor| -> Result<Vec<Vec<f64>>> {
        let lora = layout.from_vector(&row.flatten_all()?.to_vec1::<f32>()?)?;
        let of = |layer: &crate::lora::LoraLayer| -> Result<Vec<f64>> {
            let scale = f64::from(layer.alpha) / layer.down.dim(0)? as f64;
            let (down, up) = (layer.down.flatten_from(1)?, (layer.up.flatten_from(1)? * scale)?);
            Ok(LowRank { down, up }.svd()?.values)
        };
        lora.layers.values().map(of).collect()
    };
    (0..own.dim(0)?)
        .map(|i| {
            let (guess, truth) = (values(&generated.get(i)?)?, values(&own.get(i)?)?);
            let errors = guess.iter().zip(&truth).map(|(guess, truth)| {
                let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
                let difference = squares(&mut guess.iter().zip(truth).map(|(a, b)| a - b));
                (difference / squares(&mut truth.iter().copied()).max(f64::MIN_POSITIVE)).sqrt()
            });
            let errors: Vec<f64> = errors.collect();
            Ok(errors.iter().sum::<f64>() / errors.len().max(1) as f64)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One layer of 2×2 of rank 1: the vector is up (2), then down (2).
    fn layout() -> LoraLayout {
        let module = serde_json::json!({ "module": "a.to_q", "input": 2, "out": 2, "rank": 1, "alpha": 1.0 });
        serde_json::from_value(serde_json::json!({ "modules": [module], "shared_down": false })).unwrap()
    }

    #[test]
    fn copies_and_right_people_are_counted_and_distances_do_not_depend_on_the_factoring() -> Result<()> {
        let tensor =
            |rows: &[[f32; 4]]| Tensor::from_slice(rows.as_flattened(), (rows.len(), 4), &Device::Cpu);
        // ΔW = up·downᵀ; the second generated one is the first training LoRA, factored otherwise.
        let own = tensor(&[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])?;
        let generated = tensor(&[[2.0, 0.0, 0.5, 0.0], [3.0, 3.0, 0.0, 1.0]])?;
        let training = tensor(&[[1.0, 1.0, 0.0, 3.0], [0.0, -1.0, 1.0, 0.0]])?;
        let found = compare(&layout(), &generated, &own, &tensor(&[[0.0; 4]])?, &training)?;
        let mean = |of: Option<Mean>| of.unwrap().mean;
        // The second one: ΔŴ = 3·(e₁ + e₂)e₂ᵀ against e₂e₂ᵀ, so cosine 1/√2 and error √(9 + 4) = √13.
        assert!((mean(found.relative_error) - 13f64.sqrt() / 2.0).abs() < 1e-6);
        assert!((mean(found.cosine) - (1.0 + 0.5f64.sqrt()) / 2.0).abs() < 1e-6);
        assert_eq!(mean(found.retrieval), 1.0);
        assert!((mean(found.singular_value_error) - (18f64.sqrt() - 1.0) / 2.0).abs() < 1e-6);
        assert_eq!((found.copy_rate, found.training), (0.5, 2));
        // A training LoRA that a held-out person's own one is like: no generated LoRA is nearer.
        let like_own = tensor(&[[0.0, 1.0, 0.0, 3.0]])?;
        let found = compare(&layout(), &generated, &own, &tensor(&[[0.0; 4]])?, &like_own)?;
        assert_eq!((found.copy_rate, mean(found.nearest_training_of_own)), (0.0, 0.5));
        Ok(())
    }
}
