//! Faces with YuNet, or with [SCRFD](super::scrfd): boxes, scores, five landmarks.
//!
//! YuNet (Wu et al. 2023, OpenCV Zoo `face_detection_yunet_2023mar`): for a cell in column c and row r of the grid
//! with stride s, the network gives a class and an object probability, four box numbers and five points (OpenCV,
//! `modules/objdetect/src/face_detect.cpp`):
//! score = √(cls·obj), centre = ((c + b₀)·s, (r + b₁)·s), size = (e^b₂·s, e^b₃·s), point = ((c + k₀)·s, (r + k₁)·s).
//!
//! YuNet was trained on faces of 10 to 300 pixels. A face that fills the frame is missed when it is larger, and a
//! small image has to be enlarged, so that each image is searched at several sizes.

use std::path::Path;

use anyhow::{Context, Result};

use super::face::{Face, nms};
use super::onnx::Network;
use super::scrfd;
use super::yunet::{PER_CELL, Yunet};
use crate::failure::Failure;
use crate::image::{Filter, Image};

/// Faces found in an image, and the search that found them.
#[derive(Clone, Debug)]
pub struct Search {
    /// The faces, the largest first.
    pub faces: Vec<Face>,
    /// To how many pixels the image's longer side was brought, in the order of trial.
    pub tried: Vec<usize>,
    /// The best score at any size, also below the threshold.
    pub best_score: f32,
    /// The score from which on a candidate counts as a face.
    pub least_score: f32,
}

impl Search {
    /// The largest face.
    ///
    /// # Errors
    /// [`Failure::NoFace`], which names the image `name`, the sizes tried and the best score.
    pub fn largest(&self, name: &str) -> Result<&Face> {
        self.faces.first().ok_or_else(|| {
            let sizes = self.tried.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            let text = format!(
                "no face found in `{name}` (longer side brought to {sizes} pixels, best score {:.2}, wanted {}); \
                 take an image with one upright, well lit face from the front, at least 40 pixels wide and not cut off",
                self.best_score, self.least_score
            );
            Failure::NoFace(text).into()
        })
    }

    /// The face with the highest score, where there is one.
    pub fn surest(&self) -> Option<&Face> {
        self.faces.iter().max_by(|a, b| a.score.total_cmp(&b.score))
    }

    /// The face with this number, 1 for the largest.
    ///
    /// # Errors
    /// [`Failure::NoFace`] as [`Search::largest`], [`Failure::Usage`] where there are fewer faces.
    pub fn face(&self, number: usize, name: &str) -> Result<&Face> {
        self.largest(name)?;
        number.checked_sub(1).and_then(|at| self.faces.get(at)).ok_or_else(|| {
            let count = self.faces.len();
            let faces = if count == 1 { "face" } else { "faces" };
            let text = format!(
                "there is no face {number} in `{name}`: it has {count} {faces}, numbered from the largest; \
                 `difflora face detect --draw` shows them"
            );
            Failure::Usage(text).into()
        })
    }
}

/// Least score of a face.
pub const MIN_SCORE: f32 = 0.6;

/// A size at which the best face has this score ends the search.
const SURE_SCORE: f32 = 0.8;

/// Faces that overlap more than this (intersection over union) are one; OpenCV's default.
const SAME_FACE: f32 = 0.3;

/// A size at which an image is searched: the longer side of the image and the side of the square around it, in
/// pixels. The frame gives a face that fills the image the surroundings that the detector knows from its training.
type Scale = (usize, usize);

/// Sizes at which an image is searched, one after the other until a face is sure.
const PYRAMID: [Scale; 3] = [(640, 640), (320, 448), (160, 256)];

/// The same for images with a longer side of at most [`SMALL`] pixels. On 64×64 portraits of the small world the
/// first size finds all, blurred ones (σ = 1.2 pixels) 97 %, in a quarter of the time that 640 takes for 81 %.
const SMALL_PYRAMID: [Scale; 3] = [(256, 320), (160, 160), (320, 448)];

/// Where the first sizes show no face at all: those between them, with more of a frame.
const FURTHER: [Scale; 5] = [(512, 640), (384, 512), (256, 384), (128, 256), (96, 192)];

/// The same for small images.
const SMALL_FURTHER: [Scale; 4] = [(640, 640), (128, 256), (96, 192), (64, 128)];

