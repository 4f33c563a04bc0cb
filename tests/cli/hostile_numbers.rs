//! Every number in every settings file and model config is replaced by numbers that nothing is built with.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device};
use difflora::hypernet::Hypernet;
use difflora::recipes::base::config::Settings as BaseSettings;
use difflora::recipes::dreambooth::config::Settings as LoraSettings;
use difflora::recipes::encoder::config::Settings as EncoderSettings;
use difflora::recipes::hypernet_config::HypernetTrainConfig;
use difflora::recipes::lae::config::Sweep;
use difflora::recipes::lora_dataset::DatasetSettings;
use difflora::sdxl::counts;
use difflora::sdxl::loader::SdxlLoader;
use difflora::sdxl::text::ClipTextConfig;
use difflora::sdxl::unet::UNetConfig;
use difflora::sdxl::vae::VaeConfig;
use difflora::weights::model_folder::ModelFiles;
use difflora::{limits, registry};
use serde_json::{Value, json};

/// Places of the numbers in a tree, as JSON pointers; of lists of equal items the first.
fn numbers(tree: &Value, place: &str, found: &mut Vec<String>) {
    match tree {
        Value::Number(_) => found.push(place.to_string()),
        Value::Array(items) => {
            items.iter().take(1).for_each(|item| numbers(item, &format!("{place}/0"), found))
        }
        Value::Object(items) => {
            items.iter().for_each(|(key, item)| numbers(item, &format!("{place}/{key}"), found));
        }
        _ => {}
    }
}

/// Runs `open`; the error's text, if any.
///
/// # Panics
/// When `open` does.
fn outcome(what: &str, open: impl FnOnce() -> Result<()>) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(open)) {
        Ok(done) => done.err().map(|error| format!("{error:#}")),
        Err(_) => panic!("{what}: a panic"),
    }
}

/// Replaces each number of a TOML file and reads it.
fn spoil_toml(file: &str, read: impl Fn(&Path) -> Result<()>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.toml");
    let text = fs::read_to_string(file).unwrap();
    let whole: Value = serde_json::to_value(toml::from_str::<toml::Table>(&text).unwrap()).unwrap();
    let mut places = Vec::new();
    numbers(&whole, "", &mut places);
    assert!(!places.is_empty(), "{file}");
    for place in places {
        for value in ["0", "-1", "nan", "inf", "2147483648", "9223372036854775807"] {
            let mut changed = whole.clone();
            *changed.pointer_mut(&place).unwrap() = json!("REPLACED");
            let changed = toml::to_string(&changed).unwrap().replace("\"REPLACED\"", value);
            fs::write(&path, changed).unwrap();
            let what = format!("{file} {place} = {value}");
            let error = outcome(&what, || read(&path));
            let key = place.rsplit('/').find(|key| key.parse::<u64>().is_err()).unwrap();
            let allowed = ["0", "-1"].contains(&value) || (key == "seed" && value.parse::<u64>().is_ok());
            if !allowed {
                let error = error.unwrap_or_else(|| panic!("{what} is taken"));
                assert!(error.contains(key), "{what}: {error}");
            }
        }
    }
}

#[test]
fn settings_files() {
    let lora = |path: &Path| {
        LoraSettings::read(Some(path), "tiny", toml::Table::new()).and_then(|settings| settings.check())
    };
    for entry in fs::read_dir("configs").unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let file = format!("configs/{name}");
        let read = |path: &Path| match name.split('-').next().unwrap() {
            "base" => limits::read_toml::<BaseSettings>(path).map(drop),
            "dataset" => limits::read_toml::<DatasetSettings>(path).map(drop),
            "encoder" => limits::read_toml::<EncoderSettings>(path).map(drop),
            "hypernet" => HypernetTrainConfig::read(path).map(drop),
            "lae" => limits::read_toml::<Sweep>(path).map(drop),
            "train" => lora(path),
            other => panic!("{other}: which settings are these?"),
        };
        read(Path::new(&file)).unwrap();
        spoil_toml(&file, read);
    }
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

