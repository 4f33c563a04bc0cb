//! Detection, alignment and recognition against onnxruntime, Pillow and scikit-image (`scripts/golden_face.py`).

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use difflora::identity::{FaceEncoder, Judge, cosine};
use difflora::image::{Filter, Image};

fn golden() -> HashMap<String, Tensor> {
    difflora::weights::read_file(Path::new("tests/data/golden/face.safetensors")).unwrap()
}

fn numbers(golden: &HashMap<String, Tensor>, name: &str) -> Vec<f32> {
    golden[name].to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The astronaut's head, 184×184 pixels.
fn head() -> Image {
    Image::open(Path::new("tests/data/astronaut.png")).unwrap().crop(130, 10, 184, 184)
}

fn images() -> [(&'static str, Image); 7] {
    let open = |path: &str| Image::open(Path::new(path)).unwrap();
    [
        ("astronaut", open("tests/data/astronaut.png")),
        ("photo", open("tests/data/obama_senate_public_domain.jpg")),
        ("small", head().resize(64, 64, Filter::Bicubic)),
        ("senator", open("tests/data/faces/senator.png")),
        ("minister", open("tests/data/faces/minister.png")),
        ("painted", open("tests/data/faces/painted.png")),
        ("painted-small", open("tests/data/faces/painted-small.png")),
    ]
}

#[test]
fn faces_are_found_where_onnxruntime_finds_them_and_embed_alike() {
    let (golden, encoder, judge) = (golden(), FaceEncoder::builtin().unwrap(), Judge::sface().unwrap());
    for (name, image) in images() {
        let faces = encoder.detect(&image).unwrap();
        let face = &faces[0];
        assert_eq!(faces.len(), 1, "{name}");
        let apart = |ours: &[f32], kind: &str| {
            let theirs = numbers(&golden, &format!("{name}.{kind}"));
            assert_eq!(ours.len(), theirs.len());
            ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        // The photo is a JPEG, and its decoders (libjpeg-turbo, zune-jpeg) differ in 9 % of its bytes by 1 to 4.
        assert!(apart(&face.bounds, "box") < 0.5, "{name}: {face:?}");
        assert!(apart(face.points.as_flattened(), "points") < 0.5, "{name}: {face:?}");
        assert!(apart(&[face.score], "score") < 0.005, "{name}: {face:?}");
        let alike = |ours: Vec<f32>, kind: &str| {
            let cosine = cosine(&ours, &numbers(&golden, &format!("{name}.{kind}")));
            println!("{name} {kind}: cosine {cosine:.6}");
            let least = if name == "photo" { 0.995 } else { 0.9999 };
            assert!(cosine >= least, "{name} {kind}: {cosine}");
        };
        println!("{name}: points {} px", apart(face.points.as_flattened(), "points"));
        alike(encoder.embed(&image, face).unwrap(), "mobilefacenet");
        alike(judge.embed(&image, face).unwrap(), "sface");
    }
}

#[test]
fn resizing_gives_pillows_bytes() {
    let (golden, head) = (golden(), head());
    for (name, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
        for (width, height) in [(37, 51), (97, 120)] {
            let theirs = numbers(&golden, &format!("resize.{name}.{width}x{height}"));
            let ours = head.resize(width, height, filter);
            assert!(
                ours.rgb.iter().zip(&theirs).all(|(&a, &b)| f32::from(a) == b),
                "{name} {width}×{height}"
            );
        }
    }
}

#[test]
fn a_face_that_fills_the_frame_and_one_of_64_pixels_are_found() {
    let encoder = FaceEncoder::builtin().unwrap();
    let astronaut = Image::open(Path::new("tests/data/astronaut.png")).unwrap();
    let face = encoder.detect(&astronaut).unwrap().remove(0);
    let own = encoder.embed(&astronaut, &face).unwrap();
    let [x1, y1, x2, y2] = face.bounds.map(|value| value as usize);
    let close = astronaut.crop(x1, y1, x2 - x1, y2 - y1);
    for (width, height, least) in [(1600, 1950, 0.8), (400, 488, 0.8), (64, 78, 0.7), (48, 58, 0.5)] {
        let image = close.resize(width, height, Filter::Bicubic);
        let search = encoder.search(&image).unwrap();
        println!("{width}×{height}: {:?} {} {}", search.tried, search.best_score, search.faces.len());
        let alike = cosine(&own, &encoder.embed(&image, search.largest("close").unwrap()).unwrap());
        assert!(alike > least, "{width}×{height}: {alike}");
    }
}

#[test]
fn of_several_faces_the_largest_comes_first() {
    let encoder = FaceEncoder::builtin().unwrap();
    let mut group = Image::filled(900, 500, [120, 140, 160]);
    group.paste(&head().resize(160, 160, Filter::Bicubic), 40, 100);
    group.paste(&head().resize(320, 320, Filter::Bicubic), 500, 100);
    let faces = encoder.detect(&group).unwrap();
    assert_eq!(faces.len(), 2);
    assert!(faces[0].bounds[0] > 500.0 && faces[1].bounds[2] < 250.0, "{faces:?}");
}

#[test]
fn two_people_differ_and_one_person_mirrored_does_not() {
    let (encoder, judge) = (FaceEncoder::builtin().unwrap(), Judge::sface().unwrap());
    let embed = |image: &Image| {
        let face = encoder.detect(image).unwrap().remove(0);
        (encoder.embed(image, &face).unwrap(), judge.embed(image, &face).unwrap())
    };
    let [(_, astronaut), (_, senator), ..] = images();
    let (one, other, mirrored) = (embed(&astronaut), embed(&senator), embed(&astronaut.mirrored()));
    println!("other {} {}", cosine(&one.0, &other.0), cosine(&one.1, &other.1));
    println!("mirrored {} {}", cosine(&one.0, &mirrored.0), cosine(&one.1, &mirrored.1));
    assert!(cosine(&one.0, &other.0) < 0.3 && cosine(&one.1, &other.1) < 0.3);
    assert!(cosine(&one.0, &mirrored.0) > 0.8 && cosine(&one.1, &mirrored.1) > 0.8);
}
