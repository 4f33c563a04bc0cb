//! Image → who: a face is found, aligned and turned into a vector.
//!
//! ```text
//! image ──► detect: box, 5 points ──► align: 112×112 ──► recognise: 512 numbers, the condition
//!                                                      └─► Judge: 128 numbers, evaluation only
//! ```
//!
#![doc = include_str!("../docs/faces.md")]

pub mod align;
pub mod catalog;
pub mod clip;
pub mod clustering;
pub mod crop;
pub mod detector;
pub mod draw;
pub mod face;
pub mod hyperlora;
pub mod landmarks;
pub mod onnx;
pub mod onnx_header;
pub mod outliers;
pub mod photos;
pub mod quality;
pub mod recognise;
pub mod references;
mod scrfd;
pub mod verification;
mod yunet;

use std::time::{Duration, Instant};

use anyhow::Result;

pub use crop::portrait_crop;
pub use detector::Search;
pub use face::Face;
pub use quality::Quality;
pub use recognise::{cosine, unit};

use crate::image::Image;
use crate::weights::model_id::ModelId;
use detector::Detector;
use recognise::Recogniser;

/// The person condition of the hypernetwork.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Unit vector of the face, 512 numbers.
    pub face: Vec<f32>,
    /// CLIP embedding of the image, where the hypernetwork uses one.
    pub image: Option<Vec<f32>>,
}

/// Detects faces and embeds them: YuNet and MobileFaceNet, or the networks that [`FaceEncoder::open`] names.
/// `Send` and `Sync`.
pub struct FaceEncoder {
    detector: Detector,
    recogniser: Recogniser,
}

impl FaceEncoder {
    /// The networks that are built in.
    pub fn builtin() -> Result<Self> {
        Ok(Self { detector: Detector::yunet()?, recogniser: Recogniser::mobilefacenet()? })
    }

    /// The encoder that a name or a folder stands for, see [`catalog`].
    ///
    /// # Errors
    /// [`Failure::Usage`](crate::failure::Failure) for an unknown name, or a known one whose files are not
    /// on this machine; [`Failure::Unusable`](crate::failure::Failure) for files that are not what they should be.
    pub fn open(name: &str) -> Result<Self> {
        let (detector, recogniser) = catalog::open(name)?;
        Ok(Self { detector, recogniser })
    }

    /// The faces of an image, the largest first; none is no error.
    pub fn detect(&self, image: &Image) -> Result<Vec<Face>> {
        Ok(self.search(image)?.faces)
    }

    /// The faces of an image and how they were looked for; [`Search::largest`] demands one.
    pub fn search(&self, image: &Image) -> Result<Search> {
        self.detector.search(image)
    }

    /// The unit vector of a face; 512 numbers with the built-in recogniser.
    pub fn embed(&self, image: &Image, face: &Face) -> Result<Vec<f32>> {
        self.recogniser.embed(image, face)
    }

    /// From which cosine on two photos are taken to show one person.
    pub fn same_person(&self) -> f32 {
        self.recogniser.same_person()
    }

    /// How long detector (at 640×640 pixels) and recogniser (a face) take: the median of `runs`, after one that does
    /// not count.
    pub fn time(&self, runs: usize) -> Result<[Duration; 2]> {
        let median = |run: &dyn Fn() -> Result<()>| -> Result<Duration> {
            run()?;
            let mut times = Vec::new();
            for _ in 0..runs.max(1) {
                let start = Instant::now();
                run()?;
                times.push(start.elapsed());
            }
            times.sort();
            Ok(times[times.len() / 2])
        };
        Ok([median(&self.detector.blank_run())?, median(&self.recogniser.blank_run())?])
    }

    /// Name and SHA-256 of the recogniser, by which hypernetworks name their face encoder.
    pub fn id(&self) -> ModelId {
        let recogniser = self.recogniser.network();
        ModelId { name: recogniser.name().into(), sha256: recogniser.sha256() }
    }

    /// Name and SHA-256 of the detector and of the recogniser, for the record.
    pub fn provenance(&self) -> [(&str, String); 2] {
        let recogniser = self.recogniser.network();
        [self.detector.provenance(), (recogniser.name(), recogniser.sha256())]
    }
}

/// A recogniser of the evaluation: SFace, with which no part of the hypernetwork was trained, or another one.
/// `Send` and `Sync`.
pub struct Judge(Recogniser);

impl Judge {
    /// SFace as it is built in.
    pub fn sface() -> Result<Self> {
        Ok(Self(Recogniser::sface()?))
    }

    /// `sface`, or the recogniser of a face model of [`catalog`].
    ///
    /// # Errors
    /// As [`FaceEncoder::open`].
    pub fn open(name: &str) -> Result<Self> {
        if name == "sface" {
            return Self::sface();
        }
        Ok(Self(FaceEncoder::open(name)?.recogniser))
    }

    /// The unit vector of a face, with SFace 128 numbers.
    pub fn embed(&self, image: &Image, face: &Face) -> Result<Vec<f32>> {
        self.0.embed(image, face)
    }

    /// Name and SHA-256 of the network, for the record.
    pub fn provenance(&self) -> (&str, String) {
        (self.0.network().name(), self.0.network().sha256())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoder_and_judge_are_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<FaceEncoder>();
        shared::<Judge>();
    }
}
