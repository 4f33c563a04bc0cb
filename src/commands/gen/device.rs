//! Where to compute, and in which numbers.

use anyhow::Result;
use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// A number type for weights. Where the device is a CPU they are widened as they are used: half the memory, and the
/// arithmetic of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(in crate::commands) enum Precision {
    F32,
    F16,
    Bf16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => DType::F32,
            Precision::F16 => DType::F16,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// The device that `name` stands for.
pub(in crate::commands) fn device(name: &str) -> Result<Device> {
    let missing =
        |what: &str| Failure::Usage(format!("this build has no {what}; build it with --features {what}"));
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(Device::cuda_if_available(0)?),
        "metal" if candle_core::utils::metal_is_available() => Ok(Device::new_metal(0)?),
        "metal" => Err(missing("metal").into()),
        _ => match name.strip_prefix("cuda") {
            Some(_) if !candle_core::utils::cuda_is_available() => Err(missing("cuda").into()),
            Some(number) => {
                let number = number.trim_start_matches(':');
                let number = if number.is_empty() { Ok(0) } else { number.parse() };
                let number =
                    number.map_err(|_| Failure::Usage(format!("`{name}` is no device: write cuda:0")))?;
                Ok(Device::new_cuda(number)?)
            }
            None => {
                Err(Failure::Usage(format!("`{name}` is no device; it is auto, cpu, cuda[:N] or metal"))
                    .into())
            }
        },
    }
}
