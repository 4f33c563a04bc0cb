//! Many long vectors, a few at a time.
//!
//! A hundred thousand LoRAs fit in no memory. Whatever is computed from all of them (statistics, principal components)
//! asks for batches of rows and keeps only sums.

use anyhow::Result;
use candle_core::{Device, Tensor};

/// M vectors of P values, which lie on a disk or in memory.
pub trait RowSource: Sync {
    /// M
    fn count(&self) -> usize;

    /// P
    fn width(&self) -> usize;

    /// The rows at `places` (B) → (B, P), f32 on the CPU.
    fn batch(&self, places: &[usize]) -> Result<Tensor>;

    /// Calls `work(first, rows)` with all rows in order, so many at a time that they take about 64 MiB.
    fn each(&self, work: &mut dyn FnMut(usize, &Tensor) -> Result<()>) -> Result<()> {
        let size = ((64 << 20) / (4 * self.width()).max(1)).clamp(1, 256);
        let places: Vec<usize> = (0..self.count()).collect();
        for part in places.chunks(size) {
            work(part[0], &self.batch(part)?)?;
        }
        Ok(())
    }

    /// All rows (M, P), for what is known to be small.
    fn all(&self) -> Result<Tensor> {
        self.batch(&(0..self.count()).collect::<Vec<_>>())
    }
}

impl RowSource for Tensor {
    fn count(&self) -> usize {
        self.dims().first().copied().unwrap_or(0)
    }

    fn width(&self) -> usize {
        self.dims().last().copied().unwrap_or(0)
    }

    fn batch(&self, places: &[usize]) -> Result<Tensor> {
        let places: Vec<u32> = places.iter().map(|place| *place as u32).collect();
        Ok(self.index_select(&Tensor::new(places, &Device::Cpu)?, 0)?)
    }
}
