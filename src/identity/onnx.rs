//! ONNX files run by rten.
//!
//! Tried on these files (2 CPU cores): rten 0.27 and tract-onnx 0.23.9 agree with onnxruntime to rounding
//! (≤ 1e-5); rten loads in milliseconds where tract takes 40–110, and runs MobileFaceNet in 15 ms (tract 26,
//! onnxruntime 41), YuNet at 640² in 30 (35, 5). candle-onnx needs protoc and lacks operators. rten is pure Rust,
//! takes `.onnx` as it is and inputs of any size, which SCRFD and ArcFace files need as well.

use anyhow::{Context, Result, anyhow};
use rten::{Model, NodeId, ValueView};
use sha2::{Digest, Sha256};

/// A network from an ONNX file with one picture-like input.
pub struct Network {
    name: &'static str,
    bytes: &'static [u8],
    model: Model,
    input: NodeId,
    outputs: Vec<NodeId>,
}

impl Network {
    /// Loads a network that is embedded in the program; `outputs` names what [`Network::run`] gives back.
    pub fn embedded(name: &'static str, bytes: &'static [u8], outputs: &[&str]) -> Result<Self> {
        let load = || -> Result<Self> {
            let model = Model::load_static_slice(bytes)?;
            let &input = model.input_ids().first().context("it has no input")?;
            let outputs =
                outputs.iter().map(|output| model.node_id(output)).collect::<Result<Vec<_>, _>>()?;
            Ok(Self { name, bytes, model, input, outputs })
        };
        load().with_context(|| format!("cannot load the network `{name}`"))
    }

    /// The outputs, flattened, for an input of shape (B, C, height, width).
    pub fn run(&self, shape: [usize; 4], input: &[f32]) -> Result<Vec<Vec<f32>>> {
        let run = || -> Result<Vec<Vec<f32>>> {
            let input = ValueView::from_shape(shape, input)?;
            let outputs = self.model.run(vec![(self.input, input.into())], &self.outputs, None)?;
            let flat = |value: rten::Value| -> Result<Vec<f32>> {
                let tensor: rten_tensor::Tensor<f32> = value.try_into()?;
                Ok(tensor.into_data())
            };
            let outputs = outputs.into_iter().map(flat).collect::<Result<Vec<_>>>()?;
            if outputs.iter().flatten().any(|value| !value.is_finite()) {
                return Err(anyhow!("it gave numbers that are not finite"));
            }
            Ok(outputs)
        };
        run().with_context(|| format!("cannot run the network `{}`", self.name))
    }

    /// The name under which the network is recorded.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// SHA-256 of the ONNX file in lower-case hex digits.
    pub fn sha256(&self) -> String {
        Sha256::digest(self.bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
