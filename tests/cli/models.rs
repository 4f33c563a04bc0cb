//! Base models as a user names them: folders, files, repositories; and what is said of those that cannot be used.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::Run;
use crate::difflora;
use crate::difflora_with;

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

fn golden(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/single_file").join(file)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy_folder(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// Draws one step with `base`; the program's run, and the pixels where there are any.
fn draw(env: &[(&str, &str)], base: &str, more: &[&str]) -> (Run, Option<Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.png");
    let arguments = ["gen", "--prompt", "a photo", "--steps", "1", "--out", text(&out), "--base", base];
    let run = difflora_with(env, &[&arguments, more].concat());
    let pixels = out.exists().then(|| difflora::image::Image::open(&out).unwrap().rgb);
    assert_eq!(pixels.is_some(), run.code == 0, "{}", run.stderr);
    (run, pixels)
}

#[test]
fn one_file_draws_the_folder_s_image() {
    let (_, folder) = draw(&[], text(&golden("folder")), &[]);
    let config = golden("folder");
    let (run, one) = draw(&[], text(&golden("one.safetensors")), &["--base-config", text(&config)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(folder == one && folder.is_some());
    let (run, _) = draw(&[], text(&golden("folder")), &["--base-config", text(&config)]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    // The other commands find a base in the same way.
    let out = tempfile::tempdir().unwrap();
    let arguments = ["eval", "--base-only=2", "--base", "owner/name", "--revision", "v2"];
    let env = [("HF_HOME", text(out.path())), ("HF_HUB_CACHE", "")];
    let run = difflora_with(&env, &[&arguments[..], &["--offline"]].concat());
    assert!(run.code == 4 && run.stderr.contains("owner/name@v2"), "{}", run.stderr);
}

#[test]
fn show_counts_and_verify_looks_at_every_weight() {
    let run = difflora(&["models", "show", "tiny", "--width", "256", "--json"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let unet = fs::File::open("src/assets/tiny/base/unet/diffusion_pytorch_model.safetensors").unwrap();
    let parts = report["parts"].as_array().unwrap();
    let counted = parts.iter().find(|part| part["part"] == "unet").unwrap();
    // Stored as f16: two bytes a number, and a header.
    let (stored, counted) = (unet.metadata().unwrap().len() / 2, counted["parameters"].as_u64().unwrap());
    assert!(counted <= stored && stored < counted + 100_000, "{stored} {counted}");
    assert_eq!((report["width"].as_u64(), report["height"].as_u64()), (Some(256), Some(128)));
    assert_eq!(difflora(&["models", "show", "tiny", "--width", "63"]).code, 2);
    let run = difflora(&["models", "show", "tiny"]);
    assert!(run.stdout.contains("with attention") && run.stdout.contains("vae decoder"), "{}", run.stdout);

    let config = golden("folder");
    let run = difflora(&["models", "verify", text(&golden("folder"))]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let run =
        difflora(&["models", "verify", text(&golden("one.safetensors")), "--base-config", text(&config)]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(difflora(&["models", "path", "tiny"]).code, 2);
}

/// Changes one tensor of a weight file.
fn spoil(file: &Path, name: &str, change: impl Fn(&Tensor) -> Tensor) {
    let mut tensors: HashMap<String, Tensor> = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let changed = change(&tensors[name]);
    tensors.insert(name.to_string(), changed);
    candle_core::safetensors::save(&tensors, file).unwrap();
}

#[test]
fn a_folder_that_cannot_be_used_is_refused_with_its_name_and_a_remedy() {
    let index = |value: Value| {
        move |root: &Path| fs::write(root.join("model_index.json"), value.to_string()).unwrap()
    };
    let set = |file: &'static str, key: &'static str, value: Value| {
        move |root: &Path| {
            let mut config: Value = serde_json::from_slice(&fs::read(root.join(file)).unwrap()).unwrap();
            config[key] = value.clone();
            fs::write(root.join(file), config.to_string()).unwrap();
        }
    };
    type Damage = Box<dyn Fn(&Path)>;
    let cases: Vec<(Damage, &[&str])> = vec![
        (
            Box::new(|root| fs::remove_file(root.join("model_index.json")).unwrap()),
            &["model_index.json", "missing"],
        ),
        (Box::new(|root| fs::remove_dir_all(root.join("vae")).unwrap()), &["vae", "missing"]),
        (Box::new(|root| fs::remove_dir_all(root.join("tokenizer_2")).unwrap()), &["tokenizer_2"]),
        (
            Box::new(|root| fs::write(root.join("unet/config.json"), "{\n\"a\": }").unwrap()),
            &["unet/config.json", "line 2"],
        ),
        (
            Box::new(|root| fs::write(root.join("model_index.json"), "[").unwrap()),
            &["model_index.json", "line 1"],
        ),
        (
            Box::new(move |root| {
                index(json!({ "_class_name": "StableDiffusionPipeline" }))(root);
                set("unet/config.json", "cross_attention_dim", json!(768))(root);
            }),
            &["Stable Diffusion 1"],
        ),
        (
            Box::new(move |root| {
                index(json!({ "_class_name": "StableDiffusionPipeline" }))(root);
                set("unet/config.json", "cross_attention_dim", json!(1024))(root);
            }),
            &["Stable Diffusion 2"],
        ),
        (
            Box::new(move |root| {
                index(
                    json!({ "_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [null, null] }),
                )(root);
                set("unet/config.json", "cross_attention_dim", json!(1280))(root);
            }),
            &["refiner", "base"],
        ),
        (Box::new(index(json!({ "_class_name": "FluxPipeline" }))), &["FLUX"]),
        (Box::new(index(json!({ "_class_name": "KandinskyPipeline" }))), &["KandinskyPipeline"]),
        (Box::new(set("unet/config.json", "in_channels", json!(9))), &["inpainting"]),
        (Box::new(set("unet/config.json", "act_fn", json!("gelu"))), &["unet", "`act_fn`"]),
        (Box::new(set("unet/config.json", "a_new_option", json!(3))), &["unet", "`a_new_option`"]),
        (Box::new(set("vae/config.json", "a_new_option", json!(3))), &["vae/config.json", "a_new_option"]),
        (
            Box::new(set("scheduler/scheduler_config.json", "thresholding", json!(true))),
            &["scheduler_config.json", "thresholding"],
        ),
        (
            Box::new(set("unet/config.json", "block_out_channels", json!([4, 8, 12]))),
            &[UNET, "down_blocks.2.resnets.0", "wanted"],
        ),
        (
            Box::new(move |root| {
                let whole = fs::read(root.join(UNET)).unwrap();
                fs::write(root.join(UNET), &whole[..whole.len() - 10]).unwrap();
            }),
            &[UNET],
        ),
        (
            Box::new(move |root| {
                fs::rename(root.join(UNET), root.join("unet/diffusion_pytorch_model.bin")).unwrap()
            }),
            &["diffusion_pytorch_model.bin", "save_pretrained"],
        ),
        (
            Box::new(move |root| {
                spoil(&root.join(UNET), "conv_out.bias", |bias| {
                    (bias.zeros_like().unwrap() + f64::NAN).unwrap()
                });
            }),
            &[UNET, "`conv_out.bias` holds NaN or infinity"],
        ),
        (
            Box::new(|root| {
                let file = root.join("text_encoder_2/model.safetensors");
                spoil(&file, "text_projection.weight", |weight| {
                    (weight.to_dtype(DType::F32).unwrap() / 0.0).unwrap().to_dtype(DType::F16).unwrap()
                });
            }),
            &["text_encoder_2", "`text_projection.weight` holds NaN or infinity"],
        ),
    ];
    for (i, (damage, said)) in cases.iter().enumerate() {
        let root = tempfile::tempdir().unwrap();
        copy_folder(&golden("folder"), root.path());
        damage(root.path());
        let (run, _) = draw(&[], text(root.path()), &[]);
        assert_eq!(run.code, 4, "case {i} {said:?}: {}", run.stderr);
        assert!(said.iter().all(|said| run.stderr.contains(said)), "case {i} {said:?}: {}", run.stderr);
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    }
}

/// The weights are fine as such, so that no file is at fault.
#[test]
fn numbers_that_grow_beyond_all_bounds_are_a_failure_with_its_place_and_no_image() {
    for (file, name, said) in [
        (UNET, "conv_out.weight", "the UNet predicted NaN or infinity at step 1 of 1"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.conv_out.weight",
            "the VAE decoded NaN or infinity",
        ),
        ("text_encoder_2/model.safetensors", "text_projection.weight", "a text encoder gave NaN or infinity"),
    ] {
        let root = tempfile::tempdir().unwrap();
        copy_folder(&golden("folder"), root.path());
        spoil(&root.path().join(file), name, |weight| {
            let wide = Tensor::full(3e38f32, weight.dims(), &Device::Cpu).unwrap();
            wide.to_dtype(DType::BF16).unwrap()
        });
        let (run, pixels) = draw(&[], text(root.path()), &[]);
        assert!(run.code == 1 && pixels.is_none() && run.stderr.contains(said), "{name}: {}", run.stderr);
    }
}

#[test]
fn a_file_that_cannot_be_used_is_told_by_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let zero = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap();
    let cases: [(&str, &[&str], &str); 8] = [
        ("sd15", &["model.diffusion_model.x", "cond_stage_model.transformer.x"], "Stable Diffusion 1"),
        ("sd2", &["model.diffusion_model.x", "cond_stage_model.model.x"], "Stable Diffusion 2"),
        ("refiner", &["model.diffusion_model.x", "conditioner.embedders.0.model.x"], "refiner"),
        ("sd3", &["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        ("flux", &["double_blocks.0.x"], "FLUX"),
        ("lora", &["lora_unet_x.lora_up.weight"], "--lora"),
        ("part", &["down_blocks.0.x"], "give the folder"),
        ("unet", &["model.diffusion_model.x"], "two text encoders"),
    ];
    for (name, tensors, said) in cases {
        let file = folder.path().join(format!("{name}.safetensors"));
        let tensors: HashMap<&str, Tensor> = tensors.iter().map(|name| (*name, zero.clone())).collect();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let (run, _) = draw(&[], text(&file), &[]);
        assert_eq!(run.code, 4, "{name}: {}", run.stderr);
        assert!(run.stderr.contains(said), "{name}: {}", run.stderr);
    }
    let pickle = folder.path().join("model.ckpt");
    fs::write(&pickle, b"PK\x03\x04 and so on").unwrap();
    let renamed = folder.path().join("renamed.safetensors");
    fs::copy(&pickle, &renamed).unwrap();
    for file in [&pickle, &renamed] {
        let (run, _) = draw(&[], text(file), &[]);
        assert_eq!(run.code, 4, "{}", run.stderr);
        assert!(run.stderr.contains("torch.load") && run.stderr.contains("save_file"), "{}", run.stderr);
    }
    // A stray tensor under a known prefix is another architecture; one under an unknown prefix is told and left out.
    let (file, config) = (folder.path().join("stray.safetensors"), golden("folder"));
    let one = candle_core::safetensors::load(golden("one.safetensors"), &Device::Cpu).unwrap();
    for (stray, code, said) in [
        ("first_stage_model.encoder.more.weight", 4, "first_stage_model.encoder.more.weight"),
        ("something.else", 0, "something.else"),
    ] {
        let mut tensors = one.clone();
        tensors.insert(stray.to_string(), zero.clone());
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let (run, _) = draw(&[], text(&file), &["--base-config", text(&config)]);
        assert_eq!(run.code, code, "{}", run.stderr);
        assert!(run.stderr.contains(said), "{}", run.stderr);
    }
    let mut tensors = one;
    tensors.remove("model.diffusion_model.out.0.bias").unwrap();
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let (run, _) = draw(&[], text(&file), &["--base-config", text(&config)]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    assert!(run.stderr.contains("`conv_norm_out.bias` is missing"), "{}", run.stderr);
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The golden folder in a hub's cache, as huggingface_hub lays it out.
fn fill_cache(home: &Path) -> PathBuf {
    let repository = home.join("hub/models--owner--name");
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), COMMIT).unwrap();
    let snapshot = repository.join("snapshots").join(COMMIT);
    copy_folder(&golden("folder"), &snapshot);
    snapshot
}

#[test]
fn a_repository_in_the_cache_needs_no_network() {
    let home = tempfile::tempdir().unwrap();
    // Nothing listens there.
    let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_CACHE", "")];
    let offline = [&env[..], &[("HF_HUB_OFFLINE", "1")]].concat();
    for (env, more) in [(&offline[..], &[][..]), (&env[..], &["--offline"][..])] {
        let (run, _) = draw(env, "owner/name", more);
        assert_eq!(run.code, 4, "{}", run.stderr);
        assert!(run.stderr.contains("difflora models pull owner/name"), "{}", run.stderr);
    }
    let (run, _) = draw(&env, "owner/name", &[]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    assert!(run.stderr.contains("with a network"), "{}", run.stderr);

    let snapshot = fill_cache(home.path());
    let (_, expected) = draw(&[], text(&golden("folder")), &[]);
    for base in ["owner/name", "owner/name@main", &format!("owner/name@{COMMIT}")] {
        let (run, pixels) = draw(&env, base, &[]);
        assert!(run.code == 0 && pixels == expected, "{base}: {}", run.stderr);
    }
    let (run, _) = draw(&env, "owner/name", &["--revision", "v2", "--offline"]);
    assert!(run.code == 4 && run.stderr.contains("pull owner/name@v2"), "{}", run.stderr);
    let run = difflora_with(&env, &["models", "path", "owner/name"]);
    assert_eq!(run.stdout.trim(), text(&snapshot));
    let run = difflora_with(&env, &["models", "list"]);
    let line =
        |name: &str| run.stdout.lines().find(|line| line.contains(name)).unwrap_or_default().to_string();
    assert!(line("owner/name").contains("whole") && line("sdxl").contains("not fetched"), "{}", run.stdout);
    assert!(line("tiny").contains("built in"), "{}", run.stdout);

    fs::remove_file(snapshot.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    let (run, _) = draw(&env, "owner/name", &["--offline"]);
    assert!(run.code == 4 && run.stderr.contains("vae/diffusion_pytorch_model"), "{}", run.stderr);
}

/// A hub with one repository, or one that answers every request with `status`; gives its address and what was asked.
fn hub(files: PathBuf, status: Option<u16>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map(Result::unwrap) {
            let lines: Vec<String> = BufReader::new(stream.try_clone().unwrap())
                .lines()
                .map(Result::unwrap)
                .take_while(|line| !line.is_empty())
                .collect();
            let path = lines[0].split(' ').nth(1).unwrap().to_string();
            let header = |name: &str| {
                let line = lines.iter().find(|line| line.to_lowercase().starts_with(name));
                line.map(|line| line.split_once(": ").unwrap().1.to_string())
            };
            let token = header("authorization").unwrap_or_default();
            let range = header("range").unwrap_or_default();
            log.lock().unwrap().push(format!("{path} {range} {token}"));
            let (status, headers, body) = if let Some(status) = status {
                (status, String::new(), Vec::new())
            } else if let Some(file) = path.split_once("/resolve/main/").map(|(_, file)| file) {
                let whole = fs::read(files.join(file)).unwrap();
                let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                let from: usize = from.parse().unwrap();
                let to = to.parse::<usize>().map_or(whole.len(), |to| (to + 1).min(whole.len()));
                let headers = format!(
                    "ETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{}/{}\r\n",
                    file.replace('/', "-"),
                    to.saturating_sub(1),
                    whole.len()
                );
                (206, headers, whole[from..to].to_vec())
            } else {
                let mut names = vec![json!({ "rfilename": "README.md" })];
                for folder in [
                    "",
                    "unet",
                    "vae",
                    "text_encoder",
                    "text_encoder_2",
                    "tokenizer",
                    "tokenizer_2",
                    "scheduler",
                ] {
                    for entry in fs::read_dir(files.join(folder)).into_iter().flatten().map(Result::unwrap) {
                        let name = entry.path().strip_prefix(&files).unwrap().to_str().unwrap().to_string();
                        names.push(json!({ "rfilename": name }));
                    }
                }
                (200, String::new(), json!({ "sha": COMMIT, "siblings": names }).to_string().into_bytes())
            };
            let head = format!(
                "HTTP/1.1 {status} x\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    (address, asked)
}

#[test]
fn a_repository_is_fetched_once_with_the_token_and_goes_on_where_it_was_cut_off() {
    let home = tempfile::tempdir().unwrap();
    let (address, asked) = hub(golden("folder"), None);
    let env = [
        ("HF_HOME", text(home.path())),
        ("HF_ENDPOINT", address.as_str()),
        ("HF_TOKEN", "secret"),
        ("HF_HUB_CACHE", ""),
    ];
    // Half of the UNet is there from an earlier try.
    let blobs = home.path().join("hub/models--owner--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let whole = fs::read(golden("folder").join(UNET)).unwrap();
    let part = blobs.join(UNET.replace('/', "-")).with_extension("part");
    fs::write(&part, &whole[..1000]).unwrap();

    let (run, pixels) = draw(&env, "owner/name", &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let (_, expected) = draw(&[], text(&golden("folder")), &[]);
    assert!(pixels == expected);
    let requests = asked.lock().unwrap().clone();
    assert!(requests.iter().all(|request| request.ends_with("Bearer secret")), "{requests:?}");
    assert!(
        requests.iter().any(|request| request.contains(UNET) && request.contains("bytes=1000-")),
        "{requests:?}"
    );
    assert!(!requests.iter().any(|request| request.contains("README.md")), "{requests:?}");

    let (run, _) = draw(&env, "owner/name", &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(asked.lock().unwrap().len(), requests.len(), "a whole model was asked for again");
    let run = difflora_with(&env, &["models", "verify", "owner/name"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
}

#[test]
fn a_repository_that_holds_one_file_is_read_from_it_and_of_several_one_is_named() {
    let (home, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::copy(golden("one.safetensors"), files.path().join("one.safetensors")).unwrap();
    let (address, asked) = hub(files.path().to_path_buf(), None);
    let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", address.as_str()), ("HF_HUB_CACHE", "")];
    let config = golden("folder");
    let more = ["--base-config", text(&config)];
    let (_, expected) = draw(&[], text(&golden("folder")), &[]);
    let (run, pixels) = draw(&env, "owner/name", &more);
    assert!(run.code == 0 && pixels == expected, "{}", run.stderr);
    let before = asked.lock().unwrap().len();
    let (run, pixels) = draw(&env, "owner/name", &more);
    assert!(run.code == 0 && pixels == expected, "{}", run.stderr);
    assert_eq!(asked.lock().unwrap().len(), before, "a whole model was asked for again");
    let run = difflora_with(&env, &["models", "path", "owner/name"]);
    assert!(run.stdout.trim().ends_with("one.safetensors"), "{}", run.stdout);

    let home = tempfile::tempdir().unwrap();
    fs::copy(golden("one.safetensors"), files.path().join("other.safetensors")).unwrap();
    let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", address.as_str()), ("HF_HUB_CACHE", "")];
    let (run, _) = draw(&env, "owner/name", &more);
    assert_eq!(run.code, 4, "{}", run.stderr);
    for said in ["owner/name:one.safetensors", "owner/name:other.safetensors"] {
        assert!(run.stderr.contains(said), "{}", run.stderr);
    }
    let (run, pixels) = draw(&env, "owner/name:other.safetensors", &more);
    assert!(run.code == 0 && pixels == expected, "{}", run.stderr);
}

#[test]
fn a_hypernetwork_is_fetched_from_a_repository_by_its_name() {
    let (home, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (address, asked) = hub(PathBuf::from("src/assets/tiny/hypernet"), None);
    let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", address.as_str()), ("HF_HUB_CACHE", "")];
    let make = |name: &str, hypernet: &str, more: &[&str]| {
        let lora = out.path().join(name);
        let arguments =
            ["gen", "--ref", "tests/data/astronaut.png", "--lora-out", text(&lora), "--hypernet", hypernet];
        let run = difflora_with(&env, &[&arguments, more].concat());
        (run, candle_core::safetensors::load(&lora, &Device::Cpu).ok())
    };
    let (run, none) = make("a.safetensors", "owner/hyper", &["--offline"]);
    assert!(run.code == 4 && none.is_none() && run.stderr.contains("owner/hyper"), "{}", run.stderr);
    let (run, fetched) = make("b.safetensors", "owner/hyper", &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let (_, own) = make("c.safetensors", "tiny", &[]);
    let numbers = |lora: Option<HashMap<String, Tensor>>| -> Vec<(String, Vec<f32>)> {
        let number = |x: Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let mut all: Vec<_> = lora.unwrap().into_iter().map(|(name, x)| (name, number(x))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    assert!(numbers(fetched) == numbers(own));
    let before = asked.lock().unwrap().len();
    let (run, _) = make("d.safetensors", "owner/hyper", &["--offline"]);
    assert!(run.code == 0 && asked.lock().unwrap().len() == before, "{}", run.stderr);

    let (address, _) = hub(golden("folder"), None);
    let home = tempfile::tempdir().unwrap();
    let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", address.as_str()), ("HF_HUB_CACHE", "")];
    let lora = out.path().join("e.safetensors");
    let arguments =
        ["gen", "--ref", "tests/data/astronaut.png", "--lora-out", text(&lora), "--hypernet", "owner/base"];
    let run = difflora_with(&env, &arguments);
    assert!(run.code == 4 && run.stderr.contains("it has no `config.json`"), "{}", run.stderr);
}

/// What is written to `/dev/full` finds no room.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_while_fetching_is_explained_and_leaves_no_half_model() {
    let home = tempfile::tempdir().unwrap();
    let (address, _) = hub(golden("folder"), None);
    let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", address.as_str()), ("HF_HUB_CACHE", "")];
    let repository = home.path().join("hub/models--owner--name");
    fs::create_dir_all(repository.join("blobs")).unwrap();
    let part = repository.join("blobs").join(UNET.replace('/', "-")).with_extension("part");
    std::os::unix::fs::symlink("/dev/full", &part).unwrap();
    let run = difflora_with(&env, &["models", "pull", "owner/name"]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    assert!(run.stderr.contains("the disk is full") && run.stderr.contains("HF_HOME"), "{}", run.stderr);
    assert!(!repository.join("snapshots").join(COMMIT).join(UNET).exists());
    let (run, _) = draw(&env, "owner/name", &["--offline"]);
    assert!(run.code == 4 && run.stderr.contains("it has no whole `unet/"), "{}", run.stderr);
    // Once there is room, the same command goes on.
    fs::remove_file(&part).unwrap();
    let run = difflora_with(&env, &["models", "pull", "owner/name"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let (run, pixels) = draw(&env, "owner/name", &["--offline"]);
    assert!(pixels.is_some() && pixels == draw(&[], text(&golden("folder")), &[]).1, "{}", run.stderr);
}

#[test]
fn what_the_hub_refuses_is_explained() {
    let home = tempfile::tempdir().unwrap();
    for (status, said) in
        [(401, "HF_TOKEN"), (403, "https://huggingface.co/owner/name"), (404, "no such repository")]
    {
        let (address, _) = hub(PathBuf::new(), Some(status));
        let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", address.as_str()), ("HF_HUB_CACHE", "")];
        let run = difflora_with(&env, &["models", "pull", "owner/name"]);
        assert_eq!(run.code, 4, "{}", run.stderr);
        assert!(run.stderr.contains(said), "{}", run.stderr);
    }
}

#[test]
fn hyperlora_is_fetched_with_its_encoders_once_its_licences_are_accepted() {
    let (home, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = files.path().join("sdxl_hyper_id_lora_v1_fidelity");
    fs::create_dir(&folder).unwrap();
    for name in difflora::hypernet::hyperlora::FILES {
        fs::write(folder.join(name), "not the real one").unwrap();
    }
    for name in ["config.json", "model.safetensors", "preprocessor_config.json"] {
        fs::write(files.path().join(name), "not the real one").unwrap();
    }
    let (address, asked) = hub(files.path().to_path_buf(), None);
    let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", address.as_str()), ("HF_HUB_CACHE", "")];
    let run = difflora_with(&env, &["models", "pull", "hyperlora"]);
    assert!(run.code == 2 && asked.lock().unwrap().is_empty(), "{}", run.stderr);
    let fetched = |name: &str| asked.lock().unwrap().iter().filter(|line| line.contains(name)).count();
    for _ in 0..2 {
        let run = difflora_with(&env, &["models", "pull", "hyperlora", "--accept-licence"]);
        // CLIP is not OpenAI's.
        assert_eq!(run.code, 4, "{}", run.stderr);
        assert!(run.stderr.contains("CC BY-NC 4.0") && run.stderr.contains("a2bf730a0c7d"), "{}", run.stderr);
    }
    // What is there is not fetched again.
    let once = fetched("HyperLoRA/resolve/main/sdxl_hyper_id_lora_v1_fidelity/resampler.safetensors");
    assert!((1..=2).contains(&once), "{:?}", asked.lock().unwrap());
    assert!(fetched("openai/clip-vit-large-patch14/resolve/main/model.safetensors") > 0);
    let run = difflora_with(&env, &["models", "list"]);
    assert!(
        run.stdout.lines().any(|line| line.starts_with("hyperlora ") && line.contains("whole")),
        "{}",
        run.stdout
    );
}

#[test]
fn a_face_encoder_is_fetched_after_its_licence_and_held_against_its_checksum() {
    let (home, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(files.path().join("glintr100.onnx"), "not the real one").unwrap();
    let (address, asked) = hub(files.path().to_path_buf(), None);
    let env = [("HF_HOME", text(home.path())), ("HF_ENDPOINT", address.as_str()), ("HF_HUB_CACHE", "")];
    let run = difflora_with(&env, &["models", "pull", "auraface"]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    assert!(run.stderr.contains("Apache-2.0"), "{}", run.stderr);
    assert!(run.stderr.contains("glintr100.onnx") && run.stderr.contains("SHA-256"), "{}", run.stderr);
    let asked = asked.lock().unwrap();
    assert!(
        asked.iter().any(|line| line.contains("/fal/AuraFace-v1/resolve/main/glintr100.onnx")),
        "{asked:?}"
    );
}

#[test]
fn a_mirror_is_asked_where_the_hub_fails_and_is_sent_no_token() {
    let home = tempfile::tempdir().unwrap();
    let (broken, _) = hub(golden("folder"), Some(404));
    let (mirror, asked) = hub(golden("folder"), None);
    let env = [
        ("HF_HOME", text(home.path())),
        ("HF_ENDPOINT", broken.as_str()),
        ("HF_TOKEN", "secret"),
        ("HF_HUB_CACHE", ""),
    ];
    let pull = |more: &[&str]| difflora_with(&env, &[&["models", "pull", "owner/name"], more].concat());
    assert_ne!(pull(&[]).code, 0);
    let run = pull(&["--mirror", &broken, &mirror]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(run.stderr.matches("; asking `").count(), 2, "{}", run.stderr);
    let requests = asked.lock().unwrap().clone();
    assert!(
        !requests.is_empty() && requests.iter().all(|request| !request.contains("secret")),
        "{requests:?}"
    );
    assert_eq!(pull(&["--mirror", "hf-mirror.com"]).code, 2);
}
