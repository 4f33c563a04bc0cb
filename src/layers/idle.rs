//! Idle threads leave the cores to those that work.

/// Lets the threads that candle keeps for element-wise operations sleep as soon as they have nothing to do.
///
/// By itself each spins for a while after every operation, on a core that our own kernels then lack: at SDXL's size a
/// twentieth of a training step. A `CANDLE_BARRIER_POOL_SPIN_LIMIT` that the user has set stays. Call it at the
/// beginning of `main`.
///
/// # Safety
/// No other thread may run yet: the environment is changed.
pub unsafe fn rest_idle_threads() {
    const LIMIT: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    if std::env::var_os(LIMIT).is_none() {
        // SAFETY: the caller promises that this is the only thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(LIMIT, "0") };
    }
}
