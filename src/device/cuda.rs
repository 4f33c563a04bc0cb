//! What a CUDA build needs of a machine, and what the driver's errors mean to a user.

#[cfg(any(feature = "cuda", test))]
use std::fmt;

/// A version, or a compute capability: major and minor number.
#[cfg(any(feature = "cuda", test))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

#[cfg(any(feature = "cuda", test))]
impl Version {
    /// As the driver numbers it: 13000 is 13.0.
    fn of_driver(number: i32) -> Self {
        let number = number.max(0) as u32;
        Self(number / 1000, number % 1000 / 10)
    }

    /// `13.0`
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        Some(Self(major.parse().ok()?, minor.parse().ok()?))
    }
}

#[cfg(any(feature = "cuda", test))]
impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// What the kernels of a build were compiled with and for.
#[cfg(any(feature = "cuda", test))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Build {
    toolkit: Version,
    capability: Version,
    /// Whether they run on GPUs of that very capability alone: a target with a letter, as sm_90a.
    exact: bool,
}

#[cfg(any(feature = "cuda", test))]
impl Build {
    /// From a version as `13.0` and a target as `sm_90a`.
    fn parse(toolkit: &str, target: &str) -> Option<Self> {
        let number = target.strip_prefix("sm_")?;
        let digits = number.trim_end_matches(|c: char| c.is_ascii_lowercase());
        let (major, minor) = digits.split_at_checked(digits.len().checked_sub(1)?)?;
        let capability = Version(major.parse().ok()?, minor.parse().ok()?);
        Some(Self { toolkit: Version::parse(toolkit)?, capability, exact: digits != number })
    }

    /// Why GPU `number` of `machine` cannot be used.
    fn refusal(&self, machine: &Machine, number: usize) -> Option<String> {
        let Self { toolkit, capability, exact } = *self;
        let Machine { driver, gpus, capability: own } = *machine;
        if driver < toolkit {
            return Some(format!(
                "the driver supports CUDA {driver}, and this build needs {toolkit}: update the NVIDIA driver, or build with \
                 the CUDA toolkit {driver}"
            ));
        }
        if number >= gpus {
            return Some(match gpus {
                0 => "the driver finds no GPU".into(),
                1 => format!("there is no cuda:{number}; the only GPU is cuda:0"),
                _ => format!("there is no cuda:{number}; the GPUs are cuda:0 to cuda:{}", gpus - 1),
            });
        }
        let own = own?;
        if own < capability || exact && own != capability {
            let from = if exact { "" } else { " and above" };
            let Version(major, minor) = own;
            return Some(format!(
                "cuda:{number} has compute capability {own}, and this build has kernels for {capability}{from}: build with \
                 CUDA_COMPUTE_CAP={major}{minor}"
            ));
        }
        None
    }
}

/// What the driver says of a machine.
#[cfg(any(feature = "cuda", test))]
#[derive(Clone, Copy, Debug)]
struct Machine {
    /// The newest CUDA that the driver supports.
    driver: Version,
    gpus: usize,
    /// Of the GPU that is asked for, if there is one.
    capability: Option<Version>,
}

/// Memory of a GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    /// Not in use by any process.
    pub(super) free: u64,
    /// Of the GPU.
    pub(super) total: u64,
}