/// Replaces each number of a JSON config in `folder` and opens the folder.
fn spoil_json(folder: &Path, file: &str, open: impl Fn() -> Result<()>) {
    open().unwrap();
    let path = folder.join(file);
    let text = fs::read_to_string(&path).unwrap();
    let whole: Value = serde_json::from_str(&text).unwrap();
    let mut places = Vec::new();
    numbers(&whole, "", &mut places);
    for place in places {
        for value in [json!(0), json!(-1), json!(1u64 << 31), json!(i64::MAX), json!(1e300)] {
            let mut changed = whole.clone();
            *changed.pointer_mut(&place).unwrap() = value.clone();
            fs::write(&path, changed.to_string()).unwrap();
            let what = format!("{file} {place} = {value}");
            let error = outcome(&what, &open);
            if value.as_f64().unwrap() > 1.0 {
                assert!(error.is_some_and(|error| error.contains(file)), "{what} is taken");
            }
        }
    }
    fs::write(&path, text).unwrap();
}

/// Counts and opens all parts of a base.
fn open_base(folder: &Path) -> Result<()> {
    let files = ModelFiles::folder(folder)?;
    let unet: UNetConfig = files.config("unet/config.json")?;
    let vae: VaeConfig = files.config("vae/config.json")?;
    let side = unet.sample_size as u64;
    counts::unet(&unet, [side, side], 77).map_err(|error| files.unusable("unet/config.json", error))?;
    counts::vae(&vae, [64, 64]).map_err(|error| files.unusable("vae/config.json", error))?;
    for part in ["text_encoder", "text_encoder_2"] {
        let file = format!("{part}/config.json");
        let config: ClipTextConfig = files.config(&file)?;
        counts::text_encoder(&config, 77).map_err(|error| files.unusable(&file, error))?;
    }
    let model = SdxlLoader::open(&files, DType::F32, &Device::Cpu)?;
    model.skeleton()?;
    model.load_text()?;
    model.load_unet()?;
    model.load_vae().map(drop)
}

#[test]
fn model_configs() {
    let folder = tempfile::tempdir().unwrap();
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/single_file/folder");
    copy_folder(&golden, folder.path());
    for file in [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "scheduler/scheduler_config.json",
    ] {
        spoil_json(folder.path(), file, || open_base(folder.path()));
    }
}

#[test]
fn hypernetwork_configs() {
    let folder = tempfile::tempdir().unwrap();
    let built_in = registry::find_hypernet("tiny", true).unwrap();
    for file in ["config.json", "lae.safetensors", "dit.safetensors", "stats.safetensors"] {
        fs::write(folder.path().join(file), built_in.read(file).unwrap()).unwrap();
    }
    spoil_json(folder.path(), "config.json", || {
        Hypernet::open(&ModelFiles::folder(folder.path())?, &Device::Cpu).map(drop)
    });
}

/// The settings of `configs/FILE` with some numbers replaced, by `table.key`.
fn changed(folder: &Path, file: &str, numbers: &[(&str, &str)]) -> PathBuf {
    let mut whole: toml::Table =
        toml::from_str(&fs::read_to_string(format!("configs/{file}")).unwrap()).unwrap();
    for (place, value) in numbers {
        let (tables, key) = place.rsplit_once('.').unwrap_or(("", place));
        let tables = tables.split('.').filter(|name| !name.is_empty());
        let table = tables.fold(&mut whole, |table, name| table[name].as_table_mut().unwrap());
        let value: toml::Table = toml::from_str(&format!("value = {value}")).unwrap();
        table.insert((*key).into(), value["value"].clone());
    }
    let path = folder.join(file);
    fs::write(&path, toml::to_string(&whole).unwrap()).unwrap();
    path
}

