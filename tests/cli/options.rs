//! Options and variables that scripts compute: numbers, seeds, empty values, proxies, outputs in use.

use std::any::TypeId;
use std::fs;

use clap::error::ErrorKind;
use difflora::files::FolderLock;

use crate::{difflora, difflora_with};

/// Every option with the names of its subcommand.
fn options() -> Vec<(Vec<String>, clap::Arg)> {
    fn collect(command: &clap::Command, path: &[String], found: &mut Vec<(Vec<String>, clap::Arg)>) {
        found.extend(command.get_arguments().map(|arg| (path.to_vec(), arg.clone())));
        for subcommand in command.get_subcommands() {
            collect(subcommand, &[path, &[subcommand.get_name().to_string()]].concat(), found);
        }
    }
    let mut found = Vec::new();
    collect(&difflora::cli::command(), &[], &mut found);
    found
}

/// What parsing `difflora PATH… OPTION…` says.
fn parse(path: &[String], more: &[&str]) -> Option<ErrorKind> {
    let words = ["difflora"].into_iter().chain(path.iter().map(String::as_str)).chain(more.iter().copied());
    difflora::cli::command().try_get_matches_from(words).err().map(|error| error.kind())
}

#[test]
fn nan_and_infinity_are_refused_by_every_number_option() {
    let number = |arg: &clap::Arg| {
        let kind = arg.get_value_parser().type_id();
        kind == TypeId::of::<f64>() || kind == TypeId::of::<f32>()
    };
    let numbers: Vec<_> = options().into_iter().filter(|(_, arg)| number(arg)).collect();
    assert!(numbers.len() > 20, "{}", numbers.len());
    for (path, arg) in numbers {
        let name = arg.get_long().unwrap();
        for value in ["nan", "inf", "-inf", "1e999"] {
            let kind = parse(&path, &[&format!("--{name}={value}")]);
            assert_eq!(kind, Some(ErrorKind::ValueValidation), "{path:?} --{name}={value}");
        }
        assert_ne!(parse(&path, &[&format!("--{name}=0.5")]), Some(ErrorKind::ValueValidation), "--{name}");
    }
}

#[test]
fn every_seed_takes_minus_one() {
    let is_seed = |arg: &clap::Arg| {
        let id = arg.get_id().as_str();
        id == "scenes" || id.ends_with("seed")
    };
    let seeds: Vec<_> = options().into_iter().filter(|(_, arg)| is_seed(arg)).collect();
    assert!(seeds.len() >= 7, "{}", seeds.len());
    for (path, arg) in seeds {
        let name = format!("--{}", arg.get_long().unwrap());
        let kind = parse(&path, &[&name, "-1"]);
        let missing = [None, Some(ErrorKind::MissingRequiredArgument)];
        assert!(missing.contains(&kind), "{path:?} {name} -1: {kind:?}");
        assert_eq!(parse(&path, &[&name, "-2"]), Some(ErrorKind::ValueValidation), "{path:?} {name} -2");
    }
}

#[test]
fn an_empty_variable_counts_as_unset() {
    let names = ["DIFFLORA_QUIET", "DIFFLORA_JSON", "DIFFLORA_MAX_MEGAPIXELS", "HF_HOME", "HF_ENDPOINT"];
    let plain = difflora(&["models", "list"]);
    let run = difflora_with(&names.map(|name| (name, "")), &["models", "list"]);
    assert_eq!((run.code, &run.stdout), (0, &plain.stdout), "{}", run.stderr);
}

#[test]
fn a_proxy_that_does_not_answer_is_named_without_its_password() {
    let home = tempfile::tempdir().unwrap();
    let environment =
        [("HF_HOME", home.path().to_str().unwrap()), ("HTTPS_PROXY", "http://me:pw@127.0.0.1:9")];
    let run = difflora_with(&environment, &["gen", "--base", "nobody/nothing", "--prompt", "x"]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    assert!(run.stderr.contains("`127.0.0.1:9` of HTTPS_PROXY"), "{}", run.stderr);
    assert!(!run.stderr.contains("pw"), "{}", run.stderr);
}

#[test]
fn resuming_nothing_and_an_output_in_use_are_refused_by_every_training() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let path = out.to_str().unwrap();
    for (command, state) in [
        (
            &["train-encoder", "--kind", "image", "--config", "configs/encoder-tiny.toml"][..],
            "training/image.",
        ),
        (&["train-base", "--config", "configs/base-tiny.toml"], "training/vae."),
        (&["train-lae", "--dataset", "none", "--config", "configs/hypernet-tiny.toml"], "training/lae."),
        (
            &["train-dit", "--dataset", "none", "--lae", "none", "--config", "configs/hypernet-tiny.toml"],
            "training/dit.",
        ),
    ] {
        let run = difflora(&[command, &["--out", path, "--resume"]].concat());
        assert_eq!(run.code, 2, "{command:?}: {}", run.stderr);
        assert!(run.stderr.contains("there is no state") && run.stderr.contains(state), "{}", run.stderr);
        assert!(!out.exists(), "{command:?} leaves a folder");
        let locked = if command[0] == "train-lae" { out.clone() } else { out.join("training") };
        let lock = FolderLock::acquire(&locked).unwrap();
        let run = difflora(&[command, &["--out", path]].concat());
        assert_eq!(run.code, 2, "{command:?}: {}", run.stderr);
        assert!(run.stderr.contains(&format!("process {}", std::process::id())), "{}", run.stderr);
        drop(lock);
        fs::remove_dir_all(&out).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn devices_and_pipes_are_no_settings_and_no_latents() {
    for arguments in [
        &["train-lora", "tests/data", "--out", "/tmp/x.safetensors", "--config", "/dev/zero"][..],
        &["build-dataset", "--out", "/tmp/x-dataset", "--config", "/dev/zero"],
        &["train-encoder", "--kind", "image", "--out", "/tmp/x-encoder", "--config", "/dev/zero"],
        &["gen", "--prompt", "x", "--steps", "1", "--init-latents", "/dev/zero", "--out", "/tmp/x.png"],
    ] {
        let run = difflora(arguments);
        assert_eq!(run.code, 4, "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains("/dev/zero") && run.stderr.contains("device"), "{}", run.stderr);
    }
}
