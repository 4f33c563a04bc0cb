//! `difflora gen` as a user meets it, with the built-in bundle.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use difflora::image::Image;
use serde_json::Value;

use crate::difflora;

const PHOTO: &str = "tests/data/astronaut.png";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_same_seed_gives_the_same_bytes_of_lora_and_image() {
    let folder = tempfile::tempdir().unwrap();
    let mut made = Vec::new();
    for round in ["one", "two"] {
        // The name of the LoRA stands in the image's text, so each round has a folder instead.
        let out = folder.path().join(round);
        fs::create_dir(&out).unwrap();
        let (image, lora) = (out.join("me.png"), out.join("me.safetensors"));
        let run = difflora(&[
            "gen",
            "--ref",
            PHOTO,
            "--prompt",
            "a photo of a person, smiling, red background",
            "--steps",
            "3",
            "--out",
            text(&image),
            "--lora-out",
            text(&lora),
            "--json",
        ]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.stderr.contains("128×128"), "it must say what the built-in model is: {}", run.stderr);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(report["person"]["references"][0]["faces"], 1);
        made.push((fs::read(&image).unwrap(), fs::read(&lora).unwrap()));
    }
    assert!(made[0] == made[1]);
    let words = String::from_utf8_lossy(&made[0].0);
    assert!(words.contains("parameters") && words.contains("Steps: 3, Sampler: DDIM"));
}

