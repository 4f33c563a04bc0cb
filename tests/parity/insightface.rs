//! SCRFD and ArcFace on graphs like InsightFace's with random weights (`scripts/golden_insightface.py`), against the
//! insightface package's own code (`scripts/golden_insightface_package.py`), and against onnxruntime with an
//! independent decoding.

use std::fs;
use std::path::Path;

use candle_core::{DType, Tensor};
use difflora::failure::Failure;
use difflora::identity::align::align;
use difflora::identity::detector::Detector;
use difflora::identity::recognise::Recogniser;
use difflora::identity::{Face, FaceEncoder, cosine};
use difflora::image::Image;

use crate::golden::Golden;

const SCRFD: &str = "tests/data/golden/scrfd.onnx";
const IRESNET: &str = "tests/data/golden/iresnet50.onnx";
const MXNET: &str = "tests/data/golden/mxnet.onnx";

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn astronaut() -> Image {
    Image::open(Path::new("tests/data/astronaut.png")).unwrap()
}

/// The astronaut's face where the golden file of YuNet has it.
fn face() -> Face {
    let points = numbers(&Golden::open("face").get("astronaut.points"));
    let points = std::array::from_fn(|i| [points[2 * i], points[2 * i + 1]]);
    Face { bounds: [178.6, 63.6, 269.1, 173.8], points, score: 0.9 }
}

#[test]
fn scrfd_finds_what_the_independent_decoding_finds() {
    compare_scrfd("insightface", 0.1, 1e-3);
}

#[test]
fn scrfd_finds_what_the_insightface_package_finds() {
    // One grey level in a thousand is rounded otherwise by the vector code of OpenCV.
    compare_scrfd("insightface_package", 0.1, 1e-3);
}

fn compare_scrfd(golden: &str, pixels: f32, scores_apart: f32) {
    let golden = Golden::open(golden);
    let detector = Detector::scrfd("scrfd", Path::new(SCRFD)).unwrap();
    for (name, image) in
        [("tall", astronaut().crop(130, 10, 220, 490)), ("wide", astronaut().crop(0, 0, 512, 301))]
    {
        let [scores, boxes, points] =
            ["scores", "boxes", "points"].map(|kind| numbers(&golden.get(&format!("{name}.{kind}"))));
        let search = detector.search(&image).unwrap();
        assert_eq!((search.faces.len(), &search.tried[..]), (scores.len(), &[640][..]), "{name}");
        let areas: Vec<f32> = search
            .faces
            .iter()
            .map(|face| {
                (face.bounds[2] - face.bounds[0]).max(0.0) * (face.bounds[3] - face.bounds[1]).max(0.0)
            })
            .collect();
        assert!(areas.is_sorted_by(|a, b| a >= b), "{name}: the largest comes first");
        // Faces are matched by place: scores that lie close together may change places.
        let mut worst: f32 = 0.0;
        for (i, score) in scores.iter().enumerate() {
            let theirs: Vec<f32> = [&boxes[4 * i..][..4], &points[10 * i..][..10]].concat();
            let apart = |face: &&Face| {
                let ours = face.bounds.iter().chain(face.points.as_flattened());
                ours.zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
            };
            let face = search.faces.iter().min_by(|a, b| apart(a).total_cmp(&apart(b))).unwrap();
            assert!((face.score - score).abs() < scores_apart, "{name} {i}: {} {score}", face.score);
            worst = worst.max(apart(&face));
        }
        println!("{name}: {} faces, {worst} px apart at most", search.faces.len());
        assert!(worst <= pixels, "{name}: {worst} px");
    }
}

#[test]
fn faces_are_cut_out_and_embedded_as_the_insightface_package_does() {
    let (golden, image, face) = (Golden::open("insightface_package"), astronaut(), face());
    for side in [112, 128] {
        let theirs = numbers(&golden.get(&format!("crop{side}")));
        let ours = align(&image, &face.points, side);
        let apart = |(a, b): (&u8, &f32)| (f32::from(*a) - b).abs();
        let apart: Vec<f32> = ours.rgb.iter().zip(&theirs).map(apart).collect();
        let (most, mean) =
            (apart.iter().fold(0.0, |a: f32, b| a.max(*b)), apart.iter().sum::<f32>() / apart.len() as f32);
        println!("{side}×{side}: {most} levels apart at most, {mean} in the mean");
        assert!(most <= 10.0 && mean < 0.5, "{side}: {most} {mean}");
    }
    for (name, path) in [("iresnet50", IRESNET), ("mxnet", MXNET)] {
        let ours = Recogniser::arcface(name, Path::new(path)).unwrap().embed(&image, &face).unwrap();
        let cosine = cosine(&ours, &numbers(&golden.get(name)));
        println!("{name}: {cosine}");
        assert!(cosine >= 0.9999, "{name}: {cosine}");
    }
}

