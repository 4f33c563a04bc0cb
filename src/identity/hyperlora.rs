//! What HyperLoRA is shown of a photo: the face on a grey background for CLIP, a wider square for ArcFace.
//!
//! 1. SCRFD finds the face in the whole photo, `2d106det` its 106 landmarks.
//! 2. The polygon along jaw and brows, blurred, is the mask through which the photo is laid on a grey canvas.
//! 3. CLIP is shown the square around the landmarks on that canvas, ArcFace the square of twice that side in the photo,
//!    in which SCRFD looks for the face again.
//!
//! Coordinates are f32 and images are worked on with Pillow's rounding, as the released weights were trained.

use anyhow::Result;

use super::detector::Detector;
use super::face::{Face, iou};
use super::landmarks::{LandmarkDetector, Landmarks};
use super::{FaceEncoder, Search};
use crate::failure::Failure;
use crate::image::{Filter, Image};

/// The landmarks along jaw and brows: 1, 9–16, 2–8 and 0 from the left temple to the chin, 24–18, 32–25 and 17 to the right
/// temple, then both brows back.
const OUTLINE: [usize; 43] = [
    1, 9, 10, 11, 12, 13, 14, 15, 16, 2, 3, 4, 5, 6, 7, 8, 0, 24, 23, 22, 21, 20, 19, 18, 32, 31, 30, 29, 28,
    27, 26, 25, 17, 101, 105, 104, 103, 102, 50, 51, 49, 48, 43,
];

/// The colour of the canvas.
const GREY: [u8; 3] = [127; 3];

/// Side of the square in which the mask is blurred, and the standard deviation of the blur, in pixels.
const MASK_SIDE: usize = 512;
const MASK_BLUR: f32 = 15.0;

/// The squares that CLIP and ArcFace are shown.
#[derive(Clone, Debug)]
pub struct FaceCrops {
    /// On the grey canvas; black beyond the photo.
    pub clip: Image,
    /// Of the photo; black beyond it.
    pub arcface: Image,
    /// Left and top of `arcface` in the photo.
    pub arcface_corner: [isize; 2],
}

impl FaceCrops {
    /// Cuts both out of `photo`.
    ///
    /// # Errors
    /// [`Failure::NoFace`] for landmarks that span no face: less than a pixel, or more than three times the photo.
    pub fn of(photo: &Image, landmarks: &Landmarks) -> Result<Self> {
        let outline = OUTLINE.map(|i| landmarks[i]);
        let half = 0.8 * span(&outline);
        let all = 0.75 * span(landmarks);
        let most = 3.0 * photo.width.max(photo.height) as f32;
        let finite = landmarks.iter().flatten().all(|at| at.is_finite());
        if !(finite && half >= 1.0 && half <= most && all <= most) {
            let why = format!("its 106 landmarks span {:.0} pixels, which is no face", span(landmarks));
            return Err(Failure::NoFace(why).into());
        }
        let canvas = grey_canvas(photo, &outline, half);
        let ([x1, y1], [x2, y2]) = corners(landmarks);
        let (cx, cy) = ((x1 + x2) / 2.0, (y1 + y2) / 2.0 - 0.125 * all);
        let wide = square([cx, cy], 2.0 * all);
        Ok(Self {
            clip: canvas.crop_with_border(square([cx, cy], all)),
            arcface: photo.crop_with_border(wide),
            arcface_corner: [wide[0], wide[1]],
        })
    }
}

/// A canvas of the photo's size, grey but for the face within `outline`; `half` is half the side of the square around it.
fn grey_canvas(photo: &Image, outline: &[[f32; 2]], half: f32) -> Image {
    let mut mask = Image::filled(photo.width, photo.height, [0; 3]);
    let vertices: Vec<[i32; 2]> = outline.iter().map(|point| point.map(|at| at as i32)).collect();
    mask.fill_polygon(&vertices, [255; 3]);
    let sum = outline.iter().fold([0f32; 2], |sum, point| [sum[0] + point[0], sum[1] + point[1]]);
    let [cx, cy] = sum.map(|sum| sum / outline.len() as f32);
    let around = square([cx, cy], half);
    let face = photo.crop_with_border(around);
    let mask = mask
        .crop_with_border(around)
        .resize(MASK_SIDE, MASK_SIDE, Filter::Bicubic)
        .gaussian_blur(MASK_BLUR)
        .resize(face.width, face.height, Filter::Bicubic);
    let mut canvas = Image::filled(photo.width, photo.height, GREY);
    // Cut and not rounded, as it was in training: the face may lie one pixel beside its place.
    canvas.paste_masked(&face, &mask, [(cx - half) as isize, (cy - half) as isize]);
    canvas
}

