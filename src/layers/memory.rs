//! Memory that a layer gives back is the next layer's.

/// Lets glibc keep freed blocks for the next ones instead of returning each to the system.
///
/// Activations are blocks of some ten megabytes. By itself glibc unmaps them as soon as they are freed, and the pages
/// of the next layer's output are zeroed and faulted in again, which took a third of the time of SDXL's widest linear
/// layer in bf16. Call it first in `main`; other C libraries are left alone.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` may be called at any time; what it refuses it leaves as it was.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1); // never
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
