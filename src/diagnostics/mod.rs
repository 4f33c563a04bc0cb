//! Diagnostics of this build and this machine: features, CPU kernels, threads, GPUs, folders, models.

pub mod models;

use std::path::Path;
use std::process::Command;

use serde::Serialize;
use serde_json::{Value, json};

use crate::layers;

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, with a restriction that the user may want to know of.
    Note,
    /// Something that was set up does not work.
    Problem,
}

/// One finding.
#[derive(Debug, Serialize)]
pub struct Check {
    /// How good it is.
    pub status: Status,
    /// Subject, one word.
    pub area: &'static str,
    /// Finding.
    pub text: String,
    /// Remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// The same for programs.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub details: Value,
}

impl Check {
    /// A finding that needs nothing to be done.
    pub fn ok(area: &'static str, text: impl Into<String>) -> Self {
        Self { status: Status::Ok, area, text: text.into(), remedy: None, details: Value::Null }
    }

    /// A restriction and how to lift it.
    pub fn note(area: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Note, remedy: Some(remedy.into()), ..Self::ok(area, text) }
    }

    /// A defect and how to repair it.
    pub fn problem(area: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Problem, ..Self::note(area, text, remedy) }
    }

    /// The finding with its numbers.
    pub fn with(self, details: Value) -> Self {
        Self { details, ..self }
    }
}

/// Everything about build and machine.
pub fn machine() -> Vec<Check> {
    let mut checks = vec![version(), kernels(), threads()];
    checks.extend(gpus());
    checks
}

/// The cargo features of this build.
pub fn features() -> Vec<&'static str> {
    let all = [
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("flash-attn", cfg!(feature = "flash-attn")),
        ("nccl", cfg!(feature = "nccl")),
        ("metal", cfg!(feature = "metal")),
        ("accelerate", cfg!(feature = "accelerate")),
        ("onednn", cfg!(feature = "onednn")),
    ];
    all.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect()
}

fn version() -> Check {
    let features = features();
    let text = match features.is_empty() {
        true => "no optional features".to_string(),
        false => format!("features {}", features.join(", ")),
    };
    let number = env!("CARGO_PKG_VERSION");
    let text = format!("difflora {number} for {}-{}, {text}", std::env::consts::ARCH, std::env::consts::OS);
    if cfg!(debug_assertions) {
        return Check::note(
            "version",
            format!("{text}; debug build"),
            "build with `--release`: many times faster",
        );
    }
    Check::ok("version", text).with(json!({ "version": number, "features": features }))
}

fn kernels() -> Check {
    let name = layers::instruction_set();
    let details = json!({ "instruction_set": name, "onednn": layers::onednn_library() });
    let check = match layers::onednn_library() {
        Some(false) => Check::note(
            "cpu",
            format!("{name} kernels; oneDNN is not found"),
            "install oneDNN 3 (libdnnl.so.3), or set ONEDNN_ROOT to its folder",
        ),
        Some(true) => Check::ok("cpu", format!("{name} kernels, bf16 products by oneDNN")),
        None => Check::ok("cpu", format!("{name} kernels")),
    };
    check.with(details)
}

fn threads() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = rayon::current_num_threads();
    let text = format!("{threads} on {cores} cores");
    let details = json!({ "threads": threads, "cores": cores });
    let check = match threads < cores {
        true => Check::note("threads", text, "unset RAYON_NUM_THREADS to use all cores"),
        false => Check::ok("threads", text),
    };
    check.with(details)
}

/// The NVIDIA GPUs that the driver lists, and whether this build can use them.
fn gpus() -> Vec<Check> {
    if cfg!(feature = "metal") {
        return vec![Check::ok("gpu", "Metal: `--device metal`")];
    }
    let listed = nvidia_smi().unwrap_or_default();
    let cuda = cfg!(feature = "cuda");
    if listed.is_empty() {
        return vec![match cuda {
            true => {
                Check::note("gpu", "the NVIDIA driver lists no GPU; computing on the CPU", "see `nvidia-smi`")
            }
            false => Check::ok("gpu", "none; this build computes on the CPU"),
        }];
    }
    let mut checks = Vec::new();
    for (number, line) in listed.lines().enumerate() {
        let mut parts = line.split(", ").map(str::trim);
        let mut part = || parts.next().unwrap_or("?");
        let (name, total, free, driver) = (part(), part(), part(), part());
        let text = format!("cuda:{number} {name}, {free} of {total} MiB free, driver {driver}");
        let check = match (cuda, cuda.then(|| candle_core::Device::new_cuda(number))) {
            (_, Some(Err(error))) => {
                let why = error.to_string();
                let why = why.lines().next().unwrap_or_default();
                Check::problem("gpu", format!("{text}: {why}"), "update the driver, or use `--device cpu`")
            }
            (true, _) => Check::ok("gpu", text),
            _ => {
                Check::note("gpu", format!("{text}; not used by this build"), "build with `--features cuda`")
            }
        };
        checks.push(check.with(json!({
            "device": format!("cuda:{number}"), "name": name, "total_mib": total.parse::<u64>().ok(),
            "free_mib": free.parse::<u64>().ok(), "driver": driver,
        })));
    }
    checks
}

/// Name, total and free memory in MiB, and driver version, a line per GPU.
fn nvidia_smi() -> Option<String> {
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"])
        .output()
        .ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// A folder that files are downloaded or cached into: whether it can be written, and the free space.
///
/// `wanted` is how much space its typical content needs, in bytes.
pub fn folder(area: &'static str, path: &Path, wanted: u64) -> Check {
    let existing = path.ancestors().find(|part| part.is_dir()).unwrap_or(Path::new("."));
    let shown = path.display();
    let writable = tempfile::Builder::new().prefix(".difflora-").tempfile_in(existing);
    let free = free_space(existing);
    let details = json!({ "folder": path, "exists": path.is_dir(), "free_bytes": free });
    let space = free.map_or(String::new(), |free| format!(", {:.1} GB free", free as f64 / 1e9));
    let state = if path.is_dir() { "" } else { " (not made yet)" };
    let check = match writable {
        Err(error) => Check::problem(
            area,
            format!("`{shown}` cannot be written: {error}"),
            format!("change the permissions of `{}`", existing.display()),
        ),
        Ok(_) if free.is_some_and(|free| free < wanted) => Check::note(
            area,
            format!("`{shown}`{state}{space}"),
            format!(
                "SDXL needs {:.0} GB; free some space or set HF_HOME to another disk",
                wanted as f64 / 1e9
            ),
        ),
        Ok(_) => Check::ok(area, format!("`{shown}`{state}{space}")),
    };
    check.with(details)
}

/// Bytes that this user can still write on the disk of `folder`, where the system tells.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn free_space(folder: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
    // SAFETY: `path` ends in a zero byte, and all-zero is a valid value of the plain struct that is filled.
    unsafe {
        let mut about: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut about) == 0).then(|| about.f_bavail * about.f_frsize)
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn free_space(_: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_judged_by_space_and_permissions() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("not/yet");
        assert_eq!(folder("cache", &missing, 0).status, Status::Ok);
        assert!(folder("cache", &missing, 0).text.contains("not made yet"));
        if cfg!(all(target_os = "linux", target_env = "gnu")) {
            assert_eq!(folder("cache", &missing, u64::MAX).status, Status::Note);
        }
        assert_eq!(folder("cache", Path::new("/proc/self"), 0).status, Status::Problem);
    }
}
