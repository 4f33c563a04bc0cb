//! Learning rates over a run.

use crate::named::named;
use serde::{Deserialize, Serialize};

/// A warm-up to the peak and a way down from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The highest rate.
    pub peak: f64,
    /// Steps of linear growth from 0; the first step already moves.
    #[serde(default)]
    pub warmup: u64,
    /// The way from the peak to the last step.
    #[serde(default)]
    pub decay: Decay,
    /// The rate at the end as a part of the peak.
    #[serde(default)]
    pub floor: f64,
}

named! {
    /// The way of the rate after the warm-up.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Decay {
        /// Constant at the peak.
        Constant = "constant",
        /// Cosine decay to the floor.
        #[default]
        Cosine = "cosine",
        /// Linear decay to the floor.
        Linear = "linear",
    }
}

impl Schedule {
    /// The rate of step `step` (from 0) of `steps`.
    pub fn learning_rate(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let way = (steps.saturating_sub(self.warmup)).max(1) as f64;
        let done = ((step - self.warmup) as f64 / way).min(1.0);
        let left = match self.decay {
            Decay::Constant => return self.peak,
            Decay::Cosine => 0.5 + 0.5 * (std::f64::consts::PI * done).cos(),
            Decay::Linear => 1.0 - done,
        };
        self.peak * (self.floor + (1.0 - self.floor) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(decay: Decay, step: u64) -> f64 {
        Schedule { peak: 2.0, warmup: 10, decay, floor: 0.1 }.learning_rate(step, 110)
    }

    #[test]
    fn the_rate_grows_to_the_peak_and_ends_at_the_floor() {
        for decay in [Decay::Cosine, Decay::Linear] {
            assert_eq!(rate(decay, 0), 0.2);
            assert_eq!(rate(decay, 9), 2.0);
            assert_eq!(rate(decay, 10), 2.0);
            assert!((rate(decay, 60) - 1.1).abs() < 1e-12, "half way is half way between peak and floor");
            assert!((rate(decay, 110) - 0.2).abs() < 1e-12);
            assert!((rate(decay, 500) - 0.2).abs() < 1e-12, "a longer run stays at the floor");
        }
        assert_eq!(rate(Decay::Constant, 80), 2.0);
    }

    #[test]
    fn a_run_without_warm_up_starts_at_the_peak() {
        let schedule = Schedule { peak: 3.0, warmup: 0, decay: Decay::Cosine, floor: 0.0 };
        assert_eq!(schedule.learning_rate(0, 5), 3.0);
        assert_eq!(schedule.learning_rate(0, 0), 3.0);
    }
}
