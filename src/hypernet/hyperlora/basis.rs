//! The bases: for each attention module and each of its projections, K matrices that coefficients mix to `down` and
//! `up`.
//!
//! Module i owns rows 8i to 8i + 7 of the coefficients: down and up of q, k, v and out. With c and u of one projection,
//! ```text
//! down = (Σ_k c_k D_k)ᵀ      up = (Σ_k u_k U_k)ᵀ      alpha = R / 2
//! ```
//! where D (K, in, R) is `{i}.{projection}.id_down_basis` and U (K, R, out) is `{i}.{projection}.id_up_basis`.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, anyhow};
use candle_core::{DType, Tensor};
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use super::FILES;
use crate::lora::keys::{self, Key};
use crate::lora::ldm_keys::BlockLayout;
use crate::lora::{Lora, LoraLayer};
use crate::progress;
use crate::weights::model_folder::{ModelFiles, TensorReader};

/// The file of the bases, without its extension.
const STEM: &str = "hyper_lora_modules";

/// The projections in the order of the coefficients, and how LoRA files spell them.
const PROJECTIONS: [(&str, &str); 4] =
    [("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out_0")];

/// What is known of the bases without reading them.
#[derive(Clone, Debug)]
pub(super) struct Basis {
    /// In the order of the coefficients.
    pub modules: Vec<Module>,
    /// K, matrices of a basis.
    pub coefficients: usize,
    /// R.
    pub rank: usize,
}

/// An attention module of the UNet.
#[derive(Clone, Debug)]
pub(super) struct Module {
    /// diffusers paths of q, k, v and out.
    paths: [String; 4],
    /// Width of its queries.
    width: usize,
    /// Width of its keys' and values' input.
    context: usize,
}

impl Module {
    fn new(name: &str, entry: &Entry) -> Result<Self> {
        let path =
            |spelled: &str| match keys::parse(&format!("{name}_{spelled}.alpha"), &BlockLayout::default()) {
                Key::Layer(path, _) if path.contains(".attn1.") || path.contains(".attn2.") => Ok(path),
                _ => Err(anyhow!("`{name}` is no attention module of a UNet (lora_unet_…_attn1 or …_attn2)")),
            };
        let [q, k, v, out] = PROJECTIONS.map(|(_, spelled)| path(spelled));
        let width = entry.hidden_size;
        Ok(Self { paths: [q?, k?, v?, out?], width, context: entry.cross_attention_dim.unwrap_or(width) })
    }

    /// Path, outputs and inputs of each projection.
    pub fn layers(&self) -> impl Iterator<Item = (String, usize, usize)> {
        let layer = |((projection, _), path): (&(&str, &str), &String)| {
            (path.clone(), self.width, self.inputs(projection))
        };
        PROJECTIONS.iter().zip(&self.paths).map(layer)
    }

    /// Inputs of a projection.
    fn inputs(&self, projection: &str) -> usize {
        if matches!(projection, "to_k" | "to_v") { self.context } else { self.width }
    }
}

impl Basis {
    /// Reads `hyper_lora_modules.json` and holds the shapes of `hyper_lora_modules.safetensors` against it.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        let modules = read_modules(files)?;
        let stored = files.reader("", STEM)?;
        let first = stored.shape("0.to_q.id_down_basis")?;
        let [coefficients, _, rank] = first[..] else {
            return Err(stored.unusable(format!("a basis has shape {first:?}, wanted three axes")));
        };
        let basis = Self { modules, coefficients, rank };
        basis.check(&stored)?;
        Ok(basis)
    }

    /// Refuses bases of other shapes than the list of modules wants: with another order a LoRA would be noise.
    fn check(&self, stored: &TensorReader) -> Result<()> {
        for (i, module) in self.modules.iter().enumerate() {
            for (projection, path) in PROJECTIONS.iter().map(|(it, _)| it).zip(&module.paths) {
                let (k, r) = (self.coefficients, self.rank);
                for (name, wanted) in [
                    (down_name(i, projection), [k, module.inputs(projection), r]),
                    (up_name(i, projection), [k, r, module.width]),
                ] {
                    let found = stored.shape(&name)?;
                    if found != wanted {
                        return Err(stored.unusable(format!(
                            "`{name}` has shape {found:?}; `{}` lists `{path}` there, which wants {wanted:?}",
                            FILES[0]
                        )));
                    }
                }
            }
        }
        let (found, wanted) = (stored.names().len(), 8 * self.modules.len());
        if found != wanted {
            let why = format!(
                "it has {found} tensors, the {} modules of `{}` want {wanted}",
                self.modules.len(),
                FILES[0]
            );
            return Err(stored.unusable(why));
        }
        Ok(())
    }

    /// The LoRA of `coefficients` (8 · modules, K), f32 on the CPU.
    pub fn lora(&self, files: &ModelFiles, coefficients: &Tensor) -> Result<Lora> {
        let stored = files.reader("", STEM)?;
        let mut layers = BTreeMap::new();
        let bar = progress::bar(self.modules.len() as u64, "mixing the bases");
        for (i, module) in self.modules.iter().enumerate() {
            progress::check()?;
            for (j, (projection, path)) in PROJECTIONS.iter().map(|(it, _)| it).zip(&module.paths).enumerate()
            {
                let row = 8 * i + 2 * j;
                let mixed = |name: String, row: usize, [rows, columns]: [usize; 2]| -> Result<Tensor> {
                    let basis = stored.load(&name, Some(DType::F32))?.flatten_from(1)?; // (K, rows · columns)
                    let sum = coefficients.narrow(0, row, 1)?.matmul(&basis)?;
                    Ok(sum.reshape((rows, columns))?.t()?.contiguous()?)
                };
                let down = mixed(down_name(i, projection), row, [module.inputs(projection), self.rank])?;
                let up = mixed(up_name(i, projection), row + 1, [self.rank, module.width])?;
                layers.insert(path.clone(), LoraLayer::new(path, down, up, self.rank as f32 / 2.0)?);
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(Lora { layers, metadata: BTreeMap::new() })
    }
}

fn down_name(module: usize, projection: &str) -> String {
    format!("{module}.{projection}.id_down_basis")
}

fn up_name(module: usize, projection: &str) -> String {
    format!("{module}.{projection}.id_up_basis")
}

/// The modules that `hyper_lora_modules.json` lists, in its order.
pub(super) fn read_modules(files: &ModelFiles) -> Result<Vec<Module>> {
    let Listed(listed) = files.json(FILES[0])?;
    let module = |(name, entry)| Module::new(name, entry).map_err(|error| files.unusable(FILES[0], error));
    listed.iter().map(|(name, entry)| (name.as_str(), entry)).map(module).collect()
}

/// An entry of `hyper_lora_modules.json`.
#[derive(Debug, Deserialize)]
struct Entry {
    hidden_size: usize,
    /// None for self-attention.
    cross_attention_dim: Option<usize>,
}

/// The entries by name in the order of the file, which the numbers of the bases follow.
struct Listed(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Listed {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Listed;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of attention modules")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Listed, A::Error> {
                let mut entries: Vec<(String, Entry)> = Vec::new();
                while let Some((name, entry)) = map.next_entry::<String, Entry>()? {
                    if entries.iter().any(|(other, _)| *other == name) {
                        return Err(serde::de::Error::custom(format!("`{name}` occurs twice")));
                    }
                    entries.push((name, entry));
                }
                Ok(Listed(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
