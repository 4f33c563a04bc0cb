//! The tensors of one layer in a LoRA file → its adapter, of whatever kind.

use std::collections::BTreeMap;

use candle_core::{CpuStorage, DType, Tensor};

use super::LoraError;
use super::adapter::{Adapter, AdapterKind, BiasChange, Magnitude, Matrix};
use super::keys::Part;

/// What a file holds of one layer.
pub(super) struct Parts<'a> {
    pub(super) module: &'a str,
    pub(super) parts: BTreeMap<Part, Tensor>,
}

impl Parts<'_> {
    /// `noted` gives the alpha of a rank by the file's PEFT config, where it says one.
    pub(super) fn into_adapter(
        mut self,
        noted: &dyn Fn(usize) -> Option<f32>,
        whole_lokr_scale: f64,
    ) -> Result<Adapter, LoraError> {
        let stored = self.number(Part::Alpha)?;
        let up_bias = self.take(Part::UpBias);
        let added = self.take(Part::DiffB).or_else(|| self.take(Part::BNorm));
        let added = added.map(|bias| bias.flatten_all()).transpose()?.map(BiasChange::Added);
        let bias = match added {
            Some(bias) => Some(bias),
            None => {
                let whole = self.take(Part::SetBias).map(|bias| bias.flatten_all());
                whole.transpose()?.map(BiasChange::Replaced)
            }
        };
        let magnitude = self.magnitude()?;
        // sd-scripts: without alpha, or with alpha 0, ΔW is not scaled.
        let alpha =
            |rank: usize| stored.or_else(|| noted(rank)).filter(|alpha| *alpha != 0.0).unwrap_or(rank as f32);
        let kind = if self.has(&[Part::Down, Part::Up, Part::Mid]) {
            let (down, up) = (self.factor(Part::Down, "down")?, self.factor(Part::Up, "up")?);
            let mid = self.take(Part::Mid);
            let rank = down.dims()[0];
            self.check_low_rank(&down, &up, mid.as_ref())?;
            AdapterKind::LowRank { alpha: alpha(rank), down, up, mid }
        } else if self.has(&[Part::HadaW1A, Part::HadaW1B, Part::HadaW2A, Part::HadaW2B]) {
            let first = [self.factor(Part::HadaW1A, "hada_w1_a")?, self.factor(Part::HadaW1B, "hada_w1_b")?];
            let second = [self.factor(Part::HadaW2A, "hada_w2_a")?, self.factor(Part::HadaW2B, "hada_w2_b")?];
            let cores = match (self.take(Part::HadaT1), self.take(Part::HadaT2)) {
                (Some(t1), Some(t2)) => Some([t1, t2]),
                (None, None) => None,
                (None, _) => return Err(self.half("hada_t1")),
                (_, None) => return Err(self.half("hada_t2")),
            };
            for (pair, core) in [(&first, 0), (&second, 1)] {
                self.check_product(&pair[0], &pair[1], cores.as_ref().map(|cores| &cores[core]))?;
            }
            let alike = first.iter().zip(&second).all(|(a, b)| a.rank() == 2 && a.dims() == b.dims());
            if !alike || cores.as_ref().is_some_and(|[a, b]| a.dims() != b.dims()) {
                return Err(self.shape("hada_w2_a or hada_w2_b", &second[0]));
            }
            AdapterKind::Hadamard { alpha: alpha(first[1].dims()[0]), first, second, cores }
        } else if self.has(&[Part::LokrW1, Part::LokrW1A, Part::LokrW2, Part::LokrW2A]) {
            let first = self.matrix([Part::LokrW1, Part::LokrW1A, Part::LokrW1B], "lokr_w1", false)?;
            let core = self.take(Part::LokrT2);
            let mut second =
                self.matrix([Part::LokrW2, Part::LokrW2A, Part::LokrW2B], "lokr_w2", core.is_some())?;
            let core = if matches!(second, Matrix::Whole(_)) { None } else { core };
            match &first {
                Matrix::Product(a, b) if b.rank() == 2 => self.check_product(a, b, None)?,
                Matrix::Whole(matrix) if matrix.rank() == 2 => {}
                Matrix::Product(_, odd) | Matrix::Whole(odd) => return Err(self.shape("lokr_w1", odd)),
            }
            match &second {
                Matrix::Product(a, b) if b.rank() != 3 => self.check_product(a, b, core.as_ref())?,
                Matrix::Whole(matrix) if matrix.rank() != 3 => {}
                Matrix::Product(_, odd) | Matrix::Whole(odd) => return Err(self.shape("lokr_w2", odd)),
            }
            let rank = [&second, &first].into_iter().find_map(|matrix| match matrix {
                Matrix::Product(_, b) => Some(b.dims()[0]),
                Matrix::Whole(_) => None,
            });
            if let (None, Matrix::Whole(matrix)) = (rank, &mut second)
                && whole_lokr_scale != 1.0
            {
                *matrix = (matrix.to_dtype(DType::F32)? * whole_lokr_scale)?;
            }
            // Of two whole matrices alpha says nothing.
            let alpha = rank.map_or(stored.unwrap_or(1.0), alpha);
            AdapterKind::Kronecker { first, second, core, alpha }
        } else if let Some(norm) = self.take(Part::WNorm) {
            if norm.rank() != 1 {
                return Err(self.shape("w_norm", &norm));
            }
            AdapterKind::Full(norm)
        } else if let Some(diff) = self.take(Part::Diff) {
            if diff.rank() == 0 {
                return Err(self.shape("diff", &diff));
            }
            AdapterKind::Full(diff)
        } else if let Some(whole) = self.take(Part::SetWeight) {
            if whole.rank() == 0 {
                return Err(self.shape("set_weight", &whole));
            }
            AdapterKind::Replaced(whole)
        } else if self.has(&[Part::Ia3, Part::OnInput]) {
            let factor = self.factor(Part::Ia3, "weight")?;
            let on_input = self.number(Part::OnInput)?.ok_or_else(|| self.half("on_input"))?;
            AdapterKind::Scaled { factor, on_input: on_input != 0.0 }
        } else if self.has(&[Part::OftBlocks]) {
            let blocks = self.factor(Part::OftBlocks, "oft_blocks")?;
            match *blocks.dims() {
                [.., rows, columns] if matches!(blocks.rank(), 3 | 4) && rows == columns && rows > 0 => {}
                _ => return Err(self.shape("oft_blocks", &blocks)),
            }
            let rescale = self.take(Part::Rescale);
            AdapterKind::Orthogonal { blocks, rescale, constraint: stored.unwrap_or(0.0) }
        } else if self.has(&[Part::A1, Part::A2, Part::B1, Part::B2]) {
            let a = [self.factor(Part::A1, "a1")?, self.factor(Part::A2, "a2")?];
            let b = [self.factor(Part::B1, "b1")?, self.factor(Part::B2, "b2")?];
            for pair in [&a, &b] {
                self.check_low_rank(&pair[1], &pair[0], None)?;
            }
            AdapterKind::Generalised { alpha: alpha(a[1].dims()[0]), a, b }
        } else if bias.is_some() {
            AdapterKind::BiasOnly
        } else {
            return Err(self.half(if magnitude.is_some() { "down" } else { "up" }));
        };
        let bias = match (up_bias, &kind) {
            (None, _) => bias,
            (Some(up), AdapterKind::LowRank { down, alpha, .. }) => {
                let scaled =
                    (up.to_dtype(DType::F32)?.flatten_all()? * (f64::from(*alpha) / down.dims()[0] as f64))?;
                let sum = |bias: Tensor| bias.to_dtype(DType::F32)? + &scaled;
                Some(match bias {
                    Some(BiasChange::Added(bias)) => BiasChange::Added(sum(bias)?),
                    Some(BiasChange::Replaced(bias)) => BiasChange::Replaced(sum(bias)?),
                    None => BiasChange::Added(scaled),
                })
            }
            (Some(up), _) => return Err(self.shape("lora_up.bias beside a layer of another kind", &up)),
        };
        if let Some((part, tensor)) = self.parts.first_key_value() {
            return Err(self.shape(&format!("{} beside a layer of another kind", part.suffix()), tensor));
        }
        Ok(Adapter { kind, magnitude, bias })
    }

    fn has(&self, parts: &[Part]) -> bool {
        parts.iter().any(|part| self.parts.contains_key(part))
    }

    fn take(&mut self, part: Part) -> Option<Tensor> {
        self.parts.remove(&part)
    }

    fn half(&self, missing: &'static str) -> LoraError {
        LoraError::Half { module: self.module.to_string(), missing }
    }

    fn shape(&self, part: &str, tensor: &Tensor) -> LoraError {
        LoraError::Part {
            module: self.module.to_string(),
            part: part.to_string(),
            shape: tensor.dims().to_vec(),
        }
    }

    /// A part that must be there, with one axis or more and no axis of length 0.
    fn factor(&mut self, part: Part, name: &'static str) -> Result<Tensor, LoraError> {
        let tensor = self.take(part).ok_or_else(|| self.half(name))?;
        let axes = if part == Part::Ia3 { 1 } else { 2 };
        if tensor.rank() < axes || tensor.rank() > 4 || tensor.elem_count() == 0 {
            return Err(self.shape(name, &tensor));
        }
        Ok(tensor)
    }

    fn number(&mut self, part: Part) -> Result<Option<f32>, LoraError> {
        let Some(tensor) = self.take(part) else { return Ok(None) };
        let values = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        match values.as_slice() {
            [value] => Ok(Some(*value)),
            _ => Err(self.shape(part.suffix(), &tensor)),
        }
    }

    /// LyCORIS writes (out, 1, …) or (1, in, …), which tell the axis; PEFT writes (out), or (1, out, 1, 1).
    fn magnitude(&mut self) -> Result<Option<Magnitude>, LoraError> {
        if let Some(values) = self.take(Part::Magnitude) {
            return Ok(Some(Magnitude { values: values.flatten_all()?, on_input: false }));
        }
        let Some(scale) = self.take(Part::DoraScale) else { return Ok(None) };
        let long: Vec<usize> = (0..scale.rank()).filter(|axis| scale.dims()[*axis] != 1).collect();
        match long.as_slice() {
            [] | [0] | [1] => Ok(Some(Magnitude { values: scale, on_input: long == [1] })),
            _ => Err(self.shape("dora_scale", &scale)),
        }
    }

    fn matrix(
        &mut self,
        [whole, left, right]: [Part; 3],
        name: &'static str,
        tucker: bool,
    ) -> Result<Matrix, LoraError> {
        if !tucker && self.parts.contains_key(&whole) {
            return Ok(Matrix::Whole(self.factor(whole, name)?));
        }
        match (self.take(left), self.take(right)) {
            (Some(a), Some(b)) if a.rank() == 2 && b.rank() >= 2 => Ok(Matrix::Product(a, b)),
            (Some(a), Some(_)) => Err(self.shape(left.suffix(), &a)),
            (None, Some(_)) => Err(self.half(left.suffix())),
            (Some(_), None) => Err(self.half(right.suffix())),
            (None, None) => Err(self.half(name)),
        }
    }

    /// `down` (R, …), `up` (out, R), `mid` (R, R, k, k).
    fn check_low_rank(&self, down: &Tensor, up: &Tensor, mid: Option<&Tensor>) -> Result<(), LoraError> {
        let rank = down.dims()[0];
        let thin = |tensor: &Tensor| tensor.dims()[2..].iter().all(|side| *side == 1);
        let core = mid.is_none_or(|mid| mid.rank() == 4 && mid.dims()[..2] == [rank, rank] && thin(down));
        if up.dims()[1] == rank && thin(up) && core && down.rank() != 3 && up.rank() != 3 {
            return Ok(());
        }
        let (down, up) = (down.dims().to_vec(), up.dims().to_vec());
        Err(LoraError::Factors { module: self.module.to_string(), down, up })
    }

    /// `a` (out, R) and `b` (R, …); with a core (R, R, k, k) `a` (R, out).
    fn check_product(&self, a: &Tensor, b: &Tensor, core: Option<&Tensor>) -> Result<(), LoraError> {
        let rank = b.dims()[0];
        let fits = match core {
            None => a.rank() == 2 && a.dims()[1] == rank && rank > 0,
            Some(core) => {
                core.rank() == 4
                    && core.dims()[..2] == [rank, rank]
                    && a.dims()[0] == rank
                    && a.rank() == 2
                    && b.rank() == 2
            }
        };
        if fits {
            return Ok(());
        }
        let (down, up) = (b.dims().to_vec(), a.dims().to_vec());
        Err(LoraError::Factors { module: self.module.to_string(), down, up })
    }
}

/// Whether a tensor that was just read, on the CPU and contiguous, holds no NaN and no infinity.
pub(super) fn is_finite(tensor: &Tensor) -> bool {
    // Without early end, so that the loops become vectors.
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(CpuStorage::F16(values)) => {
            values.iter().fold(true, |all, x| all & x.is_finite())
        }
        candle_core::Storage::Cpu(CpuStorage::BF16(values)) => {
            values.iter().fold(true, |all, x| all & x.is_finite())
        }
        candle_core::Storage::Cpu(CpuStorage::F32(values)) => {
            values.iter().fold(true, |all, x| all & x.is_finite())
        }
        candle_core::Storage::Cpu(CpuStorage::F64(values)) => {
            values.iter().fold(true, |all, x| all & x.is_finite())
        }
        _ => true,
    }
}
