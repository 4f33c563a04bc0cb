//! Where to compute, and in which numbers.

use anyhow::Result;
use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::named::named;
use crate::progress;

mod cuda;

named! {
    /// A number type for weights. Where the device is a CPU they are widened as they are used: half the memory, and the
    /// arithmetic of f32.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum Precision {
        /// 32-bit floats.
        F32 = "f32",
        /// 16-bit floats, IEEE half precision.
        F16 = "f16",
        /// 16-bit floats with the exponent of f32 (bfloat16).
        Bf16 = "bf16",
    }
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
///
/// `auto` is the GPU of a build with CUDA, and the CPU where there is none or it cannot be used. Without a number `cuda`
/// is the first GPU, and in a group of processes the one of this process.
///
/// # Errors
/// [`Failure::Usage`] for a device that there is not.
pub fn open(name: &str) -> Result<Device> {
    let missing =
        |what: &str| Failure::Usage(format!("this build has no {what}; build it with --features {what}"));
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" if candle_core::utils::cuda_is_available() => cuda(local_rank()?).or_else(|why| {
            progress::note(format_args!("{why}; everything is computed on the CPU"));
            Ok(Device::Cpu)
        }),
        "auto" => Ok(Device::Cpu),
        "metal" if candle_core::utils::metal_is_available() => Ok(Device::new_metal(0)?),
        "metal" => Err(missing("metal").into()),
        _ => match name.strip_prefix("cuda") {
            Some(_) if !candle_core::utils::cuda_is_available() => Err(missing("cuda").into()),
            Some("") => Ok(cuda(local_rank()?)?),
            Some(number) => {
                let number = number.strip_prefix(':').and_then(|number| number.parse().ok());
                let usage = || Failure::Usage(format!("`{name}` is no device: write cuda:0"));
                Ok(cuda(number.ok_or_else(usage)?)?)
            }
            None => {
                Err(Failure::Usage(format!("`{name}` is no device; it is auto, cpu, cuda[:N] or metal"))
                    .into())
            }
        },
    }
}

/// The GPU of this process in a group that torchrun started (`WORLD_SIZE` is set): `LOCAL_RANK`; else 0.
fn local_rank() -> Result<usize> {
    match (std::env::var_os("WORLD_SIZE"), std::env::var("LOCAL_RANK")) {
        (Some(_), Ok(text)) => {
            Ok(text.parse().map_err(|_| Failure::Usage(format!("LOCAL_RANK={text} is not a number")))?)
        }
        _ => Ok(0),
    }
}

fn cuda(number: usize) -> Result<Device, Failure> {
    #[cfg(feature = "cuda")]
    return cuda::open(number).map_err(|why| Failure::Usage(format!("cuda:{number} cannot be used: {why}")));
    #[cfg(not(feature = "cuda"))]
    Err(Failure::Usage(format!("cuda:{number} cannot be used: this build has no cuda")))
}

/// An error with what it means where it is one of a GPU's driver, and with what helps.
pub fn explained(error: anyhow::Error) -> anyhow::Error {
    match cuda::explain(&format!("{error:#}"), cuda::memory()) {
        Some(why) => error.context(why),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_device_is_refused_by_name() {
        for (name, why) in [("gpu", "auto, cpu, cuda[:N] or metal"), ("cuda:x", "cuda"), ("cudaless", "cuda")]
        {
            let error = open(name).unwrap_err();
            assert!(matches!(error.downcast_ref(), Some(Failure::Usage(_))), "{error}");
            assert!(error.to_string().contains(why), "{error}");
        }
        assert!(open("cpu").unwrap().is_cpu() && open("auto").is_ok());
    }
}