/// What a driver's error, somewhere in `text`, means and what helps; `None` where it is no error of the driver or says
/// nothing more than its name.
pub(super) fn explain(text: &str, memory: Option<Memory>) -> Option<String> {
    let start = text.find("CUDA_ERROR_")? + "CUDA_ERROR_".len();
    let name =
        text[start..].split(|c: char| !c.is_ascii_uppercase() && !c.is_ascii_digit() && c != '_').next()?;
    Some(match name {
        "OUT_OF_MEMORY" => {
            let free = match memory {
                Some(Memory { free, total }) => format!(" ({} of {} MiB are free now)", free >> 20, total >> 20),
                None => String::new(),
            };
            format!(
                "the GPU has no memory left{free}; what helps: --low-memory and a smaller --width and --height for \
                 images, a smaller --batch or --resolution for training, --dtype f16 or bf16, or to end other programs \
                 on the GPU"
            )
        }
        "STUB_LIBRARY" | "NOT_FOUND" | "SYSTEM_NOT_READY" | "NO_DEVICE" => {
            "there is no NVIDIA driver that works, or no GPU; `nvidia-smi` shows both".into()
        }
        "INSUFFICIENT_DRIVER" | "SYSTEM_DRIVER_MISMATCH" | "UNSUPPORTED_PTX_VERSION" | "COMPAT_NOT_SUPPORTED_ON_DEVICE" => {
            "the NVIDIA driver is older than the CUDA toolkit of this build; update the driver".into()
        }
        "NO_BINARY_FOR_GPU" | "INVALID_PTX" | "INVALID_IMAGE" | "UNSUPPORTED_DEVSIDE_SYNC" => {
            "this build has no kernels for this GPU; build with CUDA_COMPUTE_CAP set to its compute capability".into()
        }
        "DEVICE_UNAVAILABLE" | "DEVICE_NOT_LICENSED" | "DEVICES_UNAVAILABLE" => {
            "the GPU is in use by another process that keeps it to itself, or was taken away".into()
        }
        "UNKNOWN" | "ECC_UNCORRECTABLE" | "HARDWARE_STACK_ERROR" | "LAUNCH_FAILED" | "ILLEGAL_ADDRESS"
        | "LAUNCH_TIMEOUT" | "CONTEXT_IS_DESTROYED" | "DEINITIALIZED" | "NVLINK_UNCORRECTABLE" | "EXTERNAL_DEVICE"
        | "MISALIGNED_ADDRESS" | "ILLEGAL_INSTRUCTION" => {
            "the GPU failed or was taken away; what was saved before is kept, and training goes on from the last \
             checkpoint with --resume"
                .into()
        }
        _ => return None,
    })
}

/// Opens GPU `number`.
///
/// # Errors
/// Why it cannot be used, and what helps.
#[cfg(feature = "cuda")]
pub(super) fn open(number: usize) -> Result<candle_core::Device, String> {
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, result, sys};

    let meaning = |error: String| explain(&error, None).unwrap_or(error);
    result::init().map_err(|error| meaning(error.to_string()))?;
    let mut driver = 0;
    // SAFETY: it writes one number.
    let driver = match unsafe { sys::cuDriverGetVersion(&mut driver) } {
        sys::CUresult::CUDA_SUCCESS => Version::of_driver(driver),
        error => return Err(meaning(format!("{error:?}"))),
    };
    let gpus = CudaContext::device_count().map_err(|error| meaning(error.to_string()))?.max(0) as usize;
    let build = Build::parse(env!("KERNELS_TOOLKIT"), env!("KERNELS_TARGET"));
    let refuse = |capability| {
        let machine = Machine { driver, gpus, capability };
        build.and_then(|build| build.refusal(&machine, number)).map_or(Ok(()), Err)
    };
    refuse(None)?;
    let context = CudaContext::new(number).map_err(|error| meaning(error.to_string()))?;
    let (major, minor) = context.compute_capability().map_err(|error| meaning(error.to_string()))?;
    refuse(Some(Version(major.max(0) as u32, minor.max(0) as u32)))?;
    keep_freed_memory(&context).map_err(|error| meaning(error.to_string()))?;
    // One stream for all threads, so that work runs in the order in which it is queued.
    let device =
        candle_core::Device::new_cuda_with_stream(number).map_err(|error| meaning(error.to_string()))?;
    if let candle_core::Device::Cuda(cuda) = &device {
        // SAFETY: with one stream no tensor is used on another, and events that keep streams apart are not needed.
        unsafe { cuda.disable_event_tracking() }
    }
    Ok(device)
}

/// Lets the driver keep freed memory for the next tensors; by itself it gives it back to the system whenever the program
/// waits for the GPU.
#[cfg(feature = "cuda")]
fn keep_freed_memory(
    context: &candle_core::cuda_backend::cudarc::driver::CudaContext,
) -> Result<(), candle_core::cuda_backend::cudarc::driver::DriverError> {
    use candle_core::cuda_backend::cudarc::driver::{result, sys};

    let mut threshold = u64::MAX;
    // SAFETY: the pool is the device's own, and the attribute is a 64-bit number.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, std::ptr::from_mut(&mut threshold).cast())
    }
}