/// Numbers within their bounds that together need more memory than any machine has: refused before it is taken, with a
/// setting to lower. Each alone is taken.
#[test]
fn products_of_numbers_are_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let few = [("people.train", "3"), ("people.held_out", "1"), ("recipe.steps", "1"), ("basis.steps", "1")];
    type Case<'a> = (&'a [&'a str], &'a str, Vec<(&'a str, &'a str)>, &'a str);
    let cases: Vec<Case> = vec![
        (
            &["build-dataset"],
            "dataset-tiny.toml",
            vec![("images.scenes", "4096"), ("images.size", "1024")],
            "images.scenes",
        ),
        (
            &["build-dataset"],
            "dataset-tiny.toml",
            vec![("basis.people", "65536"), ("recipe.batch", "65536")],
            "basis.people",
        ),
        (
            &["build-dataset"],
            "dataset-tiny.toml",
            vec![("people_per_batch", "1024"), ("images.scenes", "4096"), ("images.size", "256")],
            "images.scenes",
        ),
        (
            &["train-encoder", "--kind", "judge"],
            "encoder-tiny.toml",
            vec![("judge.plan.batch", "65536"), ("judge.model.image_size", "8192")],
            "its sizes",
        ),
        (
            &["train-encoder", "--kind", "judge"],
            "encoder-tiny.toml",
            vec![("judge.model.channels", "[65536, 65536]"), ("judge.model.hidden", "65536")],
            "its sizes",
        ),
        (
            &["train-encoder", "--kind", "image"],
            "encoder-tiny.toml",
            vec![("image.plan.batch", "65536"), ("image.model.image_size", "8192")],
            "image_size",
        ),
        (
            &["train-encoder", "--kind", "image"],
            "encoder-tiny.toml",
            vec![("image.model.hidden_size", "65535"), ("image.model.intermediate_size", "1000000")],
            "its sizes",
        ),
        (
            &["train-base", "--stage", "vae"],
            "base-tiny.toml",
            vec![("vae.plan.batch", "65536"), ("images.size", "1024"), ("images.people", "1")],
            "images.size",
        ),
        (
            &["train-base", "--stage", "vae"],
            "base-tiny.toml",
            vec![
                ("vae.model.block_out_channels", "[65536, 65536, 65536]"),
                ("vae.model.layers_per_block", "64"),
            ],
            "images.size",
        ),
    ];
    for (command, file, numbers, lower) in cases {
        let config = changed(
            folder.path(),
            file,
            &[&few[..if command[0] == "build-dataset" { 4 } else { 0 }], &numbers[..]].concat(),
        );
        let out = at("out");
        let run =
            crate::difflora(&[command, &["--config", config.to_str().unwrap(), "--out", &out]].concat());
        assert_eq!(run.code, 2, "{command:?} {numbers:?}: {}", run.stderr);
        let said = run.stderr.contains(lower) && run.stderr.contains("GB of memory");
        assert!(said && !run.stderr.contains("panicked"), "{command:?} {numbers:?}: {}", run.stderr);
        let _ = fs::remove_dir_all(out);
    }
    // The UNet's latents, with a VAE of the settings.
    let settings: BaseSettings = limits::read_toml(&changed(
        folder.path(),
        "base-tiny.toml",
        &[("images.people", "1000000"), ("images.each", "1000")],
    ))
    .unwrap();
    let error = settings.check_latents(&settings.vae.model).unwrap_err().to_string();
    assert!(error.contains("images.each"), "{error}");
    let small: BaseSettings = limits::read_toml(Path::new("configs/base-tiny.toml")).unwrap();
    small.check_latents(&small.vae.model).unwrap();
    small.check_images().unwrap();
}

#[test]
fn a_batch_of_large_images_is_refused_by_train_lora() {
    let folder = tempfile::tempdir().unwrap();
    let (people, out) = (folder.path().join("p"), folder.path().join("a.safetensors"));
    let [people, out] = [&people, &out].map(|path| path.to_str().unwrap());
    assert_eq!(crate::difflora(&["portraits", "--people", "1", "--images", "1", "--out", people]).code, 0);
    let person = format!("{people}/person-0001");
    let run =
        crate::difflora(&["train-lora", &person, "--out", out, "--batch", "1024", "--resolution", "8192"]);
    assert!(run.code == 2 && run.stderr.contains("--resolution"), "{}", run.stderr);
}