#[test]
fn arcface_embeds_as_onnxruntime_does() {
    let (golden, image, face) = (Golden::open("insightface"), astronaut(), face());
    let embed = |path: &str| {
        let recogniser = Recogniser::arcface("arcface", Path::new(path)).unwrap();
        recogniser.embed(&image, &face).unwrap()
    };
    let alike = |ours: &[f32], name: &str| cosine(ours, &numbers(&golden.get(name)));
    let iresnet = embed(IRESNET);
    println!("iresnet50: {}", alike(&iresnet, "iresnet50"));
    assert!(alike(&iresnet, "iresnet50") >= 0.99999);
    // The golden file tells the order of colours and the scale of pixels apart.
    assert!(alike(&iresnet, "iresnet50.bgr") < 0.95 && alike(&iresnet, "iresnet50.raw") < 0.95);
    // A file that begins with a subtraction and a multiplication takes bytes as they are.
    let mxnet = embed(MXNET);
    println!("mxnet: {}", alike(&mxnet, "mxnet"));
    assert!(mxnet.len() == 64 && alike(&mxnet, "mxnet") >= 0.99999);
}

#[test]
fn a_folder_like_insightfaces_is_an_encoder() {
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in [(SCRFD, "det_10g.onnx"), (IRESNET, "w600k_r50.onnx")] {
        fs::copy(from, folder.path().join(to)).unwrap();
    }
    let encoder = FaceEncoder::open(folder.path().to_str().unwrap()).unwrap();
    let [(detector, _), (recogniser, sha256)] = encoder.provenance();
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    assert_eq!((detector, recogniser, sha256.len()), ("det_10g", name, 64));
    let vector = encoder.embed(&astronaut(), &face()).unwrap();
    assert!((vector.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4);
}

/// The file with the sizes of its input [1, 3, 112, 112] changed.
fn with_input(path: &str, channels: u8, side: u8) -> Vec<u8> {
    let sizes = |channels, side| [1, channels, side, side].map(|size| [0x0A, 2, 8, size]).concat();
    let mut bytes = fs::read(path).unwrap();
    let wanted = sizes(3, 112);
    let at = bytes.windows(wanted.len()).position(|part| part == wanted).unwrap();
    bytes[at..at + wanted.len()].copy_from_slice(&sizes(channels, side));
    bytes
}

#[test]
fn files_that_are_something_else_say_which_input_or_output_differs() {
    let folder = tempfile::tempdir().unwrap();
    let cut = folder.path().join("cut.onnx");
    fs::write(&cut, &fs::read(SCRFD).unwrap()[..40_000]).unwrap();
    let (grey, small) = (folder.path().join("grey.onnx"), folder.path().join("small.onnx"));
    fs::write(&grey, with_input(IRESNET, 1, 112)).unwrap();
    fs::write(&small, with_input(IRESNET, 3, 96)).unwrap();
    let yunet = Path::new("src/assets/face/yunet.onnx");
    let detector = |path: &Path| Detector::scrfd("x", path).err().unwrap();
    let recogniser = |path: &Path| Recogniser::arcface("x", path).err().unwrap();
    for (error, said) in [
        (detector(yunet), "it has 12 outputs (`cls_8`"),
        (detector(Path::new(IRESNET)), "1 outputs (`683` [1, 512])"),
        (detector(&cut), "truncated"),
        (detector(&folder.path().join("missing.onnx")), "missing.onnx"),
        (recogniser(Path::new(SCRFD)), "9 outputs (`448`"),
        (recogniser(&cut), "truncated"),
        (recogniser(&grey), "its input is `input.1` [1, 1, 112, 112], wanted an image"),
        (
            recogniser(&small),
            "its input is `input.1` [1, 3, 96, 96], a face recogniser's is [B, 3, 112, 112]",
        ),
    ] {
        assert!(
            error.downcast_ref::<Failure>().is_some_and(|f| matches!(f, Failure::Unusable(_))),
            "{error}"
        );
        assert!(error.to_string().contains(said), "{error}");
    }
}