#[test]
fn the_lora_changes_the_image_and_merged_equals_run_time() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let lora = at("me.safetensors");
    let run = difflora(&["gen", "--ref", PHOTO, "--lora-out", text(&lora)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let draw = |name: &str, more: &[&str]| {
        let image = at(name);
        let mut arguments =
            vec!["gen", "--prompt", "a photo of a person", "--steps", "4", "--out", text(&image)];
        arguments.extend(more);
        let run = difflora(&arguments);
        assert_eq!(run.code, 0, "{}", run.stderr);
        Image::open(&image).unwrap().rgb
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
    let grey = Image::filled(200, 200, [127; 3]);
    grey.save(Path::new(&at("grey.png")), None).unwrap();
    fs::write(at("cut.safetensors"), [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
    let (out, lora) = (at("x.png"), at("x.safetensors"));
    // Latents of the built-in model at its own size are (1, 8, 16, 16).
    let latents = |name: &str, tensor: Tensor| {
        let path = at(name);
        candle_core::safetensors::save(&HashMap::from([("latents", tensor)]), &path).unwrap();
        path
    };
    let cpu = &Device::Cpu;
    let small = latents("small.safetensors", Tensor::zeros((1, 8, 8, 16), DType::F32, cpu).unwrap());
    let whole = latents("whole.safetensors", Tensor::zeros((1, 8, 16, 16), DType::I64, cpu).unwrap());
    let nan = latents("nan.safetensors", Tensor::full(f32::NAN, (1, 8, 16, 16), cpu).unwrap());
    let cases: [(&[&str], i32, &str); 21] = [
        (&[], 2, "nothing to do"),
        (&["--ref", &at("grey.png"), "--lora-out", &lora], 3, "no face found"),
        (&["--ref", &at("cut.png"), "--lora-out", &lora], 4, "cut.png"),
        (&["--ref", &at("missing.png"), "--lora-out", &lora], 4, "missing.png"),
        (&["--ref", folder.path().to_str().unwrap(), "--lora-out", &lora], 3, "2 images were left out"),
        (&["--ref", PHOTO, "--face", "2", "--lora-out", &lora], 2, "there is no face 2"),
        (&["--ref", PHOTO, "--face-encoder", "sface", "--lora-out", &lora], 2, "`mobilefacenet512`"),
        (&["--ref", PHOTO, "--face-encoder", "sface", "--lora-out", &lora], 2, "`sface-2021dec`"),
        (&["--prompt", "x", "--out", &at("no/such/x.png")], 2, "there is no folder"),
        (&["--prompt", "x", "--out", &at("x.gif")], 2, "PNG, JPEG or WebP"),
        (&["--prompt", "x", "--out", &out, "--init-latents", &small], 4, "shape [1, 8, 8, 16]"),
        (&["--prompt", "x", "--out", &out, "--init-latents", &whole], 4, "I64"),
        (&["--prompt", "x", "--out", &out, "--init-latents", &nan], 4, "NaN"),
        (&["--prompt", "x", "--out", &out, "--init-latents", &at("cut.safetensors")], 4, "cut.safetensors"),
        (&["--prompt", "x", "--out", &out, "--sampler", "lcm", "--steps", "51"], 2, "1 to 50"),
        (&["--prompt", "x", "--out", &out, "--sampler", "heun"], 2, "dpmpp-2m-karras"),
        (&["--prompt", "x", "--out", &out, "--original-size", "12"], 2, "WIDTHxHEIGHT"),
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
fn a_name_that_ends_in_a_separator_is_a_folder_and_a_useless_negative_prompt_is_noted() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new/deep/");
    let prompts = ["gen", "--prompt", "a photo of a person", "a sketch of a person", "--steps", "1"];
    let more = ["--guidance", "1", "--negative-prompt", "hat", "--seed", "-1", "--out", text(&out)];
    let run = difflora(&[&prompts[..], &more].concat());
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("the negative prompt has no effect"), "{}", run.stderr);
    let images = ["0001.png", "0002.png"].map(|name| fs::read(out.join(name)).unwrap());
    // The seed that -1 stands for is in the image, so that it can be generated again.
    let words = String::from_utf8_lossy(&images[0]);
    let seed = words.split("Seed: ").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
    assert!(seed.parse::<u32>().is_ok(), "{seed}");
}

#[test]
fn verbose_tells_how_long_each_stage_took() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.png");
    let arguments = ["gen", "--prompt", "x", "--steps", "2", "--out", text(&out)];
    let told = |more: &[&str]| {
        let run = difflora(&[&arguments[..], more].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
        run.stderr.lines().filter(|line| line.starts_with("time:")).map(String::from).collect::<Vec<_>>()
    };
    assert!(told(&[]).is_empty());
    let told = told(&["-v"]);
    for stage in ["text encoders", "loading the UNet", "loading the VAE", "decoding"] {
        assert_eq!(told.iter().filter(|line| line.contains(stage)).count(), 1, "{stage}: {told:?}");
    }
    assert_eq!(told.iter().filter(|line| line.ends_with("a step")).count(), 2, "{told:?}");
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

/// Draws with the built-in base and gives the pixels.
fn pixels(out: &Path, more: &[&str]) -> Vec<u8> {
    let arguments =
        [&["gen", "--prompt", "a photo of a person", "--quiet", "--out", text(out)], more].concat();
    let run = difflora(&arguments);
    assert_eq!(run.code, 0, "{}", run.stderr);
    Image::open(out).unwrap().rgb
}

fn largest_difference(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn an_image_of_several_is_the_one_drawn_alone_with_its_seed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for sampler in ["euler-a", "lcm", "dpmpp-2m-karras"] {
        let common = ["--sampler", sampler, "--steps", "2"];
        let out = at(&format!("{sampler}.png"));
        let several = [&common[..], &["--num-images", "2", "--seed", "5"]].concat();
        let arguments =
            [&["gen", "--prompt", "a photo of a person", "--quiet", "--out", text(&out)], &several[..]];
        assert_eq!(difflora(&arguments.concat()).code, 0);
        let second = Image::open(&at(&format!("{sampler}-0002.png"))).unwrap().rgb;
        let first = Image::open(&at(&format!("{sampler}-0001.png"))).unwrap().rgb;
        assert_eq!(pixels(&at("alone.png"), &[&common[..], &["--seed", "6"]].concat()), second, "{sampler}");
        assert!(largest_difference(&first, &second) > 20, "{sampler}");
    }
}

#[test]
fn number_types_strips_and_sizes_change_what_they_should() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let steps = ["--steps", "3"];
    let draw = |name: &str, more: &[&str]| pixels(&at(name), &[&steps[..], more].concat());
    let plain = draw("plain.png", &[]);
    let apart = |name: &str, more: &[&str]| largest_difference(&plain, &draw(name, more));
    assert!(apart("strips.png", &["--vae-tiling", "on"]) <= 1);
    assert!(apart("half.png", &["--dtype", "f16"]) <= 2);
    let brain = apart("brain.png", &["--dtype", "bf16"]);
    assert!((1..60).contains(&brain), "bf16 differs by {brain}");
    assert!(apart("cropped.png", &["--crop", "0,512"]) > 0);
    assert!(apart("enlarged.png", &["--original-size", "8x8"]) > 0);
    // 60 = 15 latents: odd on every level of the UNet.
    draw("odd.png", &["--width", "120", "--height", "72"]);
    let odd = Image::open(&at("odd.png")).unwrap();
    assert_eq!((odd.width, odd.height), (120, 72));
}

#[test]
fn settings_stand_in_the_image_and_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let draw = |out: &Path, more: &[&str]| {
        let arguments =
            [&["gen", "--prompt", "写真 of a person", "--steps", "4", "--out", text(out)], more].concat();
        let run = difflora(&arguments);
        assert_eq!(run.code, 0, "{}", run.stderr);
        run
    };
    let out = at("me.webp");
    let run = draw(&out, &["--json", "--sampler", "unipc", "--preview", "2", "--negative-prompt", "blurry"]);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let beside: Value = serde_json::from_slice(&fs::read(at("me.json")).unwrap()).unwrap();
    assert_eq!(report["pictures"][0], beside);
    assert_eq!((&beside["sampler"], &beside["steps"]), (&"unipc".into(), &4.into()));
    let preview = Image::open(&at("me.preview.png")).unwrap();
    assert_eq!((preview.width, preview.height), (16, 16));
    assert!(preview.rgb.iter().max() > preview.rgb.iter().min());
    let utf16: Vec<u8> = "写真 of a person\nNegative prompt: blurry\nSteps: 4, Sampler: UniPC"
        .encode_utf16()
        .flat_map(u16::to_be_bytes)
        .collect();
    assert!(fs::read(&out).unwrap().windows(utf16.len()).any(|part| part == utf16));

    let bare = at("bare.png");
    draw(&bare, &["--no-metadata"]);
    assert!(!String::from_utf8_lossy(&fs::read(&bare).unwrap()).contains("Steps"));
    assert!(!at("bare.json").exists() && !at("bare.preview.png").exists());
}

#[test]
fn a_long_prompt_is_drawn_with_a_warning_that_says_what_was_cut() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.png");
    let long = "a photo of a person, ".repeat(30) + "Red Background";
    let run = difflora(&[
        "gen",
        "--prompt",
        &long,
        "--prompt-syntax",
        "plain",
        "--steps",
        "1",
        "--out",
        text(&out),
    ]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let warned = run.stderr.lines().find(|line| line.starts_with("warning:")).unwrap();
    assert!(warned.contains("tokens") && warned.ends_with("Red Background"), "{warned}");
}

#[test]
fn a_photo_of_somebody_else_is_named_and_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let astronaut = difflora::image::Image::open(Path::new(PHOTO)).unwrap();
    astronaut.save(&at("a.png"), None).unwrap();
    astronaut.mirrored().save(&at("b.png"), None).unwrap();
    fs::copy("tests/data/obama_senate_public_domain.jpg", at("other.jpg")).unwrap();
    fs::write(at("notes.txt"), "no image").unwrap();
    let made = |name: &str, reference: &[&str]| {
        let lora = at(name);
        let run = difflora(&[&["gen", "--json", "--lora-out", text(&lora), "--ref"], reference].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        (difflora::weights::read_file(&lora).unwrap(), report["person"].clone(), run.stderr)
    };
    let (a, b, other) = (at("a.png"), at("b.png"), at("other.jpg"));
    let (all, told, said) = made("all.safetensors", &[text(folder.path())]);
    assert!(said.contains("other.jpg` is left out: its face does not look like the others"), "{said}");
    assert!(said.contains("notes.txt"), "{said}");
    assert_eq!(told["references"].as_array().unwrap().len(), 2);
    assert!(told["left_out"][0]["file"].as_str().unwrap().ends_with("other.jpg"), "{told}");
    // The same as if it had never been named.
    let pattern = at("?.png");
    let (two, _, _) = made("two.safetensors", &[text(&pattern)]);
    assert_eq!(all.len(), two.len());
    for (name, tensor) in &all {
        let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(tensor), values(&two[name]), "{name}");
    }
    let (_, _, said) = made("pair.safetensors", &[text(&a), text(&other)]);
    assert!(said.contains("seem to show two people"), "{said}");
    let (_, told, said) = made("alike.safetensors", &[text(&a), text(&b)]);
    assert!(!said.contains("two people") && told["references"][0]["hints"].is_array(), "{said}");
}

#[test]
fn the_face_that_was_asked_for_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let group = folder.path().join("group.png");
    let head = difflora::image::Image::open(Path::new(PHOTO)).unwrap().crop(130, 10, 184, 184);
    let mut image = difflora::image::Image::filled(900, 500, [120, 140, 160]);
    image.paste(&head.resize(160, 160, difflora::image::Filter::Bicubic), 40, 100);
    image.paste(&head.resize(320, 320, difflora::image::Filter::Bicubic), 500, 100);
    image.save(&group, None).unwrap();
    let lora = folder.path().join("x.safetensors");
    for (number, left, right) in [("1", 500.0, 900.0), ("2", 0.0, 250.0)] {
        let run =
            difflora(&["gen", "--ref", text(&group), "--face", number, "--lora-out", text(&lora), "--json"]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.stderr.contains("2 faces in") && run.stderr.contains("--face N"), "{}", run.stderr);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        let at = report["person"]["references"][0]["face"]["box"][0].as_f64().unwrap();
        assert!(left <= at && at < right, "{report}");
    }
}
