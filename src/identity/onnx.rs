//! ONNX files run by rten.
//!
//! Tried on these files (2 CPU cores): rten 0.27 and tract-onnx 0.23.9 agree with onnxruntime to rounding
//! (≤ 1e-5); rten loads in milliseconds where tract takes 40–110, and runs MobileFaceNet in 15 ms (tract 26,
//! onnxruntime 41), YuNet at 640² in 30 (35, 5), for which it is computed in [`yunet`](super::yunet). candle-onnx needs
//! protoc and lacks operators. rten is pure Rust, takes `.onnx` as it is and inputs of any size, which SCRFD and ArcFace
//! files need as well. `scripts/bench_onnxruntime.py` times all of them.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rten::{Model, NodeId, ValueView};

use super::onnx_header::Header;
use crate::failure::Failure;
use crate::weights::sha256;

/// A network from an ONNX file with one image-like input.
pub struct Network {
    name: String,
    weights: Weights,
    model: Model,
    input: NodeId,
    outputs: Vec<NodeId>,
    output_names: Vec<String>,
}

/// Where the weights came from, for their checksum.
enum Weights {
    Embedded(&'static [u8]),
    File { sha256: String },
}

impl Network {
    /// Loads a network that is embedded in the program; `outputs` names what [`Network::run`] gives back.
    pub fn embedded(name: &'static str, bytes: &'static [u8], outputs: &[&str]) -> Result<Self> {
        let load = || -> Result<Self> {
            let model = Model::load_static_slice(bytes)?;
            let &input = model.input_ids().first().context("it has no input")?;
            let output_names: Vec<String> = outputs.iter().map(|output| (*output).to_string()).collect();
            let outputs =
                outputs.iter().map(|output| model.node_id(output)).collect::<Result<Vec<_>, _>>()?;
            let weights = Weights::Embedded(bytes);
            Ok(Self { name: name.into(), weights, model, input, outputs, output_names })
        };
        load().with_context(|| format!("cannot load the network `{name}`"))
    }

    /// Loads a network from a file of at most 4 GiB, with what its header says; [`Network::run`] gives back all outputs in the file's
    /// order.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a file that is missing, damaged or no ONNX, or that has operators which are not
    /// known here.
    pub fn file(name: &str, path: &Path) -> Result<(Self, Header)> {
        let bytes = crate::files::read_input(path, 1 << 32)?;
        Self::from_bytes(name, bytes).map_err(|error| Failure::unusable(path, format!("{error:#}")))
    }

    fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<(Self, Header)> {
        let header = Header::parse(&bytes)?;
        let [input] = &header.inputs[..] else {
            let names: Vec<&str> = header.inputs.iter().map(|input| input.name.as_str()).collect();
            bail!("it has {} inputs ({}), wanted one image", names.len(), names.join(", "));
        };
        let shape_fits = input.shape.len() == 4 && input.shape[1].is_none_or(|channels| channels == 3);
        ensure!(shape_fits, "its input is {input}, wanted an image [B, 3, height, width]");
        let sha256 = sha256::of_bytes(&bytes);
        let model = Model::load(bytes).map_err(|error| anyhow!("it cannot be run: {error}"))?;
        let input = model.node_id(&input.name)?;
        let output_names: Vec<String> = header.outputs.iter().map(|output| output.name.clone()).collect();
        let outputs =
            output_names.iter().map(|output| model.node_id(output)).collect::<Result<Vec<_>, _>>()?;
        let weights = Weights::File { sha256 };
        Ok((Self { name: name.into(), weights, model, input, outputs, output_names }, header))
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
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names of the outputs that [`Network::run`] gives back, in its order.
    pub fn output_names(&self) -> &[String] {
        &self.output_names
    }

    /// SHA-256 of the ONNX file in lower-case hex digits.
    pub fn sha256(&self) -> String {
        match &self.weights {
            Weights::Embedded(bytes) => sha256::of_bytes(bytes),
            Weights::File { sha256 } => sha256.clone(),
        }
    }
}
