//! Compiles the CUDA kernels in builds with the feature `cuda`: machine code for the GPU that candle's kernels are built
//! for (`CUDA_COMPUTE_CAP`, or that of this machine), with PTX beside it for newer ones.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(error) = kernels() {
        println!("cargo::error=the CUDA kernels do not compile: {error}");
    }
}

/// Files of `src/layers/cuda/kernels`.
#[cfg(feature = "cuda")]
const FILES: [&str; 4] = ["attention", "norm", "optimiser", "pointwise"];

#[cfg(feature = "cuda")]
fn kernels() -> Result<(), Box<dyn std::error::Error>> {
    use std::path::Path;
    use std::process::Command;

    let folder = Path::new("src/layers/cuda/kernels");
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    let out = std::env::var("OUT_DIR")?;
    let nvcc = cudaforge::CudaToolkit::detect()?.nvcc_path;
    let target = cudaforge::detect_compute_cap()?;
    let number = target.base();
    for file in FILES {
        // Machine code, because a driver takes seconds to compile the attention kernels from PTX.
        let output = Command::new(&nvcc)
            .arg("-fatbin")
            .arg(format!("-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]"))
            .args(["-std=c++17", "-O3", "-o"])
            .arg(Path::new(&out).join(file).with_extension("fatbin"))
            .arg(folder.join(file).with_extension("cu"))
            .output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
        }
    }
    // What a machine needs is said before a kernel is loaded.
    let version = Command::new(&nvcc).arg("--version").output()?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let release = version.split_once("release ").and_then(|(_, rest)| rest.split(',').next()).unwrap_or("");
    println!("cargo::rustc-env=KERNELS_TOOLKIT={release}");
    println!("cargo::rustc-env=KERNELS_TARGET={}", target.to_nvcc_arch());
    Ok(())
}
