//! Measures with intervals.
