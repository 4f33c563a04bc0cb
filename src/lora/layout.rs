//! A LoRA as the flat vector x ∈ R^P that the hypernetwork learns, and back.
//!
//! Wu et al. 2024 (arXiv 2408.06740): for each module in order, `B` (m×r) flattened, then `A` (r×n) transposed to
//! n×r and flattened; all concatenated. Where `A` is frozen and shared by all LoRAs, the vector holds only the
//! `B`s, and the layout carries the `A`s.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{Lora, LoraError, LoraLayer};

/// Which modules a vector holds, in which order, and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraLayout {
    /// In the order of the vector.
    pub modules: Vec<ModuleLayout>,
    /// Whether `A` is shared and frozen; the vector then holds only the `B`s.
    pub shared_down: bool,
    /// The shared `A` (R, in) of each module. Too large for a JSON file: stored as tensors and put back by
    /// [`LoraLayout::with_shared_down`].
    #[serde(skip)]
    down: BTreeMap<String, Tensor>,
}

/// One module of a layout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleLayout {
    /// diffusers path.
    pub module: String,
    /// m, outputs of the linear layer.
    pub out: usize,
    /// n, its inputs.
    pub input: usize,
    /// r.
    pub rank: usize,
    /// ΔW is scaled by alpha / r.
    pub alpha: f32,
}

/// The numbers of one factor within the vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Place of its module in [`LoraLayout::modules`].
    pub module: usize,
    /// Whether it is `A` (transposed) and not `B`.
    pub is_down: bool,
    /// Where it lies.
    pub range: Range<usize>,
}

impl LoraLayout {
    /// The layout of a LoRA whose factors are both learned; modules in alphabetical order.
    pub fn of(lora: &Lora) -> Self {
        let module = |(module, layer): (&String, &LoraLayer)| {
            let (out, input) = layer.shape();
            ModuleLayout { module: module.clone(), out, input, rank: layer.rank(), alpha: layer.alpha }
        };
        Self { modules: lora.layers.iter().map(module).collect(), shared_down: false, down: BTreeMap::new() }
    }

    /// The same modules with their `A`s (R, in) frozen and shared.
    ///
    /// # Errors
    /// [`LoraError::Layout`] when one is missing or of another shape.
    pub fn with_shared_down(mut self, down: BTreeMap<String, Tensor>) -> Result<Self, LoraError> {
        let mut kept = BTreeMap::new();
        for module in &self.modules {
            let tensor =
                down.get(&module.module).ok_or_else(|| module.differs("its shared `down` is missing"))?;
            if tensor.dims() != [module.rank, module.input] {
                return Err(module.differs(format!("its shared `down` has shape {:?}", tensor.dims())));
            }
            kept.insert(module.module.clone(), tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?);
        }
        self.shared_down = true;
        self.down = kept;
        Ok(self)
    }