/// SCRFD's sizes: 640 as insightface has it; where that shows no face, those to which PhotoMaker and HyperLoRA fall
/// back, then a frame.
const SCRFD_PYRAMID: [Scale; 1] = [(640, 640)];
const SCRFD_FURTHER: [Scale; 5] = [(512, 512), (384, 384), (256, 256), (128, 128), (320, 640)];

/// The sizes at which HyperLoRA looks for a face, one after the other until there is one. What
/// follows is ours: smaller still, and in a frame, for a face that fills the photo.
const HYPERLORA_PYRAMID: [Scale; 4] = [(640, 640), (512, 512), (384, 384), (256, 256)];
const HYPERLORA_FURTHER: [Scale; 3] = [(128, 128), (320, 640), (160, 640)];

/// At last, for tiny faces in an image with a longer side of more than so many pixels, these sizes.
const LARGE: [(usize, Scale); 2] = [(640, (1280, 1280)), (1280, (1920, 1920))];

/// Longer side of a small image in pixels.
const SMALL: usize = 256;

/// The colour of YuNet's frame.
const FRAME: [u8; 3] = [127; 3];

/// Cells of YuNet's three grids are this many pixels wide.
const STRIDES: [usize; 3] = [8, 16, 32];

/// YuNet or SCRFD.
pub struct Detector(Kind);

enum Kind {
    Yunet(Yunet),
    Scrfd(Box<Network>, scrfd::Layout),
}

/// YuNet's ONNX file.
const YUNET: &[u8] = include_bytes!("../assets/face/yunet.onnx");

impl Detector {
    /// YuNet as it is built in.
    pub fn yunet() -> Result<Self> {
        Ok(Self(Kind::Yunet(Yunet::new(YUNET).context("cannot load the network `yunet-2023mar`")?)))
    }

    /// SCRFD with landmarks from an ONNX file of InsightFace, for example `scrfd_10g_bnkps.onnx` or `det_10g.onnx`.
    ///
    /// # Errors
    /// [`Failure::Unusable`] for a file that is damaged or has other inputs or outputs, which it names.
    pub fn scrfd(name: &str, path: &Path) -> Result<Self> {
        let (network, header) = Network::file(name, path)?;
        let layout =
            scrfd::Layout::of(&header).map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
        let detector = Self(Kind::Scrfd(Box::new(network), layout));
        // One small run, so that outputs of the wrong length are refused before the work.
        detector
            .at_size(&Image::filled(64, 64, [0; 3]), (64, 64))
            .map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
        Ok(detector)
    }

    /// Whether it is SCRFD.
    pub fn is_scrfd(&self) -> bool {
        matches!(self.0, Kind::Scrfd(..))
    }

    /// A run of the network alone on 640×640 grey pixels, for timings.
    pub fn blank_run(&self) -> impl Fn() -> Result<()> {
        const SIDE: usize = 640;
        let (image, input) = (Image::filled(SIDE, SIDE, FRAME), vec![0.0; 3 * SIDE * SIDE]);
        move || match &self.0 {
            Kind::Yunet(yunet) => {
                std::hint::black_box(yunet.run(&image));
                Ok(())
            }
            Kind::Scrfd(network, _) => network.run([1, 3, SIDE, SIDE], &input).map(drop),
        }
    }

    /// Name and SHA-256 of the ONNX file, for the record.
    pub fn provenance(&self) -> (&str, String) {
        match &self.0 {
            Kind::Yunet(_) => ("yunet-2023mar", crate::weights::sha256::of_bytes(YUNET)),
            Kind::Scrfd(network, _) => (network.name(), network.sha256()),
        }
    }

    /// All faces of an image, at the first size where one is sure, else at the size with the best score. Sizes
    /// between, beyond and with more of a frame are tried where the usual ones show no face.
    pub fn search(&self, image: &Image) -> Result<Search> {
        match self.0 {
            Kind::Yunet(_) if image.width.max(image.height) <= SMALL => {
                self.search_at(image, &SMALL_PYRAMID, &SMALL_FURTHER)
            }
            Kind::Yunet(_) => self.search_at(image, &PYRAMID, &FURTHER),
            Kind::Scrfd(..) => self.search_at(image, &SCRFD_PYRAMID, &SCRFD_FURTHER),
        }
    }

