//! `build-dataset`: the same bytes after interruption and damage.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::{Run, difflora};

/// Four people in groups of two, two steps each.
fn config(folder: &Path) -> PathBuf {
    let text = fs::read_to_string("configs/dataset-tiny.toml").unwrap();
    let small = [
        ("train", "3"),
        ("held_out", "1"),
        ("people_per_batch", "2"),
        ("steps", "2"),
        ("scenes", "2"),
        ("references", "2"),
        ("people", "2"),
    ];
    let lines = text.lines().map(|line| {
        let known = small.iter().find(|(key, _)| line.split(" =").next() == Some(key));
        known.map_or(line.to_string(), |(key, value)| format!("{key} = {value}"))
    });
    let path = folder.join("few.toml");
    fs::write(&path, lines.collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn build(out: &Path, config: &Path, options: &[&str]) -> Run {
    let mut arguments = vec!["build-dataset", "--out", out.to_str().unwrap()];
    arguments.extend(["--config", config.to_str().unwrap()]);
    arguments.extend(options);
    difflora(&arguments)
}

fn manifest(out: &Path) -> String {
    fs::read_to_string(out.join("manifest.jsonl")).unwrap()
}

#[test]
fn a_damaged_dataset_is_completed_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (config, out) = (config(folder.path()), folder.path().join("ds"));
    let run = build(&out, &config, &["--quiet"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let whole = manifest(&out);
    let ids: Vec<serde_json::Value> = whole
        .lines()
        .map(|row| serde_json::from_str::<serde_json::Value>(row).unwrap()["id"].clone())
        .collect();
    assert_eq!(ids, ["person-000001", "person-000002", "person-000003", "person-000004"]);
    let lora = out.join("loras/person-000002.safetensors");
    let bytes = fs::read(&lora).unwrap();

    // A row that was cut off is removed and its person built again.
    fs::write(out.join("manifest.jsonl"), &whole[..whole.len() - 90]).unwrap();
    let run = build(&out, &config, &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("incomplete last row"), "{}", run.stderr);
    assert_eq!(manifest(&out), whole);

    // Rows out of order, and one row twice.
    let rows: Vec<&str> = whole.lines().collect();
    let shuffled = [rows[2], rows[0], rows[3], rows[1], rows[0]].join("\n") + "\n";
    fs::write(out.join("manifest.jsonl"), shuffled).unwrap();
    assert_eq!(build(&out, &config, &[]).code, 0);
    assert_eq!(manifest(&out), whole);

    // A LoRA that was deleted.
    fs::remove_file(&lora).unwrap();
    let run = build(&out, &config, &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("person-000002"), "{}", run.stderr);
    assert_eq!((fs::read(&lora).unwrap(), manifest(&out)), (bytes, whole));
}

#[test]
fn a_basis_of_other_settings_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (config, out) = (config(folder.path()), folder.path().join("ds"));
    // The old spelling of --repeatability.
    let run = build(&out, &config, &["--signal", "2", "--signal-only"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stdout.starts_with("repeatability: 2 people"), "{}", run.stdout);
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("alpha = ", "alpha = 1")).unwrap();
    let run = build(&out, &config, &[]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    assert!(
        run.stderr.contains("basis.safetensors") && run.stderr.contains("other settings"),
        "{}",
        run.stderr
    );
    assert!(!out.join("manifest.jsonl").exists());
}

#[test]
fn a_second_process_is_refused_with_the_id_of_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let (config, out) = (config(folder.path()), folder.path().join("ds"));
    let long = fs::read_to_string(&config).unwrap().replace("steps = 2", "steps = 100000");
    let long_config = folder.path().join("long.toml");
    fs::write(&long_config, long).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_difflora"));
    command.args(["build-dataset", "--quiet", "--out"]).arg(&out).arg("--config").arg(&long_config);
    let mut first = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let id = first.id().to_string();
    while fs::read_to_string(out.join(".lock")).unwrap_or_default() != id {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let run = build(&out, &config, &[]);
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains(&format!("process {id}")), "{}", run.stderr);
    // A killed process leaves no lock behind.
    assert_eq!(build(&out, &config, &["--quiet"]).code, 0);
}

#[test]
fn tokens_of_the_image_encoder_are_recorded_where_the_settings_ask_for_them() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, out) = (config(folder.path()), folder.path().join("ds"));
    let text = fs::read_to_string(&plain).unwrap();
    let records = |lines: &str| {
        let path = folder.path().join("records.toml");
        fs::write(&path, format!("{text}\n[records]\n{lines}\n")).unwrap();
        path
    };
    let run = build(&out, &records("clip_tokens = true"), &["--quiet"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let tensors = difflora::weights::read_file(&out.join("embeddings/person-000001.safetensors")).unwrap();
    let (tokens, image) = (&tensors["clip_tokens"], &tensors["image"]);
    let encoder = difflora::registry::built_in("image_encoder").unwrap();
    let sizes: serde_json::Value = serde_json::from_slice(&encoder.read("config.json").unwrap()).unwrap();
    let number = |key: &str| sizes[key].as_u64().unwrap() as usize;
    let count = (number("image_size") / number("patch_size")).pow(2) + 1;
    assert_eq!(tokens.dims(), [image.dims()[0], count, number("hidden_size")]);
    let spread = tokens.var(1).unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(spread.is_finite() && spread > 1e-3, "{spread}");
    // What is recorded is part of the settings.
    let run = build(&out, &plain, &[]);
    assert!(run.code == 4 && run.stderr.contains("other settings"), "{}", run.stderr);
    // Grey crops are cut out along landmarks, which the built-in face encoder does not have.
    let run = build(&folder.path().join("grey"), &records("grey_crops = true"), &[]);
    assert!(
        run.code != 0 && run.code != 101 && run.stderr.contains("antelopev2"),
        "{}: {}",
        run.code,
        run.stderr
    );
}
