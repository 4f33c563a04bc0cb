//! `difflora eval` on a folder of people.

use std::path::Path;

use difflora::synthetic::scenes::{paint_image, reference_scene};
use difflora::synthetic::{Person, World};

use crate::difflora;

/// Two people with two photos each, and one with one.
fn write_people(root: &Path) {
    for (name, number, photos) in [("anna", 1, 2), ("ben", 2, 2), ("cleo", 3, 1)] {
        let folder = root.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        for i in 0..photos {
            let scene = reference_scene(World::Aligned, 5, i);
            let photo = paint_image(&Person::new(1, number), &scene, 128);
            photo.save(&folder.join(format!("{i}.png")), None).unwrap();
        }
    }
    std::fs::write(root.join("anna/class.txt"), "woman\n").unwrap();
}

#[test]
fn an_evaluation_goes_on_where_it_was_and_judges_again_to_the_same_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    write_people(Path::new(&path("people")));
    std::fs::write(path("prompts.txt"), "a photo of a {class}\na photo of a {class}, smiling\n").unwrap();
    let (people, prompts, out) = (path("people"), path("prompts.txt"), path("out"));
    let base =
        ["eval", "--people", &people, "--prompts", &prompts, "--out", &out, "--json", "--clip", "tiny"];
    let with = |more: &[&str]| difflora(&[&base[..], more].concat());
    let methods = ["--methods", "none,generated,shuffled,photo", "--steps", "2"];
    let first = with(&methods);
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert!(first.stderr.contains("1 of 3 people have no photo beside the condition"), "{}", first.stderr);
    assert!(first.stderr.contains("left out: Fréchet distance"), "{}", first.stderr);
    let table = |text: &str| -> serde_json::Value {
        let mut table: serde_json::Value = serde_json::from_str(text).unwrap();
        table["seconds"] = 0.into();
        table
    };
    let report = table(&first.stdout);
    let keys: Vec<_> =
        report["methods"].as_array().unwrap().iter().map(|row| row["method"].clone()).collect();
    assert_eq!(keys, ["no-lora", "difflora", "shuffled", "photo"]);
    assert_eq!(report["methods"][1]["similarity"]["n"], 2, "cleo has no other photo");
    let names: Vec<&str> = report["methods"][1]["measures"]
        .as_array()
        .unwrap()
        .iter()
        .map(|measure| measure["name"].as_str().unwrap())
        .collect();
    for name in [
        "CLIP-I to other photos, tiny",
        "CLIP-I to the image without a LoRA, tiny",
        "copy score",
        "sample, s",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }

    let csv = std::fs::read_to_string(path("out/images.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 2 * 3 * 2, "{csv}");
    assert!(csv.contains("difflora,anna,1,\"a photo of a woman, smiling\","), "{csv}");
    let html = std::fs::read_to_string(path("out/report.html")).unwrap();
    assert!(html.contains("<svg") && html.contains("data:image/png;base64,") && html.contains("anna"));
    for file in ["no-lora/woman/0000.png", "no-lora/person/0001.png", "difflora/cleo/0001.png"] {
        assert!(Path::new(&path("out/images")).join(file).is_file(), "{file}");
    }

    // An image that is missing, as after a kill, is made again; the others are kept.
    let lost = path("out/images/difflora/ben/0001.png");
    let bytes = std::fs::read(&lost).unwrap();
    std::fs::remove_file(&lost).unwrap();
    let judged = with(&[&methods[..], &["--judge-only"]].concat());
    assert_eq!(judged.code, 0, "{}", judged.stderr);
    assert_eq!(table(&judged.stdout)["methods"][1]["similarity"]["n"], 1, "ben's images are not complete");
    let again = with(&methods);
    assert_eq!(std::fs::read(&lost).unwrap(), bytes);
    let without_times = |report: &serde_json::Value| {
        let mut report = report.clone();
        for row in report["methods"].as_array_mut().unwrap() {
            let measures = row["measures"].as_array_mut().unwrap();
            measures.retain(|measure| !measure["name"].as_str().unwrap().contains(", s"));
        }
        report
    };
    assert_eq!(without_times(&table(&again.stdout)), without_times(&report));
    assert_eq!(std::fs::read_to_string(path("out/images.csv")).unwrap(), csv);

    // Another LoRA under the same name: its images are made again, those of the base are kept.
    let base_image = path("out/images/no-lora/person/0000.png");
    let before = std::fs::metadata(&base_image).unwrap().modified().unwrap();
    let weaker = with(&[&methods[..], &["--strength", "0.2"]].concat());
    assert!(weaker.code == 0 && weaker.stderr.contains("6 images of other LoRAs"), "{}", weaker.stderr);
    assert_ne!(std::fs::read(&lost).unwrap(), bytes);
    assert_eq!(std::fs::metadata(&base_image).unwrap().modified().unwrap(), before);
    let more = with(&["--methods", "none,generated,ridge", "--steps", "2"]);
    assert_eq!(more.code, 0, "a method can be added: {}", more.stderr);

    let other = with(&["--methods", "none", "--steps", "3"]);
    assert_eq!(other.code, 2, "{}", other.stderr);
    assert!(other.stderr.contains("\"steps\":2") && other.stderr.contains("\"steps\":3"), "{}", other.stderr);
    let strict = with(&[&methods[..], &["--require"]].concat());
    assert_eq!(strict.code, 2, "{}", strict.stderr);
    assert!(strict.stderr.contains("--require: Fréchet distance"), "{}", strict.stderr);
}

#[test]
fn mistakes_are_named_before_anything_is_generated() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    write_people(Path::new(&path("people")));
    std::fs::create_dir(path("empty")).unwrap();
    std::fs::write(path("empty.txt"), "# nothing\n").unwrap();
    let people = path("people");
    for (arguments, code, part) in [
        (vec!["--people", &path("empty")], 4, "no folder with photos"),
        (vec!["--people", &people, "--prompts", &path("empty.txt")], 4, "no prompt"),
        (vec!["--people", &people, "--prompts", "photomaker"], 4, "photomaker-40"),
        (vec!["--people", &people, "--methods", "best"], 2, "the methods are none, mean"),
        (vec!["--people", &people, "--methods", "own,own"], 2, "named twice"),
        (vec!["--people", &people, "--methods", "refined"], 2, "--refine"),
        (
            vec!["--people", &people, "--methods", "none", "--judge-only", "--out", &path("none")],
            4,
            "generate them first",
        ),
        (vec!["--people", &people, "--recognisers", "facenet"], 2, "facenet"),
        (vec![], 2, "--dataset"),
    ] {
        let run = difflora(&[&["eval"][..], &arguments].concat());
        assert_eq!(run.code, code, "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains(part), "{arguments:?}: {}", run.stderr);
    }
}

#[test]
fn a_strip_shows_the_way_from_noise() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a.png").display().to_string();
    let run =
        difflora(&["gen", "--prompt", "a photo of a man", "--steps", "4", "--out", &out, "--strip", "3"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let strip = ::difflora::image::Image::open(&folder.path().join("a.strip.png")).unwrap();
    assert!(strip.width > strip.height, "three columns, two rows: {}×{}", strip.width, strip.height);
}