    /// The same as HyperLoRA does it with SCRFD, in a whole photo or, `again`, in the square around a face, and whether
    /// its own sizes were enough; others are tried where they show no face.
    pub fn search_as_hyperlora(&self, image: &Image, again: bool) -> Result<(Search, bool)> {
        let usual = if again { &HYPERLORA_PYRAMID[..1] } else { &HYPERLORA_PYRAMID };
        let further: Vec<Scale> =
            HYPERLORA_PYRAMID[usual.len()..].iter().chain(&HYPERLORA_FURTHER).copied().collect();
        let search = self.search_at(image, usual, &further)?;
        let strict = search.tried.len() <= usual.len();
        Ok((search, strict))
    }

    /// All faces at the `usual` sizes, until one is sure; at the `further` ones where they show none.
    fn search_at(&self, image: &Image, usual: &[Scale], further: &[Scale]) -> Result<Search> {
        let longer = image.width.max(image.height);
        let (least_score, sure) = match self.0 {
            Kind::Yunet(_) => (MIN_SCORE, SURE_SCORE),
            Kind::Scrfd(..) => (scrfd::MIN_SCORE, scrfd::MIN_SCORE),
        };
        let large = LARGE.iter().filter(|(above, _)| longer > *above).map(|(_, scale)| scale);
        let mut search = Search { faces: Vec::new(), tried: Vec::new(), best_score: 0.0, least_score };
        for (number, &scale) in usual.iter().chain(further).chain(large).enumerate() {
            if number >= usual.len() && !search.faces.is_empty() {
                break;
            }
            let candidates = self.at_size(image, scale)?;
            let best = candidates.first().map_or(0.0, |face| face.score);
            search.tried.push(scale.0);
            if best > search.best_score {
                search.best_score = best;
                search.faces = match self.0 {
                    Kind::Yunet(_) => nms(candidates, MIN_SCORE, SAME_FACE, 0.0),
                    Kind::Scrfd(..) => nms(candidates, scrfd::MIN_SCORE, scrfd::SAME_FACE, 1.0),
                };
            }
            if best >= sure {
                break;
            }
        }
        search.faces.sort_by(|a, b| b.area().total_cmp(&a.area()));
        Ok(search)
    }

    /// Candidates in pixels of the image, the best score first; the first is given however low its score.
    fn at_size(&self, image: &Image, scale: Scale) -> Result<Vec<Face>> {
        match &self.0 {
            Kind::Yunet(yunet) => Ok(yunet_at(yunet, image, scale)),
            Kind::Scrfd(network, layout) => scrfd_at(network, layout, image, scale),
        }
    }
}

/// The longer side is brought to `size` in the middle of a grey square of `frame` pixels.
fn yunet_at(yunet: &Yunet, image: &Image, (size, frame): Scale) -> Vec<Face> {
    let longer = image.width.max(image.height);
    let side = |length: usize| ((length * size + longer / 2) / longer).max(1);
    let (width, height) = (side(image.width), side(image.height));
    let (left, top) = ((frame - width) / 2, (frame - height) / 2);
    let mut framed = Image::filled(frame, frame, FRAME);
    framed.paste(&image.resize(width, height, Filter::Bilinear), left, top);

    let (sx, sy) = (image.width as f32 / width as f32, image.height as f32 / height as f32);
    let back = |[x, y]: [f32; 2]| [(x - left as f32) * sx, (y - top as f32) * sy];
    decode(&yunet.run(&framed), frame).into_iter().map(|face| face.moved(back)).collect()
}

/// The longer side is brought to `size` at the upper left of a black square of `frame` pixels.
fn scrfd_at(
    network: &Network,
    layout: &scrfd::Layout,
    image: &Image,
    (size, frame): Scale,
) -> Result<Vec<Face>> {
    let (framed, scale) = scrfd::letterbox(image, size, frame);
    let plane =
        |c: usize| framed.rgb.iter().skip(c).step_by(3).map(|&value| (f32::from(value) - 127.5) / 128.0);
    let input: Vec<f32> = plane(0).chain(plane(1)).chain(plane(2)).collect();
    let outputs = network.run([1, 3, frame, frame], &input)?;
    let faces = layout.decode(network, &outputs, frame, scrfd::MIN_SCORE)?;
    Ok(faces.into_iter().map(|face| face.moved(|[x, y]| [x / scale, y / scale])).collect())
}

