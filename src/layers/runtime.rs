//! Process-wide settings: candle's spin-wait (`CANDLE_BARRIER_POOL_SPIN_LIMIT`) and glibc's reuse of freed blocks.

/// Shortens the spin-wait of candle's thread pool, unless the user has set how long they spin
/// (`CANDLE_BARRIER_POOL_SPIN_LIMIT`).
///
/// By themselves they spin for half a millisecond, which is as long as a small network takes from one large operation to
/// the next: a second core is busy with nothing.
///
/// # Safety
/// No other thread may run yet: the environment is changed.
pub unsafe fn let_waiting_threads_sleep() {
    const LIMIT: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    if std::env::var_os(LIMIT).is_none() {
        // SAFETY: the caller promises that this is the only thread, so no other thread reads the environment meanwhile.
        unsafe { std::env::set_var(LIMIT, "500") };
    }
}

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
