//! The mean of gradients over the GPUs of a [`ProcessGroup`](crate::train::distributed::ProcessGroup) by NCCL: end to end in one all-reduce, in the
//! stream that computed them, so that nothing is copied to the CPU and nothing is waited for.
//!
//! NCCL's calls have no time limit. A process that has gone is noticed where the group exchanges the loss, before each
//! all-reduce; when one dies within an all-reduce, the others wait until they are ended from outside, as torchrun does.

use anyhow::{Context, Result, anyhow};
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::nccl::result::NcclError;
use candle_core::cuda_backend::cudarc::nccl::safe::{Comm, Id, ReduceOp};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, DType, Device, InplaceOp1, Layout, Tensor};

use crate::train::gradients::Gradients;

/// The GPU on which `gradients` are, if they are on one.
pub fn gpu(gradients: &Gradients) -> Option<CudaDevice> {
    match gradients.values().next()?.device() {
        Device::Cuda(gpu) => Some(gpu.clone()),
        _ => None,
    }
}

/// Sent by the first process to the others, so that they find each other.
pub type Name = [u8; 128];

/// A new one.
pub fn name() -> Result<Name> {
    let id = Id::new().map_err(nccl_error).context("NCCL cannot begin")?;
    Ok(id.internal().map(|byte| byte as u8))
}

/// The connection of this process's GPU to those of the others.
pub struct Gpus {
    comm: Comm,
}

// SAFETY: a communicator is bound to no thread; NCCL only forbids several threads at once, and `Comm` is not `Sync`.
unsafe impl Send for Gpus {}

impl Gpus {
    /// Waits for all `world` processes, each with a GPU of its own.
    ///
    /// # Errors
    /// NCCL's error, for example of two processes that have the same GPU.
    pub fn init(gpu: &CudaDevice, rank: usize, world: usize, name: &Name) -> Result<Self> {
        let stream = gpu.cuda_stream();
        // NCCL takes the device of the thread.
        stream.context().bind_to_thread()?;
        let id = Id::uninit(name.map(|byte| byte as std::ffi::c_char));
        let comm = Comm::from_rank(stream, rank, world, id).map_err(nccl_error).with_context(|| {
            format!("rank {rank} of {world}: the GPUs cannot be joined; each process needs one of its own")
        })?;
        Ok(Self { comm })
    }

    /// The mean over all processes, in the place of each one's own. All have gradients of the same shapes.
    pub fn mean(&self, gradients: &mut Gradients) -> Result<()> {
        let rows = gradients.values().map(|gradient| gradient.flatten_all()?.to_dtype(DType::F32));
        let rows = rows.collect::<candle_core::Result<Vec<_>>>()?;
        let all = match &rows[..] {
            [one] => one.force_contiguous()?,
            _ => Tensor::cat(&rows, 0)?,
        };
        all.inplace_op1(&Mean(&self.comm))?;
        let mut at = 0;
        for gradient in gradients.values_mut() {
            let count = gradient.elem_count();
            *gradient = all.narrow(0, at, count)?.reshape(gradient.shape())?.to_dtype(gradient.dtype())?;
            at += count;
        }
        Ok(())
    }
}

struct Mean<'a>(&'a Comm);

impl InplaceOp1 for Mean<'_> {
    fn name(&self) -> &'static str {
        "nccl-mean"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("NCCL takes no tensor of the CPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        match &mut storage.slice {
            CudaStorageSlice::F32(values) if layout.contiguous_offsets() == Some((0, values.len())) => {
                match self.0.all_reduce_in_place(values, &ReduceOp::Avg) {
                    Ok(_) => Ok(()),
                    Err(error) => candle_core::bail!("NCCL: {}", nccl_error(error)),
                }
            }
            _ => candle_core::bail!("NCCL takes a whole tensor of f32, not {layout:?}"),
        }
    }
}

/// cudarc's error, which does not show its code.
fn nccl_error(error: NcclError) -> anyhow::Error {
    anyhow!("{:?}; NCCL_DEBUG=INFO tells more", error.0)
}
