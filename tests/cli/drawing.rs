//! `difflora gen` as a user meets it, with the built-in bundle.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::difflora;

const PHOTO: &str = "tests/data/astronaut.png";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_same_seed_gives_the_same_bytes_of_lora_and_picture() {
    let folder = tempfile::tempdir().unwrap();
    let mut made = Vec::new();
    for round in ["one", "two"] {
        // The name of the LoRA stands in the picture's text, so each round has a folder instead.
        let out = folder.path().join(round);
        fs::create_dir(&out).unwrap();
        let (picture, lora) = (out.join("me.png"), out.join("me.safetensors"));
        let run = difflora(&[
            "gen",
            "--ref",
            PHOTO,
            "--prompt",
            "a photo of a person, smiling, red background",
            "--steps",
            "3",
            "--out",
            text(&picture),
            "--lora-out",
            text(&lora),
            "--json",
        ]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.stderr.contains("64×64"), "it must say what the built-in model is: {}", run.stderr);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(report["person"]["references"][0]["faces"], 1);
        made.push((fs::read(&picture).unwrap(), fs::read(&lora).unwrap()));
    }
    assert!(made[0] == made[1]);
    let words = String::from_utf8_lossy(&made[0].0);
    assert!(words.contains("parameters") && words.contains("Steps: 3, Sampler: DDIM"));
}

#[test]
fn the_lora_changes_the_picture_and_merged_equals_run_time() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let lora = at("me.safetensors");
    let run = difflora(&["gen", "--ref", PHOTO, "--lora-out", text(&lora)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let draw = |name: &str, more: &[&str]| {
        let picture = at(name);
        let mut arguments =
            vec!["gen", "--prompt", "a photo of a person", "--steps", "4", "--out", text(&picture)];
        arguments.extend(more);
        let run = difflora(&arguments);
        assert_eq!(run.code, 0, "{}", run.stderr);
        difflora::picture::Picture::open(&picture).unwrap().rgb
    };
    let plain = draw("plain.png", &[]);
    let merged = draw("merged.png", &["--lora", text(&lora)]);
    let beside = draw("beside.png", &["--lora", text(&lora), "--lora-mode", "runtime"]);
    let none = draw("none.png", &["--lora", &format!("{}:0", text(&lora))]);
    let distance = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(distance(&plain, &merged) > 20);
    assert!(distance(&merged, &beside) <= 1);
    assert_eq!(distance(&plain, &none), 0);
}

#[test]
fn what_cannot_be_is_refused_before_the_work_with_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    fs::write(at("cut.png"), &fs::read(PHOTO).unwrap()[..5000]).unwrap();
    let grey = difflora::picture::Picture::filled(200, 200, [127; 3]);
    grey.save(Path::new(&at("grey.png")), None).unwrap();
    fs::write(at("cut.safetensors"), [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
    let (out, lora) = (at("x.png"), at("x.safetensors"));
    let cases: [(&[&str], i32, &str); 11] = [
        (&[], 2, "nothing to do"),
        (&["--ref", &at("grey.png"), "--lora-out", &lora], 3, "no face found"),
        (&["--ref", &at("cut.png"), "--lora-out", &lora], 4, "cut.png"),
        (&["--ref", &at("missing.png"), "--lora-out", &lora], 4, "missing.png"),
        (&["--ref", folder.path().to_str().unwrap(), "--lora-out", &lora], 4, "folder"),
        (&["--prompt", "x", "--out", &at("no/such/x.png")], 2, "there is no folder"),
        (&["--prompt", "x", "--out", &at("x.jpg")], 2, "PNG"),
        (&["--prompt", "x", "--out", &out, "--width", "63"], 2, "multiples of"),
        (&["--prompt", "x", "--out", &out, "--steps", "0"], 2, "--steps"),
        (&["--prompt", "x", "--out", &out, "--base", "nosuch"], 2, "nosuch"),
        (&["--prompt", "x", "--out", &out, "--lora", &at("cut.safetensors")], 4, "cut.safetensors"),
    ];
    for (arguments, code, said) in cases {
        let run = difflora(&[&["gen"], arguments].concat());
        assert_eq!(run.code, code, "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains(said), "{arguments:?}: {}", run.stderr);
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    }
    assert!(!Path::new(&out).exists() && !Path::new(&lora).exists());
}

#[test]
fn an_empty_prompt_and_unknown_words_are_fine() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let run =
        difflora(&["gen", "--prompt", "", "xylophone ☂ person", "--steps", "1", "--out", out, "--quiet"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(folder.path().join("0002.png").exists());
}
