//! Threads that have nothing to do.

/// Makes candle's threads sleep soon after an operation, unless the user has set how long they spin
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
        // SAFETY: the caller promises that this is the only thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(LIMIT, "500") };
    }
}