    /// The shared `A`s by module, to be stored beside the layout; empty unless `shared_down`.
    pub fn shared_tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.down
    }

    /// P, the length of the vector.
    pub fn parameters(&self) -> usize {
        self.modules.iter().map(|module| self.module_parameters(module)).sum()
    }

    /// Where each factor lies in the vector, in its order.
    pub fn segments(&self) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut begin = 0;
        let mut add = |module, is_down, length| {
            segments.push(Segment { module, is_down, range: begin..begin + length });
            begin += length;
        };
        for (i, module) in self.modules.iter().enumerate() {
            add(i, false, module.out * module.rank);
            if !self.shared_down {
                add(i, true, module.input * module.rank);
            }
        }
        segments
    }

    /// The LoRA's factors as one vector.
    ///
    /// # Errors
    /// [`LoraError::Layout`] when a module is missing or left over, has another shape, rank or alpha, or another
    /// `A` than the shared one.
    pub fn to_vector(&self, lora: &Lora) -> Result<Vec<f32>, LoraError> {
        let mut vector = Vec::with_capacity(self.parameters());
        for module in &self.modules {
            let layer = lora.layers.get(&module.module).ok_or_else(|| module.differs("it is missing"))?;
            module.check(layer)?;
            vector.extend(values(&layer.up)?); // B, m×r
            if self.shared_down {
                self.check_shared(module, layer)?;
            } else {
                vector.extend(values(&layer.down.t()?)?); // Aᵀ, n×r
            }
        }
        if let Some(extra) = lora.layers.keys().find(|name| !self.modules.iter().any(|m| m.module == **name))
        {
            return Err(LoraError::Layout {
                module: extra.clone(),
                why: "the layout does not have it".to_string(),
            });
        }
        Ok(vector)
    }

    /// The LoRA whose factors `vector` holds; without metadata.
    ///
    /// # Errors
    /// [`LoraError::Length`]; [`LoraError::NotFinite`] with the first module that holds a NaN;
    /// [`LoraError::Layout`] when `A` is shared and was not given.
    pub fn from_vector(&self, vector: &[f32]) -> Result<Lora, LoraError> {
        let wanted = self.parameters();
        if vector.len() != wanted {
            return Err(LoraError::Length { given: vector.len(), wanted });
        }
        let mut rest = vector;
        let mut lora = Lora::default();
        for module in &self.modules {
            let (numbers, after) = rest.split_at(self.module_parameters(module));
            rest = after;
            if !numbers.iter().all(|number| number.is_finite()) {
                return Err(LoraError::NotFinite { module: module.module.clone() });
            }
            let (up, down) = numbers.split_at(module.out * module.rank);
            let up = Tensor::from_slice(up, (module.out, module.rank), &Device::Cpu)?;
            let down = if self.shared_down {
                self.shared(module)?.clone()
            } else {
                Tensor::from_slice(down, (module.input, module.rank), &Device::Cpu)?.t()?.contiguous()?
            };
            let layer = LoraLayer::new(&module.module, down, up, module.alpha)?;
            lora.layers.insert(module.module.clone(), layer);
        }
        Ok(lora)
    }

    fn module_parameters(&self, module: &ModuleLayout) -> usize {
        let down = if self.shared_down { 0 } else { module.input };
        (module.out + down) * module.rank
    }

    fn shared(&self, module: &ModuleLayout) -> Result<&Tensor, LoraError> {
        self.down.get(&module.module).ok_or_else(|| module.differs("its shared `down` is missing"))
    }

    fn check_shared(&self, module: &ModuleLayout, layer: &LoraLayer) -> Result<(), LoraError> {
        let shared = values(self.shared(module)?)?;
        let own = values(&layer.down)?;
        let largest = shared.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        // A file in half precision keeps 11 bits.
        let same = shared.iter().zip(&own).all(|(a, b)| (a - b).abs() <= largest * 1e-3);
        if same { Ok(()) } else { Err(module.differs("its `down` is not the shared one")) }
    }
}

impl ModuleLayout {
    fn check(&self, layer: &LoraLayer) -> Result<(), LoraError> {
        let (out, input) = layer.shape();
        if (out, input) != (self.out, self.input) {
            return Err(self.differs(format!("it is {out}×{input}, wanted {}×{}", self.out, self.input)));
        }
        if layer.rank() != self.rank {
            return Err(self.differs(format!("it has rank {}, wanted {}", layer.rank(), self.rank)));
        }
        if layer.alpha != self.alpha {
            return Err(self.differs(format!("it has alpha {}, wanted {}", layer.alpha, self.alpha)));
        }
        Ok(())
    }

