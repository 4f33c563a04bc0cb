//! `difflora doctor` and `difflora help`.

use serde_json::Value;

use super::{difflora, difflora_with};

/// Runs `difflora doctor --json` with caches in `folder`; gives the exit code and the findings.
fn doctor(folder: &std::path::Path) -> (i32, Vec<Value>) {
    let hub = folder.join("hub");
    let variables = [("HF_HUB_CACHE", hub.to_str().unwrap()), ("HOME", folder.to_str().unwrap())];
    let run = difflora_with(&variables, &["doctor", "--json"]);
    let report: Value =
        serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {}", run.stderr));
    (run.code, report["checks"].as_array().unwrap().clone())
}

#[test]
fn a_fresh_machine_has_no_problems() {
    let folder = tempfile::tempdir().unwrap();
    let (code, checks) = doctor(folder.path());
    assert_eq!(code, 0, "{checks:#?}");
    for area in ["version", "cpu", "threads", "gpu", "hub cache", "model", "face encoder", "hub"] {
        let found = checks.iter().find(|check| check["area"] == area);
        assert!(found.is_some_and(|check| check["status"] != "problem"), "{area}: {checks:#?}");
    }
    let text = difflora(&["doctor"]).stdout;
    // Unoptimised builds are slow, which is worth a note.
    let version = if cfg!(debug_assertions) { "note     version" } else { "ok       version" };
    assert!(text.lines().any(|line| line.starts_with(version)), "{text}");
}

#[test]
fn a_damaged_face_encoder_is_a_problem_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join(".insightface/models/auraface");
    std::fs::create_dir_all(&place).unwrap();
    std::fs::write(place.join("glintr100.onnx"), "damaged").unwrap();
    let (code, checks) = doctor(folder.path());
    assert_eq!(code, 1);
    let problems: Vec<&Value> = checks.iter().filter(|check| check["status"] == "problem").collect();
    assert_eq!(problems.len(), 1, "{checks:#?}");
    assert_eq!(problems[0]["details"]["state"], "SHA-256 differs");
    assert!(problems[0]["remedy"].as_str().unwrap().contains("difflora models pull auraface"));
}

#[cfg(all(unix, not(any(feature = "cuda", feature = "metal"))))]
#[test]
fn a_gpu_that_this_build_cannot_use_is_a_note() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("nvidia-smi");
    std::fs::write(&program, "#!/bin/sh\necho 'NVIDIA H100 PCIe, 81559, 80994, 550.54.15'\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let run = difflora_with(&[("PATH", &path)], &["doctor", "--json"]);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let gpu = report["checks"].as_array().unwrap().iter().find(|check| check["area"] == "gpu").unwrap();
    assert_eq!((run.code, &gpu["status"]), (0, &Value::from("note")), "{gpu:#}");
    assert_eq!(gpu["details"]["total_mib"], 81559);
    assert_eq!(gpu["details"]["driver"], "550.54.15");
    assert!(gpu["remedy"].as_str().unwrap().contains("--features cuda"));
}

#[test]
fn an_unreachable_hub_is_a_problem_only_when_it_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let hub = folder.path().join("hub");
    // No server listens on port 9 of this machine.
    let variables = [("HF_HUB_CACHE", hub.to_str().unwrap()), ("HF_ENDPOINT", "http://127.0.0.1:9")];
    assert_eq!(difflora_with(&variables, &["doctor"]).code, 0);
    let run = difflora_with(&variables, &["doctor", "--online"]);
    assert!(run.code == 1 && run.stdout.contains("problem  hub"), "{}", run.stdout);
}

#[test]
fn help_prints_commands_and_guides() {
    let all = difflora(&["help"]).stdout;
    for name in ["gen", "doctor", "lora-files", "small-world", "Exit codes"] {
        assert!(all.contains(name), "{name}: {all}");
    }
    let merge = difflora(&["help", "lora", "merge"]);
    assert!(merge.code == 0 && merge.stdout.contains("--lora <FILE[:WEIGHT]>"), "{}", merge.stdout);
    let guide = difflora(&["help", "faces"]).stdout;
    assert!(guide.starts_with("# Photos and faces") && !guide.contains("```"), "{guide}");
    // A command with a guide of the same name.
    let both = difflora(&["help", "train-lora"]).stdout;
    assert!(both.contains("--people-per-batch") && both.contains("# Training a LoRA"), "{both}");
}

#[test]
fn help_for_an_unknown_name_suggests_near_ones() {
    let run = difflora(&["help", "hypernet"]);
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("hypernetwork"), "{}", run.stderr);
    assert_eq!(difflora(&["help", "lora", "quux"]).code, 2);
}

#[test]
fn every_command_explains_itself() {
    let commands =
        ["gen", "train-lora", "lora", "face", "models", "build-dataset", "train-lae", "train-dit", "eval"];
    for command in commands.into_iter().chain(["portraits", "train-base", "train-encoder", "doctor", "help"])
    {
        let run = difflora(&[command, "--help"]);
        assert!(run.code == 0 && run.stdout.contains("Global options:"), "{command}: {}", run.stdout);
        assert!(!run.stdout.contains("[env:"), "{command}: {}", run.stdout);
    }
}
