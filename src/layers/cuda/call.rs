//! A kernel launch, put together and checked without a GPU.

use candle_core::{DType, Result, bail};

/// A file of kernels: `kernels/*.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Module {
    Attention,
    Norm,
    Optimiser,
    Pointwise,
}

/// An argument of a kernel, of exactly the type that the kernel declares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Arg {
    /// An address in the device's memory.
    Pointer(u64),
    U64(u64),
    U32(u32),
    F32(f32),
}

/// What the driver's `cuLaunchKernel` takes.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) module: Module,
    pub(super) kernel: String,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) args: Vec<Arg>,
}

impl Call {
    /// # Errors
    /// Where the sizes are beyond what CUDA takes (CUDA C++ Programming Guide, "Technical Specifications per Compute
    /// Capability"): 2³¹ − 1 blocks along x, 65,535 along y and z, 1024 threads in whole warps.
    pub(super) fn new(
        module: Module,
        kernel: String,
        grid: [usize; 3],
        block: [u32; 3],
        args: Vec<Arg>,
    ) -> Result<Self> {
        let limits = [i32::MAX as usize, 65_535, 65_535];
        let threads: u32 = block.iter().product();
        let fits = grid.iter().zip(limits).all(|(blocks, limit)| (1..=limit).contains(blocks));
        if !fits || threads == 0 || threads > 1024 || !threads.is_multiple_of(32) {
            bail!("{kernel}: {grid:?} blocks of {block:?} threads are more than CUDA takes");
        }
        Ok(Self { module, kernel, grid: grid.map(|blocks| blocks as u32), block, args })
    }
}

/// The suffix of kernels for a type of tensors.
pub(super) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        _ => bail!("no kernels for {dtype:?}"),
    }
}

/// An input, or the place of an output: where its values lie one after the other, and their type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) address: u64,
    pub(super) dtype: DType,
}

/// Values that a thread moves at once: 16 bytes where every operand begins at a multiple of 16 bytes and the length of
/// every run of values is a multiple of that; else 1.
pub(super) fn vector(operands: &[Operand], runs: &[usize]) -> usize {
    let width = operands.first().map_or(1, |operand| 16 / operand.dtype.size_in_bytes());
    let aligned = operands.iter().all(|operand| operand.address.is_multiple_of(16));
    if aligned && runs.iter().all(|run| run.is_multiple_of(width)) { width } else { 1 }
}

/// A whole number of a size that kernels take as u32.
pub(super) fn small(value: usize) -> Result<Arg> {
    match u32::try_from(value) {
        Ok(value) => Ok(Arg::U32(value)),
        Err(_) => bail!("{value} is beyond the sizes of the CUDA kernels"),
    }
}

/// A device that runs kernels: a GPU, or in tests the CPU in its place.
pub(super) trait Backend {
    /// Memory of the device.
    type Buffer;
    /// Memory for `len` values, not initialised.
    fn alloc(&self, dtype: DType, len: usize) -> Result<Self::Buffer>;
    /// The place of a buffer for kernels.
    fn operand(&self, buffer: &Self::Buffer) -> Result<Operand>;
    /// Queues a kernel.
    fn run(&self, call: Call) -> Result<()>;
}
