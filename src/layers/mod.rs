//! The layers that every network here is built of, differentiable and fast on the CPU.
//!
//! candle's own fused LayerNorm and softmax have no backward pass, and gradients stop there without an error;
//! its convolution backward is several times slower than needed. So each operation here has one form for f32 on
//! the CPU, with a hand-written gradient (held against PyTorch by a test), and a composite form of candle
//! operations for every other device and type.
//!
//! A weight that is no variable gets no gradient: nothing is computed for frozen models.
//!
//! Weights of 16 bits follow the type of what they are applied to. On the CPU that is f32 ([`compute_dtype`]): each
//! layer widens its weights as it runs, so that a model takes half the memory and loses nothing but the bits of its
//! weights. Elsewhere activations have 16 bits too, and statistics of norms and softmax are kept in f32.

mod activation;
mod attention;
mod clip_transformer;
mod conv;
mod linear;
mod norm;
mod product;
