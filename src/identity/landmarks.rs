//! 106 landmarks of a face, by InsightFace's `2d106det` (`python-package/insightface/model_zoo/landmark.py`).
//!
//! With c the centre of the face's box and s = 192 / (1.5 · max(width, height)), the network is shown the 192×192 pixels
//! that x ↦ s·x + 96 − s·c brings the image to, red, green and blue from 0 to 255, and gives points v of which (v + 1)·96
//! lies in those pixels.

use std::path::Path;

use anyhow::{Result, ensure};

use super::align::{Similarity, warp};
use super::face::Face;
use super::onnx::Network;
use super::onnx_header::{Header, Port};
use crate::failure::Failure;
use crate::image::Image;

/// Points of a face.
pub const COUNT: usize = 106;

/// Side of the network's input in pixels.
const SIDE: usize = 192;

/// Side of the square that it is shown, as a multiple of the longer side of the face's box.
const MARGIN: f64 = 1.5;

/// The landmarks of a face, (x, y) in pixels of its image: jaw 0–32, eyes 33–42 and 87–96, brows 43–51 and 97–105, mouth
/// 52–71, nose 72–86.
pub type Landmarks = [[f32; 2]; COUNT];

/// Finds the [`Landmarks`] of a face whose box is known.
pub struct LandmarkDetector(Network);

impl LandmarkDetector {
    /// The network from an ONNX file, for example `2d106det.onnx`.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a file that is damaged or has other inputs or outputs, which it names.
    pub fn open(name: &str, path: &Path) -> Result<Self> {
        let (network, header) = Network::file(name, path)?;
        let detector = Self(network);
        let check = || -> Result<()> {
            ensure!(
                Self::fits(&header),
                "it takes no image of {SIDE}×{SIDE} pixels and gives no single output"
            );
            // One run, so that an output of another length is said before the work.
            let face = Face { bounds: [0.0, 0.0, 32.0, 32.0], points: [[0.0; 2]; 5], score: 1.0 };
            detector.find(&Image::filled(32, 32, [127; 3]), &face).map(drop)
        };
        check().map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
        Ok(detector)
    }

    /// Whether a file with this header is such a network; 1k3d68.onnx, for example, takes the same pixels and gives more.
    pub(super) fn fits(header: &Header) -> bool {
        let pixels = |input: &Port| input.shape.get(2..) == Some(&[Some(SIDE); 2]);
        let points = |output: &Port| output.shape.last() == Some(&Some(2 * COUNT));
        matches!((&header.inputs[..], &header.outputs[..]), ([input], [output]) if pixels(input) && points(output))
    }

    /// The landmarks of `face` in `image`.
    pub fn find(&self, image: &Image, face: &Face) -> Result<Landmarks> {
        let [x1, y1, x2, y2] = face.bounds.map(f64::from);
        let scale = SIDE as f64 / (MARGIN * (x2 - x1).max(y2 - y1).max(1.0));
        let half = SIDE as f64 / 2.0;
        let (cx, cy) = ((x1 + x2) / 2.0, (y1 + y2) / 2.0);
        let there = Similarity { a: scale, b: 0.0, tx: half - scale * cx, ty: half - scale * cy };
        let shown = warp(image, &there, SIDE);
        let plane = |c: usize| shown.rgb.iter().skip(c).step_by(3).map(|&value| f32::from(value));
        let input: Vec<f32> = plane(0).chain(plane(1)).chain(plane(2)).collect();
        let values = self.0.run([1, 3, SIDE, SIDE], &input)?.swap_remove(0);
        ensure!(values.len() == 2 * COUNT, "it gives {} numbers, wanted {COUNT} points", values.len());
        Ok(std::array::from_fn(|i| {
            let [u, v] = [0, 1].map(|axis| (f64::from(values[2 * i + axis]) + 1.0) * half);
            let (x, y) = there.invert(u, v);
            [x as f32, y as f32]
        }))
    }

    /// Name and SHA-256 of the ONNX file, for the record.
    pub fn provenance(&self) -> (&str, String) {
        (self.0.name(), self.0.sha256())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(file: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(file)
    }

    #[test]
    fn the_landmarks_are_onnxruntime_s() {
        let detector = LandmarkDetector::open("2d106det", &golden("golden/landmarks.onnx")).unwrap();
        let known = crate::weights::read_file(&golden("golden/landmarks.safetensors")).unwrap();
        let bounds: Vec<f32> = known["box"].to_vec1().unwrap();
        let face = Face { bounds: bounds.try_into().unwrap(), points: [[0.0; 2]; 5], score: 1.0 };
        let image = Image::open(&golden("astronaut.png")).unwrap();
        let found = detector.find(&image, &face).unwrap();
        for (found, wanted) in found.iter().zip(known["points"].to_vec2::<f32>().unwrap()) {
            let far = (found[0] - wanted[0]).hypot(found[1] - wanted[1]);
            assert!(far < 1e-2, "{found:?}, wanted {wanted:?}");
        }
    }

    #[test]
    fn other_networks_are_refused() {
        let error = LandmarkDetector::open("x", &golden("golden/iresnet50.onnx")).err().unwrap().to_string();
        assert!(error.contains("iresnet50.onnx") && error.contains("192×192"), "{error}");
        let port = |shape: [usize; 2]| Port { name: "fc1".into(), shape: shape.map(Some).to_vec() };
        let input = Port { name: "data".into(), shape: vec![None, Some(3), Some(192), Some(192)] };
        let header =
            |output| Header { inputs: vec![input.clone()], outputs: vec![output], first_nodes: Vec::new() };
        assert!(LandmarkDetector::fits(&header(port([1, 212]))));
        assert!(!LandmarkDetector::fits(&header(port([1, 3309]))));
    }
}