    fn differs(&self, why: impl Into<String>) -> LoraError {
        LoraError::Layout { module: self.module.clone(), why: why.into() }
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f32>, LoraError> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// LoRAs of one to six modules of SDXL, each with its own sizes, rank and alpha.
    pub(crate) fn any_lora() -> impl Strategy<Value = Lora> {
        let places = [
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
            "mid_block.attentions.0.proj_in",
            "up_blocks.0.attentions.2.transformer_blocks.7.ff.net.0.proj",
            "up_blocks.1.resnets.0.time_emb_proj",
            "text_encoder_2.text_model.encoder.layers.11.self_attn.q_proj",
        ];
        let sizes = (1usize..7, 1usize..7, 1usize..5, 1u8..32, 0u64..1000);
        proptest::collection::btree_map(proptest::sample::select(places.to_vec()), sizes, 1..6).prop_map(
            |chosen| {
                let layer =
                    |(module, (out, input, rank, alpha, seed)): (&str, (usize, usize, usize, u8, u64))| {
                        let normal = |stream, shape: (usize, usize)| {
                            crate::diffusion::noise::normal(seed, stream, shape, &Device::Cpu).unwrap()
                        };
                        let layer = LoraLayer::new(
                            module,
                            normal(0, (rank, input)),
                            normal(1, (out, rank)),
                            f32::from(alpha) / 4.0,
                        );
                        (module.to_string(), layer.unwrap())
                    };
                Lora { layers: chosen.into_iter().map(layer).collect(), metadata: BTreeMap::new() }
            },
        )
    }

    fn assert_same(a: &Lora, b: &Lora) {
        assert_eq!(a.layers.keys().collect::<Vec<_>>(), b.layers.keys().collect::<Vec<_>>());
        for (a, b) in a.layers.values().zip(b.layers.values()) {
            assert_eq!(values(&a.up).unwrap(), values(&b.up).unwrap());
            assert_eq!(values(&a.down).unwrap(), values(&b.down).unwrap());
            assert_eq!(a.alpha, b.alpha);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_lora_survives_the_way_through_its_vector(lora in any_lora()) {
            let layout = LoraLayout::of(&lora);
            let vector = layout.to_vector(&lora).unwrap();
            prop_assert_eq!(vector.len(), layout.parameters());
            prop_assert_eq!(layout.segments().last().unwrap().range.end, vector.len());
            assert_same(&lora, &layout.from_vector(&vector).unwrap());
        }

        #[test]
        fn with_a_shared_down_only_the_ups_are_in_the_vector(lora in any_lora()) {
            let down: BTreeMap<_, _> = lora.layers.iter().map(|(name, layer)| (name.clone(), layer.down.clone())).collect();
            let layout = LoraLayout::of(&lora).with_shared_down(down.clone()).unwrap();
            let vector = layout.to_vector(&lora).unwrap();
            let ups: usize = lora.layers.values().map(|layer| layer.up.elem_count()).sum();
            prop_assert_eq!(vector.len(), ups);
            // As it comes back from config.json and stats.safetensors.
            let json = serde_json::to_string(&layout).unwrap();
            let read: LoraLayout = serde_json::from_str(&json).unwrap();
            prop_assert!(read.from_vector(&vector).is_err());
            assert_same(&lora, &read.with_shared_down(down).unwrap().from_vector(&vector).unwrap());
        }
    }

    fn small() -> Lora {
        let up = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu).unwrap();
        let down = Tensor::new(&[[10f32, 20.0], [30.0, 40.0]], &Device::Cpu).unwrap();
        let layer = LoraLayer::new("m", down, up, 2.0).unwrap();
        Lora { layers: [("m".to_string(), layer)].into(), metadata: BTreeMap::new() }
    }

    #[test]
    fn the_vector_is_b_and_then_a_transposed() {
        let vector = LoraLayout::of(&small()).to_vector(&small()).unwrap();
        assert_eq!(vector, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 30.0, 20.0, 40.0]);
    }

    #[test]
    fn what_does_not_fit_the_layout_is_named() {
        let layout = LoraLayout::of(&small());
        let says = |result: Result<Vec<f32>, LoraError>, words: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        let mut other = small();
        other.layers.get_mut("m").unwrap().alpha = 1.0;
        says(layout.to_vector(&other), "alpha 1, wanted 2");
        other = small();
        let layer = other.layers.remove("m").unwrap();
        says(layout.to_vector(&other), "it is missing");
        other = small();
        other.layers.insert("n".to_string(), layer.clone());
        says(layout.to_vector(&other), "does not have it");

        let shared = layout.clone().with_shared_down([("m".to_string(), layer.down.clone())].into()).unwrap();
        other = small();
        other.layers.get_mut("m").unwrap().down = (layer.down * 1.1).unwrap();
        says(shared.to_vector(&other), "not the shared one");

        assert!(matches!(layout.from_vector(&[0.0; 9]), Err(LoraError::Length { given: 9, wanted: 10 })));
        let mut vector = [0.0; 10];
        vector[3] = f32::NAN;
        assert!(matches!(layout.from_vector(&vector), Err(LoraError::NotFinite { .. })));
    }
}
