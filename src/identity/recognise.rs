//! Recognition: an aligned face → a unit vector whose cosine with another's tells whether both are one person.
//!
//! Two networks that were trained apart: MobileFaceNet (Chen et al. 2018, 512 numbers) is the condition of the
//! hypernetwork; SFace (Zhong et al. 2021, OpenCV Zoo `face_recognition_sface_2021dec`, 128 numbers) only judges,
//! so that what is drawn is never judged by what drew it. ArcFace (Deng et al. 2019, arXiv 1801.07698) in its many
//! trainings is read from files.

use std::path::Path;

use anyhow::{Result, bail, ensure};

use super::align::{SIDE, align};
use super::face::Face;
use super::onnx::Network;
use super::onnx_header::Header;
use crate::failure::Failure;
use crate::image::Image;

/// A face recogniser.
pub struct Recogniser {
    network: Network,
    /// Mean and scale of the input: a byte b enters the network as (b − mean) / scale.
    shift_and_scale: (f32, f32),
    /// See [`Recogniser::same_person`].
    same_person: f32,
}

/// Of photos of one person, years apart, MobileFaceNet's cosines are 0.53 and more, of two people 0.17 and less; on
/// ORL's faces 0.83 ± 0.10 and 0.07 ± 0.11. Ours.
const SAME_BY_MOBILEFACENET: f32 = 0.4;

/// OpenCV's for SFace (`modules/objdetect/test/test_face.cpp`, `cosine_similar_thresh`).
const SAME_BY_SFACE: f32 = 0.363;

/// insightface's for ArcFace (`web-demos/src_recognition/main.py`: "They ARE the same person").
const SAME_BY_ARCFACE: f32 = 0.28;

impl Recogniser {
    /// MobileFaceNet: 512 numbers, the condition of the hypernetwork.
    pub fn mobilefacenet() -> Result<Self> {
        let bytes = include_bytes!("../assets/face/mobilefacenet512.onnx");
        let network = Network::embedded("mobilefacenet512", bytes, &["output"])?;
        Ok(Self { network, shift_and_scale: (127.5, 127.5), same_person: SAME_BY_MOBILEFACENET })
    }

    /// SFace: 128 numbers, the judge in evaluation. Its weights are the zoo's int8 blocks
    /// (`scripts/pack_sface.py`); its normalisation is part of the graph.
    pub fn sface() -> Result<Self> {
        let bytes = include_bytes!("../assets/face/sface.onnx");
        let network = Network::embedded("sface-2021dec", bytes, &["fc1"])?;
        Ok(Self { network, shift_and_scale: (0.0, 1.0), same_person: SAME_BY_SFACE })
    }

    /// ArcFace from an ONNX file as InsightFace's packs carry it, for example `glintr100.onnx` or `w600k_r50.onnx`.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a file that is damaged or has other inputs or outputs, which it names.
    pub fn arcface(name: &str, path: &Path) -> Result<Self> {
        let (network, header) = Network::file(name, path)?;
        let check = || -> Result<Self> {
            check_ports(&header)?;
            let shift_and_scale = shift_and_scale(&header);
            let recogniser = Self { network, shift_and_scale, same_person: SAME_BY_ARCFACE };
            // One run, so that an output of another shape is an error before the work.
            let width = recogniser.embed_aligned(&Image::filled(SIDE, SIDE, [127; 3]))?.len();
            ensure!(
                (64..=4096).contains(&width),
                "its output {} has {width} numbers a face, wanted an embedding of 64 or more",
                header.outputs[0]
            );
            Ok(recogniser)
        };
        check().map_err(|error| Failure::unusable(path, format!("{error:#}")))
    }

    /// From which cosine on two photos are taken to show one person.
    pub fn same_person(&self) -> f32 {
        self.same_person
    }

    /// A run of the network alone on grey pixels, for timings.
    pub fn blank_run(&self) -> impl Fn() -> Result<()> {
        let input = vec![0.5; 3 * SIDE * SIDE];
        move || self.network.run([1, 3, SIDE, SIDE], &input).map(|_| ())
    }

    /// The network, for its name and checksum.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The unit vector of a face in `image`.
    pub fn embed(&self, image: &Image, face: &Face) -> Result<Vec<f32>> {
        self.embed_aligned(&align(image, &face.points, SIDE))
    }

    /// The unit vector of an aligned face of 112×112 pixels.
    pub fn embed_aligned(&self, face: &Image) -> Result<Vec<f32>> {
        let (shift, scale) = self.shift_and_scale;
        let plane =
            |c: usize| face.rgb.iter().skip(c).step_by(3).map(|&value| (f32::from(value) - shift) / scale);
        let input: Vec<f32> = plane(0).chain(plane(1)).chain(plane(2)).collect();
        let mut embedding = self.network.run([1, 3, SIDE, SIDE], &input)?.swap_remove(0);
        let length = embedding.iter().map(|value| value * value).sum::<f32>().sqrt();
        embedding.iter_mut().for_each(|value| *value /= length.max(f32::MIN_POSITIVE));
        Ok(embedding)
    }
}

/// Refuses what is no recogniser of aligned faces.
fn check_ports(header: &Header) -> Result<()> {
    let input = &header.inputs[0];
    let side = |at: usize| input.shape[at].is_none_or(|side| side == SIDE);
    ensure!(side(2) && side(3), "its input is {input}, a face recogniser's is [B, 3, {SIDE}, {SIDE}]");
    if let [_] = header.outputs[..] {
        return Ok(());
    }
    let names: Vec<String> = header.outputs.iter().map(ToString::to_string).collect();
    bail!("it has {} outputs ({}), a face recogniser has one", names.len(), names.join(", "))
}

/// Files that begin with a subtraction and a multiplication normalise pixels themselves (insightface,
/// `model_zoo/arcface_onnx.py`, which looks at the names of the first eight nodes).
fn shift_and_scale(header: &Header) -> (f32, f32) {
    let has = |starts: [&str; 2]| {
        header.first_nodes.iter().any(|name| starts.iter().any(|start| name.starts_with(start)))
    };
    if has(["Sub", "_minus"]) && has(["Mul", "_mul"]) { (0.0, 1.0) } else { (127.5, 127.5) }
}

/// The unit vector along an output of the network `name`.
///
/// # Errors
/// A vector without a direction: of zeros, or with values that are not finite.
pub fn unit(vector: Vec<f32>, name: &str) -> Result<Vec<f32>> {
    let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
    ensure!(length.is_finite() && length > 0.0, "{name} gives no direction (length {length})");
    Ok(vector.into_iter().map(|value| value / length).collect())
}

/// The cosine of two vectors, −1 to 1.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)) as f32
}
