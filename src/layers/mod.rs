//! The layers that every network here is built of, differentiable and fast on the CPU.
//!
//! candle's own fused LayerNorm and softmax have no backward pass, and gradients stop there without an error;
//! its convolution backward is several times slower than needed. So each operation here has one form for f32 on
//! the CPU, with a hand-written gradient (held against PyTorch by a test), and a composite form of candle
//! operations for every other device and type.
//!
//! A weight that is no variable gets no gradient: nothing is computed for frozen models.

mod activation;
mod attention;
mod clip_transformer;
mod conv;
mod linear;
mod norm;
mod slices;

pub use activation::{Activation, geglu, upsample_nearest2x};
pub use attention::attention;
pub use clip_transformer::{ClipTransformer, ClipTransformerSizes};
pub use conv::{Conv2d, ConvGeometry};
pub use linear::{Adapter, Linear, linear};
pub use norm::{GroupNorm, LayerNorm, layer_norm_plain};
