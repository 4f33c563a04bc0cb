//! The user's own files are not overwritten, whatever their names.

use std::fs;
use std::path::Path;

use crate::difflora;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn an_output_that_is_an_input_is_refused_in_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::copy("tests/data/astronaut.png", at("me.png")).unwrap();
    let before = fs::read(at("me.png")).unwrap();
    let (dir, me) = (folder.path(), at("me.png"));
    for arguments in [
        &["face", "crop", text(dir), "--out", text(dir)][..],
        &["face", "detect", text(&me), "--draw", text(&me)],
        &["gen", "--ref", text(&me), "--prompt", "a person", "--out", text(&me), "--overwrite"],
        &["gen", "--mix", text(&me), "--prompt", "a person", "--out", text(&me), "--overwrite"],
        &["lora", "convert", text(&me), text(&me), "--overwrite"],
    ] {
        let run = difflora(arguments);
        assert_eq!(run.code, 2, "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains("input"), "{arguments:?}: {}", run.stderr);
        assert_eq!(fs::read(&me).unwrap(), before, "{arguments:?}");
    }
    // Another program's file is kept, too.
    fs::copy("tests/data/astronaut.png", at("other.png")).unwrap();
    let run = difflora(&["face", "detect", text(&me), "--draw", text(&at("other.png"))]);
    assert!(run.code == 2 && run.stderr.contains("--overwrite"), "{}", run.stderr);
}

#[test]
fn switches_in_the_environment_take_numbers_and_words() {
    for value in ["1", "true", "yes", "on", "0", "false", "no", "off"] {
        let run = crate::difflora_with(&[("DIFFLORA_JSON", value)], &["models", "list"]);
        let on = ["1", "true", "yes", "on"].contains(&value);
        assert_eq!((run.code, run.stdout.starts_with(['[', '{'])), (0, on), "{value}: {}", run.stderr);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn names_that_are_not_utf8_do_not_panic() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
    fs::copy("tests/data/astronaut.png", at(b"caf\xe9.png")).unwrap();
    for (command, out) in [("detect", None), ("compare", None), ("embed", Some(at(b"caf\xe9.safetensors")))] {
        let mut run = std::process::Command::new(env!("CARGO_BIN_EXE_difflora"));
        run.args(["face", command, "--json"]).arg(at(b"caf\xe9.png"));
        if let Some(out) = out {
            run.arg("--out").arg(out);
        }
        let output = run.output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn files_that_are_written_beside_an_image_replace_no_file_of_the_user() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let image = |name: &str, more: &[&str]| {
        let out = at(name);
        difflora(&[&["gen", "--prompt", "x", "--steps", "2", "--out", text(&out)], more].concat())
    };
    fs::copy("tests/data/astronaut.png", at("a.preview.png")).unwrap();
    fs::write(at("b.json"), "{\"mine\": 1}").unwrap();
    for (name, more, kept) in
        [("a.png", ["--preview", "1"], "a.preview.png"), ("b.png", ["--json", "--quiet"], "b.json")]
    {
        let before = fs::read(at(kept)).unwrap();
        let run = image(name, &more);
        assert!(
            run.code == 2 && run.stderr.contains(kept) && run.stderr.contains("--overwrite"),
            "{}",
            run.stderr
        );
        assert_eq!(fs::read(at(kept)).unwrap(), before);
        let run = image(name, &[&more[..], &["--overwrite"]].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
        // Its own file is replaced without a word.
        assert_eq!(image(name, &more).code, 0);
    }
}

#[test]
fn portraits_and_reports_replace_no_file_of_the_user() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let paint = |more: &[&str]| {
        let out = at("people");
        difflora(&[&["portraits", "--people", "1", "--images", "2", "--out", text(&out)], more].concat())
    };
    let photo = at("people/person-0001/0002.png");
    fs::create_dir_all(photo.parent().unwrap()).unwrap();
    fs::copy("tests/data/astronaut.png", &photo).unwrap();
    let run = paint(&[]);
    assert!(run.code == 2 && run.stderr.contains("0002.png"), "{}", run.stderr);
    assert_eq!(fs::read(&photo).unwrap(), fs::read("tests/data/astronaut.png").unwrap());
    assert_eq!(paint(&["--overwrite"]).code, 0);
    // What an interrupted run left is completed, and a finished folder painted again in another way.
    fs::remove_file(at("people/person-0001/person.json")).unwrap();
    assert_eq!(paint(&[]).code, 0);
    assert_eq!(paint(&["--size", "32"]).code, 0);

    fs::create_dir(at("report")).unwrap();
    fs::copy("tests/data/astronaut.png", at("report/sheet.png")).unwrap();
    let run = difflora(&["eval", "--base-only=1", "--out", text(&at("report"))]);
    assert!(run.code == 2 && run.stderr.contains("sheet.png"), "{}", run.stderr);
    let dataset = at("ds");
    fs::create_dir(&dataset).unwrap();
    fs::copy("configs/dataset-tiny.toml", dataset.join("settings.toml")).unwrap();
    let run = difflora(&[
        "build-dataset",
        "--config",
        text(&dataset.join("settings.toml")),
        "--out",
        text(&dataset),
    ]);
    assert!(run.code == 2 && run.stderr.contains("input of this command"), "{}", run.stderr);
}

#[cfg(target_os = "linux")]
#[test]
fn a_refused_value_is_named_with_where_it_comes_from() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let run = crate::difflora_with(&[("DIFFLORA_STEPS", "many")], &["gen", "--prompt", "x"]);
    assert!(run.code == 2 && run.stderr.contains("environment variable DIFFLORA_STEPS"), "{}", run.stderr);
    let run =
        crate::difflora_with(&[("DIFFLORA_STEPS", "many")], &["gen", "--prompt", "x", "--steps", "few"]);
    assert!(run.code == 2 && !run.stderr.contains("environment variable"), "{}", run.stderr);
    let mut run = std::process::Command::new(env!("CARGO_BIN_EXE_difflora"));
    let output = run.args(["gen", "--lora"]).arg(OsStr::from_bytes(b"caf\xe9.safetensors")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("caf\\xE9.safetensors"), "{said}");
}