/// Left, top, right and bottom of the square around a point, each rounded with halves to even.
fn square([cx, cy]: [f32; 2], half: f32) -> [isize; 4] {
    [cx - half, cy - half, cx + half, cy + half].map(|edge| edge.round_ties_even() as isize)
}

/// The upper left and the lower right corner of the box around points.
fn corners(points: &[[f32; 2]]) -> ([f32; 2], [f32; 2]) {
    points.iter().fold(([f32::INFINITY; 2], [f32::NEG_INFINITY; 2]), |(low, high), point| {
        ([0, 1].map(|axis| low[axis].min(point[axis])), [0, 1].map(|axis| high[axis].max(point[axis])))
    })
}

/// The longer side of that box.
fn span(points: &[[f32; 2]]) -> f32 {
    let (low, high) = corners(points);
    (high[0] - low[0]).max(high[1] - low[1])
}

/// SCRFD, 2d106det and ArcFace.
pub struct FacePreparation {
    encoder: FaceEncoder,
    landmarks: LandmarkDetector,
}

/// What is made of a photo.
pub struct PreparedFace {
    /// How the face was looked for.
    pub search: Search,
    /// The face that was taken.
    pub chosen: Face,
    /// ArcFace's unit vector.
    pub embedding: Vec<f32>,
    /// What CLIP is to be shown.
    pub clip: Image,
    /// Whether HyperLoRA's own sizes were enough to find the face, in the photo and in the square around it.
    pub strict: bool,
}

impl FacePreparation {
    /// From open networks.
    ///
    /// # Errors
    /// [`Failure::Usage`] where the encoder's detector is not SCRFD, with whose boxes the weights were trained.
    pub fn new(encoder: FaceEncoder, landmarks: LandmarkDetector) -> Result<Self> {
        if !encoder.detector.is_scrfd() {
            let why = "HyperLoRA needs SCRFD's faces: take a face encoder that has it, antelopev2 or a folder with \
                       scrfd_10g_bnkps.onnx, glintr100.onnx and 2d106det.onnx";
            return Err(Failure::Usage(why.into()).into());
        }
        Ok(Self { encoder, landmarks })
    }

    /// The networks of the faces, for the record.
    pub fn encoder(&self) -> &FaceEncoder {
        &self.encoder
    }