/// Candidates in pixels of the square input with `side` pixels, best score first: those that may be faces, or the
/// best however low its score.
fn decode(levels: &[Vec<f32>; 3], side: usize) -> Vec<Face> {
    let (mut faces, mut best) = (Vec::new(), None);
    for (cells, stride) in levels.iter().zip(STRIDES) {
        let columns = side / stride;
        let s = stride as f32;
        for (cell, numbers) in cells.chunks_exact(PER_CELL).enumerate() {
            let (likely, b, k) = (&numbers[..2], &numbers[2..6], &numbers[6..]);
            let score = (likely[0] * likely[1]).sqrt();
            let lower = best.as_ref().is_some_and(|best: &Face| score <= best.score);
            if score < MIN_SCORE && lower {
                continue;
            }
            let (c, r) = ((cell % columns) as f32, (cell / columns) as f32);
            let (x, y) = ((c + b[0]) * s, (r + b[1]) * s);
            let (w, h) = (b[2].exp() * s, b[3].exp() * s);
            let face = Face {
                bounds: [x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0],
                points: std::array::from_fn(|i| [(c + k[2 * i]) * s, (r + k[2 * i + 1]) * s]),
                score,
            };
            if score >= MIN_SCORE {
                faces.push(face.clone());
            }
            if !lower {
                best = Some(face);
            }
        }
    }
    if faces.is_empty() {
        faces.extend(best);
    }
    faces.sort_by(|a, b| b.score.total_cmp(&a.score));
    faces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn face(bounds: [f32; 4], score: f32) -> Face {
        Face { bounds, points: [[0.0; 2]; 5], score }
    }

    #[test]
    fn of_two_boxes_on_one_face_the_surer_stays() {
        let faces = vec![
            face([0.0, 0.0, 10.0, 10.0], 0.9),
            face([1.0, 0.0, 11.0, 10.0], 0.8),
            face([20.0, 0.0, 30.0, 10.0], 0.7),
            face([40.0, 0.0, 50.0, 10.0], MIN_SCORE - 0.01),
        ];
        let kept: Vec<f32> = nms(faces, MIN_SCORE, SAME_FACE, 0.0).iter().map(|face| face.score).collect();
        assert_eq!(kept, [0.9, 0.7]);
    }

    #[test]
    fn an_image_without_a_face_gives_advice_and_what_was_tried() {
        let detector = Detector::yunet().unwrap();
        let search = detector.search(&Image::filled(300, 200, [90, 120, 60])).unwrap();
        assert_eq!(search.tried, [640, 320, 160, 512, 384, 256, 128, 96]);
        let error = search.largest("meadow.png").unwrap_err();
        assert!(
            matches!(error.downcast_ref(), Some(Failure::NoFace(text)) if text.contains("`meadow.png`")),
            "{error}"
        );
        let sizes = error.to_string();
        assert!(sizes.contains("640, 320, 160, 512") && sizes.contains("best score 0."), "{sizes}");
        let large = detector.search(&Image::filled(1400, 20, [0; 3])).unwrap();
        assert_eq!(large.tried[8..], [1280, 1920]);
        assert!(detector.search(&Image::filled(1, 1, [0; 3])).unwrap().faces.is_empty());
    }

    #[test]
    fn faces_are_chosen_by_number_from_the_largest_on() {
        let faces = vec![face([0.0, 0.0, 20.0, 20.0], 0.7), face([30.0, 0.0, 40.0, 10.0], 0.9)];
        let search = Search { faces, tried: vec![640], best_score: 0.9, least_score: MIN_SCORE };
        assert_eq!(search.face(2, "two.png").unwrap().score, 0.9);
        for number in [0, 3] {
            let error = search.face(number, "two.png").unwrap_err();
            assert!(
                matches!(error.downcast_ref(), Some(Failure::Usage(text)) if text.contains("2 faces")),
                "{error}"
            );
        }
    }

    #[test]
    fn hyperlora_s_own_sizes_come_before_smaller_ones_and_frames() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/scrfd.onnx");
        let detector = Detector::scrfd("scrfd", &path).unwrap();
        let grey = Image::filled(300, 200, [127; 3]);
        for again in [false, true] {
            let (search, strict) = detector.search_as_hyperlora(&grey, again).unwrap();
            assert_eq!(search.tried, [640, 512, 384, 256, 128, 320, 160]);
            assert!(!strict && search.surest().is_none());
        }
        let photo = Image::open(&path.with_file_name("../astronaut.png")).unwrap();
        let (search, strict) = detector.search_as_hyperlora(&photo, false).unwrap();
        assert!(strict && search.tried == [640]);
        assert_eq!(search.surest().unwrap().score, search.best_score);
    }
}
