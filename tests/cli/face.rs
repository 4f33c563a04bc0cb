//! `difflora face` as a user meets it.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::difflora;

#[test]
fn detect_prints_box_points_and_score() {
    let run = difflora(&["face", "detect", "--json", "tests/data/astronaut.png"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let list: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(list[0]["file"], "tests/data/astronaut.png");
    let face = &list[0]["faces"][0];
    let near = |value: &Value, wanted: f64| (value.as_f64().unwrap() - wanted).abs() < 0.5;
    assert!(near(&face["box"][0], 178.6) && near(&face["box"][3], 173.8), "{face}");
    assert!(near(&face["points"][2][0], 221.1) && face["points"].as_array().unwrap().len() == 5, "{face}");
    assert!(face["score"].as_f64().unwrap() > 0.9);
}

#[test]
fn compare_prints_files_and_their_cosines() {
    for encoder in ["mobilefacenet", "sface"] {
        let run = difflora(&[
            "face",
            "compare",
            "--json",
            "--face-encoder",
            encoder,
            "tests/data/astronaut.png",
            "tests/data/obama_senate_public_domain.jpg",
        ]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        let answer: Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(answer["files"].as_array().unwrap().len(), 2);
        let cosine = |row: usize, column: usize| answer["cosine"][row][column].as_f64().unwrap();
        assert!((cosine(0, 0) - 1.0).abs() < 1e-5 && cosine(0, 1) == cosine(1, 0) && cosine(0, 1) < 0.3);
    }
}

#[test]
fn embed_writes_unit_vectors_and_leaves_out_what_it_cannot_use() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::copy("tests/data/astronaut.png", at("a.png")).unwrap();
    fs::write(at("broken.png"), &fs::read("tests/data/astronaut.png").unwrap()[..5000]).unwrap();
    fs::write(at("notes.txt"), "no picture").unwrap();
    let out = at("faces.safetensors");
    let run = difflora(&["face", "embed", path(folder.path()), "--out", path(&out)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(
        run.stderr.contains("left out: cannot use") && run.stderr.contains("broken.png"),
        "{}",
        run.stderr
    );
    let bytes = fs::read(&out).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.names(), ["a.png"]);
    let vector = file.tensor("a.png").unwrap();
    let numbers = vector.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
    assert_eq!(vector.shape(), [512]);
    assert!((numbers.map(|value| value * value).sum::<f32>() - 1.0).abs() < 1e-4);
}

#[test]
fn crop_writes_aligned_faces() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("faces");
    let run = difflora(&["face", "crop", "tests/data/astronaut.png", "--out", path(&out), "--size", "224"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let face = difflora::picture::Picture::open(&out.join("astronaut.png")).unwrap();
    assert_eq!((face.width, face.height), (224, 224));
}

#[test]
fn bad_pictures_are_told_apart_by_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let flat = difflora::picture::Picture::filled(200, 200, [90, 140, 60]);
    flat.save(&at("meadow.png"), None).unwrap();
    fs::write(at("half.png"), &fs::read("tests/data/astronaut.png").unwrap()[..300_000]).unwrap();
    let jpeg = fs::read("tests/data/obama_senate_public_domain.jpg").unwrap();
    fs::write(at("half.jpg"), &jpeg[..jpeg.len() / 2]).unwrap();
    fs::write(at("empty.png"), "").unwrap();
    fs::create_dir(at("nothing")).unwrap();
    for (name, code, why) in [
        ("meadow.png", 3, "no face found"),
        ("half.png", 4, "truncated"),
        ("half.jpg", 4, "truncated"),
        ("empty.png", 4, "empty"),
        ("missing.png", 4, "no such file"),
        ("nothing", 4, "no picture in this folder"),
    ] {
        for action in ["detect", "compare"] {
            let run = difflora(&["face", action, path(&at(name))]);
            assert_eq!(run.code, code, "{name}: {}", run.stderr);
            assert!(run.stderr.contains(why) && run.stderr.contains(name), "{name}: {}", run.stderr);
        }
    }
}

#[test]
fn an_output_that_cannot_be_written_is_said_before_the_work() {
    let run =
        difflora(&["face", "embed", "tests/data/astronaut.png", "--out", "missing/folder/a.safetensors"]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains("no folder `missing/folder`"), "{}", run.stderr);
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