    /// Finds and cuts out the face with the highest score, or number `face` from the largest on.
    ///
    /// # Errors
    /// [`Failure::NoFace`] that names the photo, [`Failure::Usage`] where there is no face of this number.
    pub fn prepare(&self, photo: &Image, name: &str, face: Option<usize>) -> Result<PreparedFace> {
        let detector: &Detector = &self.encoder.detector;
        let (search, strict) = detector.search_as_hyperlora(photo, false)?;
        let chosen = match face {
            Some(number) => search.face(number, name)?,
            None => search.surest().map_or_else(|| search.largest(name), Ok)?,
        };
        let landmarks = self.landmarks.find(photo, chosen)?;
        let crops = FaceCrops::of(photo, &landmarks)
            .map_err(|error| error.context(format!("cannot use `{name}`")))?;
        let (near, strict_again) = detector.search_as_hyperlora(&crops.arcface, true)?;
        let again = match face {
            // The face that was asked for, and not the surest of those around it.
            Some(_) => {
                let [left, top] = crops.arcface_corner.map(|at| at as f32);
                let here = chosen.clone().moved(|[x, y]| [x - left, y - top]);
                near.faces.iter().max_by(|a, b| iou(a, &here, 0.0).total_cmp(&iou(b, &here, 0.0)))
            }
            None => near.surest(),
        };
        let again = again.map_or_else(|| near.largest(&format!("{name}, cut out around the face")), Ok)?;
        Ok(PreparedFace {
            embedding: self.encoder.embed(&crops.arcface, again)?,
            chosen: chosen.clone(),
            clip: crops.clip,
            strict: strict && strict_again,
            search,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::sha256;

    /// (7x + 13y + 29c) mod 256
    fn pattern(width: usize, height: usize) -> Image {
        let value = |at: usize| (7 * (at / 3 % width) + 13 * (at / 3 / width) + 29 * (at % 3)) % 256;
        Image { width, height, rgb: (0..width * height * 3).map(|at| value(at) as u8).collect() }
    }

    fn sum(image: &Image) -> u64 {
        image.rgb.iter().map(|&value| u64::from(value)).sum()
    }

    #[test]
    fn the_official_code_s_crops_come_out_byte_for_byte() {
        let mut landmarks = [[150.25, 120.75]; 106];
        for (p, i) in OUTLINE.into_iter().enumerate() {
            let p = p as f32;
            landmarks[i] = if p <= 21.0 {
                [90.25 + 6.0 * p, 120.75 - 0.5 * p * (21.0 - p)]
            } else {
                [90.25 + 6.0 * (42.0 - p), 120.75 + 0.5 * (p - 21.0) * (42.0 - p)]
            };
        }
        let crops = FaceCrops::of(&pattern(320, 240), &landmarks).unwrap();
        assert_eq!((crops.clip.width, crops.clip.height, sum(&crops.clip)), (189, 189, 13_624_231));
        for ([y, x], pixel) in [
            ([0, 0], [127; 3]),
            ([60, 60], [99, 107, 115]),
            ([90, 120], [65, 94, 123]),
            ([100, 40], [144, 168, 192]),
            ([100, 50], [217, 246, 19]),
        ] {
            assert_eq!(crops.clip.pixel(x, y), pixel, "{y} {x}");
        }
        assert_eq!((crops.arcface.width, crops.arcface.height, sum(&crops.arcface)), (378, 378, 29_378_304));
        assert_eq!(crops.arcface.pixel(200, 200), [148, 177, 206]);
    }

    #[test]
    fn pillow_s_crops_of_random_outlines_come_out_byte_for_byte() {
        #[derive(serde::Deserialize)]
        struct Case {
            points: Vec<[f32; 2]>,
            clip: Crop,
            arcface: Crop,
        }
        #[derive(serde::Deserialize)]
        struct Crop {
            size: [usize; 2],
            sha256: String,
        }
        let text = include_str!("../../tests/data/golden/face_crops.json");
        let cases: Vec<Case> = serde_json::from_str(text).unwrap();
        assert_eq!(cases.len(), 24);
        for (number, case) in cases.iter().enumerate() {
            let crops =
                FaceCrops::of(&pattern(160, 120), case.points.as_slice().try_into().unwrap()).unwrap();
            for (name, found, wanted) in
                [("clip", &crops.clip, &case.clip), ("arcface", &crops.arcface, &case.arcface)]
            {
                assert_eq!([found.width, found.height], wanted.size, "{name} of {number}");
                assert_eq!(sha256::of_bytes(&found.rgb), wanted.sha256, "{name} of {number}");
            }
        }
    }

    #[test]
    fn landmarks_that_are_no_face_are_refused() {
        let photo = pattern(40, 30);
        let mut far = [[10.0, 10.0]; 106];
        assert!(FaceCrops::of(&photo, &far).is_err());
        for wrong in [1e9, f32::NAN] {
            far[OUTLINE[7]] = [wrong, 12.0];
            far[OUTLINE[8]] = [-wrong, 12.0];
            let error = FaceCrops::of(&photo, &far).unwrap_err();
            assert!(matches!(error.downcast_ref(), Some(Failure::NoFace(_))), "{error}");
        }
    }
}