/// Memory of the GPU that this thread uses; `None` without one.
#[cfg(feature = "cuda")]
pub(super) fn memory() -> Option<Memory> {
    let (free, total) = candle_core::cuda_backend::cudarc::driver::result::mem_get_info().ok()?;
    Some(Memory { free: free as u64, total: total as u64 })
}

/// Memory of the GPU that this thread uses; there is none in this build.
#[cfg(not(feature = "cuda"))]
pub(super) fn memory() -> Option<Memory> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_targets_are_read() {
        assert_eq!(Version::of_driver(12_080), Version(12, 8));
        let build = |toolkit, capability, exact| Some(Build { toolkit, capability, exact });
        assert_eq!(Build::parse("13.0", "sm_90a"), build(Version(13, 0), Version(9, 0), true));
        assert_eq!(Build::parse("12.8", "sm_120"), build(Version(12, 8), Version(12, 0), false));
        assert_eq!(Build::parse("13.0", ""), None);
    }

    #[test]
    fn machines_that_a_build_does_not_run_on_are_told_why() {
        let build = |target| Build::parse("13.0", target).unwrap();
        let machine = Machine { driver: Version(13, 0), gpus: 1, capability: Some(Version(9, 0)) };
        assert_eq!(build("sm_90a").refusal(&machine, 0), None);
        assert_eq!(build("sm_80").refusal(&machine, 0), None);

        let refusals = [
            (Machine { driver: Version(12, 4), ..machine }, 0, "sm_90a", ["CUDA 12.4", "needs 13.0"]),
            (machine, 7, "sm_90a", ["no cuda:7", "cuda:0"]),
            (Machine { gpus: 4, ..machine }, 7, "sm_90a", ["no cuda:7", "cuda:0 to cuda:3"]),
            (Machine { gpus: 0, capability: None, ..machine }, 0, "sm_80", ["no GPU", "no GPU"]),
            (
                Machine { capability: Some(Version(8, 6)), ..machine },
                0,
                "sm_90a",
                ["8.6", "CUDA_COMPUTE_CAP=86"],
            ),
            (
                Machine { capability: Some(Version(12, 0)), ..machine },
                0,
                "sm_90a",
                ["for 9.0", "CUDA_COMPUTE_CAP=120"],
            ),
            (Machine { capability: Some(Version(7, 5)), ..machine }, 0, "sm_80", ["7.5", "8.0 and above"]),
        ];
        for (machine, number, target, parts) in refusals {
            let why = build(target).refusal(&machine, number).unwrap();
            assert!(parts.iter().all(|part| why.contains(part)), "{why}");
        }
    }

    #[test]
    fn errors_of_the_driver_come_with_what_helps() {
        let memory = Memory { free: 300 << 20, total: 81_559 << 20 };
        for (error, part) in [
            (r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#, "300 of 81559 MiB"),
            (r#"DriverError(CUDA_ERROR_STUB_LIBRARY, "CUDA driver is a stub library")"#, "no NVIDIA driver"),
            ("CUDA_ERROR_NO_DEVICE", "nvidia-smi"),
            (
                r#"DriverError(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "…") when loading norm"#,
                "update the driver",
            ),
            ("CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_COMPUTE_CAP"),
            (r#"step 7: DriverError(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error")"#, "--resume"),
            ("CUDA_ERROR_DEVICE_UNAVAILABLE", "another process"),
        ] {
            let why = explain(error, Some(memory)).unwrap();
            assert!(why.contains(part), "{error}: {why}");
        }
        assert!(explain("CUDA_ERROR_OUT_OF_MEMORY", None).unwrap().contains("--low-memory"));
        assert_eq!(explain("cannot use `x.png`: not an image", None), None);
        assert_eq!(explain("CUDA_ERROR_INVALID_VALUE", None), None);
    }
}
