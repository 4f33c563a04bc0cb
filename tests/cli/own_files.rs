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
