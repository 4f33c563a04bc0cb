//! The images and the encoder of the `face` commands.

use std::path::PathBuf;

use anyhow::Result;

use crate::identity::landmarks::LandmarkDetector;
use crate::identity::{FaceEncoder, catalog};

#[derive(Debug, clap::Args)]
pub(super) struct Images {
    /// Images, patterns such as 'me/*.jpg', or folders.
    #[arg(required = true, value_name = "IMAGE|DIR")]
    pub(super) images: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Encoder {
    /// mobilefacenet (512 values), sface (128 values), antelopev2, buffalo_l, auraface, or a folder of ONNX files.
    #[arg(
        long,
        visible_alias = "encoder",
        value_name = "NAME|DIR",
        env = "DIFFLORA_FACE_ENCODER",
        default_value = "mobilefacenet"
    )]
    face_encoder: String,
}

impl Encoder {
    /// Opens the encoder.
    pub(super) fn load(&self) -> Result<FaceEncoder> {
        catalog::open_encoder(&self.face_encoder)
    }

    /// Opens the landmark detector beside it.
    pub(super) fn load_landmarks(&self) -> Result<LandmarkDetector> {
        catalog::open_landmarks(&self.face_encoder)
    }
}
