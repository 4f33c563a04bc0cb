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
    let quality = &list[0]["quality"];
    assert!(quality["sharpness"].as_f64().unwrap() > 6.0, "{quality}");
}

#[test]
fn detect_draws_what_it_found() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("drawn.png");
    let run = difflora(&["face", "detect", "tests/data/astronaut.png", "--draw", path(&out)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let open = |path: &Path| difflora::image::Image::open(path).unwrap();
    let (drawn, plain) = (open(&out), open(Path::new("tests/data/astronaut.png")));
    assert_eq!((drawn.width, drawn.height), (plain.width, plain.height));
    // The tip of the nose, and a place without a face.
    assert!(drawn.pixel(221, 127) != plain.pixel(221, 127) && drawn.pixel(10, 10) == plain.pixel(10, 10));
    let into = folder.path().join("drawings");
    let run = difflora(&["face", "detect", "tests/data", "--draw", path(&into)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(into.join("astronaut.png").is_file() && into.join("obama_senate_public_domain.png").is_file());
    let run = difflora(&["face", "detect", "tests/data/astronaut.png", "--draw", "drawn.jpg"]);
    assert!(run.code == 2 && run.stderr.contains("drawn.jpg"), "{}", run.stderr);
}

#[test]
fn dedupe_groups_images_by_person() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let astronaut = difflora::image::Image::open(Path::new("tests/data/astronaut.png")).unwrap();
    astronaut.save(&at("1.png"), None).unwrap();
    astronaut.mirrored().save(&at("3.png"), None).unwrap();
    fs::copy("tests/data/obama_senate_public_domain.jpg", at("2.jpg")).unwrap();
    fs::write(at("junk.png"), "junk").unwrap();
    fs::write(at("list.csv"), "a,b").unwrap();
    let run = difflora(&["face", "dedupe", path(folder.path()), "--json"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let answer: Value = serde_json::from_str(&run.stdout).unwrap();
    let names: Vec<Vec<String>> = answer["people"]
        .as_array()
        .unwrap()
        .iter()
        .map(|person| {
            let file =
                |image: &Value| Path::new(image["file"].as_str().unwrap()).file_name().unwrap().to_owned();
            person["pictures"].as_array().unwrap().iter().map(|p| file(p).into_string().unwrap()).collect()
        })
        .collect();
    assert_eq!(names, [vec!["1.png", "3.png"], vec!["2.jpg"]]);
    assert_eq!(answer["left_out"].as_array().unwrap().len(), 1);
    assert!((answer["threshold"].as_f64().unwrap() - 0.4).abs() < 1e-6, "{answer}");
    assert!(run.stderr.contains("junk.png") && run.stderr.contains("list.csv"), "{}", run.stderr);
}

#[test]
fn images_of_every_kind_are_read() {
    for entry in fs::read_dir("tests/data/odd").unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_some_and(|extension| extension == "avif") {
            continue;
        }
        let image = difflora::image::Image::open(&file).unwrap();
        let near = |x, wanted: [u8; 3]| {
            let seen: [u8; 3] = image.pixel(x, 4);
            seen.iter().zip(wanted).all(|(a, b)| a.abs_diff(b) < 32)
        };
        assert_eq!((image.width, image.height), (16, 8), "{file:?}");
        assert!(near(2, [255, 0, 0]) && near(13, [0, 0, 255]), "{file:?}: {:?}", image.rgb);
    }
}

#[test]
fn animations_and_kinds_that_are_not_read_are_said() {
    for (file, code, said) in [
        ("animated.gif", 3, "`tests/data/odd/animated.gif` is animated: its first frame is taken"),
        ("animated.webp", 3, "is animated"),
        ("animated.png", 3, "is animated"),
        ("plain.gif", 3, "no face found"),
        (
            "image.avif",
            4,
            "it is an AVIF image, which difflora does not read; convert it to JPEG or PNG first",
        ),
    ] {
        let run = difflora(&["face", "detect", &format!("tests/data/odd/{file}")]);
        assert_eq!(run.code, code, "{file}: {}", run.stderr);
        assert!(run.stderr.contains(said), "{file}: {}", run.stderr);
        assert_eq!(run.stderr.contains("animated:"), file.starts_with("animated"), "{file}: {}", run.stderr);
    }
    let folder = tempfile::tempdir().unwrap();
    let phone = folder.path().join("IMG_0001.HEIC");
    fs::write(&phone, b"\0\0\0\x24ftypheic\0\0\0\0mif1heic").unwrap();
    for argument in [path(&phone), path(folder.path())] {
        let run = difflora(&["face", "detect", argument]);
        assert_eq!(run.code, 4, "{}", run.stderr);
        assert!(run.stderr.contains("it is a HEIC image"), "{}", run.stderr);
    }
}

#[test]
fn no_face_tells_the_sizes_that_were_tried_and_the_best_score() {
    let folder = tempfile::tempdir().unwrap();
    for (name, width, height, grey) in
        [("black.png", 300, 300, 0), ("dot.png", 1, 1, 255), ("line.png", 1, 700, 9)]
    {
        let file = folder.path().join(name);
        difflora::image::Image::filled(width, height, [grey; 3]).save(&file, None).unwrap();
        let run = difflora(&["face", "detect", path(&file)]);
        assert_eq!(run.code, 3, "{name}: {}", run.stderr);
        assert!(
            run.stderr.contains("best score 0.") && run.stderr.contains(", 128, 96"),
            "{name}: {}",
            run.stderr
        );
    }
}

#[test]
fn an_encoder_that_cannot_be_had_is_said_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let home = path(folder.path());
    let run = |name: &str| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_difflora"))
            .args(["face", "compare", "tests/data/astronaut.png", "--face-encoder", name])
            .env("HF_HOME", home)
            .env("HOME", home)
            .env_remove("HF_HUB_CACHE")
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run("antelopev2");
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("models--DIAMONIK7777--antelopev2") && said.contains("non-commercial"), "{said}");
    let (code, said) = run("nosuch");
    assert!(code == 2 && said.contains("buffalo_l"), "{said}");
    let (code, said) = run("tests/data");
    assert!(code == 4 && said.contains("no ONNX file in it"), "{said}");
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
    fs::write(at("notes.txt"), "no image").unwrap();
    let out = at("faces.safetensors");
    let run = difflora(&["face", "embed", path(folder.path()), "--out", path(&out)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(
        run.stderr.contains("1 image was left out:\n  cannot use")
            && run.stderr.contains("broken.png")
            && run.stderr.contains("notes.txt"),
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
fn embed_with_an_image_encoder_writes_what_it_sees() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let flat = difflora::image::Image::filled(90, 70, [90, 140, 60]);
    flat.save(&at("meadow.png"), None).unwrap();
    let out = at("images.safetensors");
    let embed = |image: &str, options: &[&str]| {
        let start = ["face", "embed", image, "--out", path(&out), "--image-encoder", "tiny"];
        let run = difflora(&[&start[..], options].concat());
        let shape = fs::read(&out).ok().map(|bytes| {
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let (_, tensor) = file.iter().next().unwrap();
            (tensor.shape().to_vec(), tensor.data().to_vec())
        });
        (run, shape)
    };
    let photo = "tests/data/astronaut.png";
    let (run, plain) = embed(photo, &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let (_, blanked) = embed(photo, &["--blank-background"]);
    let (plain, blanked) = (plain.unwrap(), blanked.unwrap());
    assert!(plain.0.len() == 1 && plain.0 == blanked.0 && plain.1 != blanked.1);
    let (_, tokens) = embed(photo, &["--image-output", "tokens"]);
    assert_eq!(tokens.unwrap().0.len(), 2);
    let meadow = at("meadow.png");
    assert_eq!(embed(path(&meadow), &[]).0.code, 3);
    assert_eq!(embed(path(&meadow), &["--whole-image"]).0.code, 0);
    let run = difflora(&["face", "embed", photo, "--out", path(&out), "--whole-image"]);
    assert!(run.code == 2 && run.stderr.contains("--image-encoder"), "{}", run.stderr);
}

#[test]
fn verify_tells_people_apart_and_what_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("eileen")).unwrap();
    fs::create_dir(at("other")).unwrap();
    let astronaut = difflora::image::Image::open(Path::new("tests/data/astronaut.png")).unwrap();
    astronaut.save(&at("eileen/1.png"), None).unwrap();
    let run = difflora(&["face", "verify", path(folder.path())]);
    assert!(run.code == 4 && run.stderr.contains("wanted two people"), "{}", run.stderr);
    astronaut.mirrored().save(&at("eileen/2.png"), None).unwrap();
    fs::copy("tests/data/obama_senate_public_domain.jpg", at("other/1.jpg")).unwrap();
    let run = difflora(&["face", "verify", path(folder.path()), "--json"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let answer: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&answer["people"], &answer["pictures"]), (&2.into(), &3.into()));
    assert_eq!((&answer["genuine"]["pairs"], &answer["impostor"]["pairs"]), (&1.into(), &2.into()));
    assert_eq!(answer["verification"]["auc"], 1.0, "{answer}");
    let run = difflora(&["face", "verify", path(folder.path()), "--face-encoder", "sface"]);
    assert!(run.code == 0 && run.stdout.contains("AUC 1.0000"), "{}{}", run.stdout, run.stderr);
    let run = difflora(&["face", "verify", "tests/data/astronaut.png"]);
    assert!(run.code == 2 && run.stderr.contains("is no folder"), "{}", run.stderr);
}

#[test]
fn bench_times_both_networks() {
    let run = difflora(&["face", "bench", "--runs", "1", "--json"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let answer: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(answer["detector"]["name"], "yunet-2023mar");
    assert!(answer["recogniser"]["milliseconds"].as_f64().unwrap() > 0.0, "{answer}");
}

#[test]
fn crop_writes_aligned_faces() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("faces");
    let run = difflora(&["face", "crop", "tests/data/astronaut.png", "--out", path(&out), "--size", "224"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let face = difflora::image::Image::open(&out.join("astronaut.png")).unwrap();
    assert_eq!((face.width, face.height), (224, 224));
}

#[test]
fn bad_images_are_told_apart_by_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let flat = difflora::image::Image::filled(200, 200, [90, 140, 60]);
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
        ("nothing", 4, "no image in this folder"),
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
