//! Matrix products on the CPU, blocked as in BLIS: operands are packed block by block ([`operands`]) and multiplied by a
//! microkernel of the processor's widest instructions ([`microkernel`]).

pub(super) mod isa;
pub(super) mod matmul;
pub(super) mod microkernel;
#[cfg(feature = "onednn")]
pub(super) mod onednn;
pub(super) mod operands;
pub(super) mod packing;
mod rank_update;
pub(super) mod skinny;

pub use rank_update::add_low_rank;
