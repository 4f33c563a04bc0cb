//! Mean of the weights over the last part of a run: less noise than the last weights.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Tensor, Var};

/// Sums of the variables since the part began.
pub struct TailMean {
    /// Steps of the run.
    steps: u64,
    /// The first step that counts.
    first: u64,
    count: u32,
    sums: BTreeMap<String, Tensor>,
}

impl TailMean {
    /// Over the last `part` (0 to 1) of a run of `steps`; the last step always counts.
    pub fn new(steps: u64, part: f64) -> Self {
        let first = steps - (steps as f64 * part.clamp(0.0, 1.0)) as u64;
        Self { steps, first, count: 0, sums: BTreeMap::new() }
    }

    /// Adds the values after step `step`, counted from 0, where it belongs to the part.
    pub fn follow(&mut self, step: u64, vars: &BTreeMap<String, Var>) -> Result<()> {
        if step < self.first && step + 1 != self.steps {
            return Ok(());
        }
        self.count += 1;
        for (name, var) in vars {
            let sum = match self.sums.remove(name) {
                Some(sum) => (sum + var.as_tensor().detach())?,
                None => var.as_tensor().detach().copy()?,
            };
            self.sums.insert(name.clone(), sum);
        }
        Ok(())
    }

    /// The means.
    pub fn means(self) -> Result<BTreeMap<String, Tensor>> {
        let count = f64::from(self.count);
        self.sums.into_iter().map(|(name, sum)| Ok((name, (sum / count)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_last_part_is_averaged_and_at_least_the_last_step() {
        let var = Var::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
        let vars = BTreeMap::from([("x".to_string(), var.clone())]);
        for (part, mean) in [(0.0, 9.0), (0.3, 8.0), (1.0, 4.5)] {
            let mut tail = TailMean::new(10, part);
            for step in 0..10 {
                var.set(&Tensor::new(step as f32, &Device::Cpu).unwrap()).unwrap();
                tail.follow(step, &vars).unwrap();
            }
            assert_eq!(tail.means().unwrap()["x"].to_scalar::<f32>().unwrap(), mean, "{part}");
        }
    }
}
