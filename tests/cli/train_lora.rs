//! `difflora train-lora` as a user meets it, on painted people with the built-in base.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use difflora::image::Image;
use difflora::lora::adapter::{AdapterFile, AdapterKind};
use difflora::lora::file;
use difflora::lora::ldm_keys::BlockLayout;
use tempfile::TempDir;

use crate::difflora;
use crate::difflora_with;

/// Three people with three images each, painted once a test.
struct World {
    folder: TempDir,
}

impl World {
    fn new(people: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run = difflora(&[
            "portraits",
            "--people",
            &people.to_string(),
            "--images",
            "3",
            "--seed",
            "7",
            "--size",
            "64",
            "--out",
            text(&folder.path().join("people")),
        ]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        Self { folder }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn person(&self, number: usize) -> PathBuf {
        self.at(&format!("people/person-{number:04}"))
    }

    /// Trains person 1 into NAME.safetensors with a few cheap steps, and `more`.
    fn train(&self, name: &str, more: &[&str]) -> crate::Run {
        self.train_with(&[], name, more)
    }

    fn train_with(&self, environment: &[(&str, &str)], name: &str, more: &[&str]) -> crate::Run {
        let (person, out) = (self.person(1), self.at(&format!("{name}.safetensors")));
        let mut arguments = vec!["train-lora", text(&person), "--out", text(&out)];
        for (option, value) in [("--steps", "3"), ("--batch", "1"), ("--rank", "1")] {
            if !more.contains(&option) {
                arguments.extend([option, value]);
            }
        }
        arguments.extend(more);
        difflora_with(environment, &arguments)
    }

    fn lora(&self, name: &str) -> AdapterFile {
        // The built-in base has three levels of one layer.
        file::read_adapters(&self.at(&format!("{name}.safetensors")), &BlockLayout::uniform(3, 1)).unwrap()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The largest difference of two LoRAs' factors, as a part of the largest factor.
fn apart(a: &AdapterFile, b: &AdapterFile) -> f32 {
    assert_eq!(a.modules.keys().collect::<Vec<_>>(), b.modules.keys().collect::<Vec<_>>());
    let values = |changes: &AdapterFile| -> Vec<f32> {
        let factors = changes.modules.values().map(|change| match &change.kind {
            AdapterKind::LowRank { down, up, .. } => {
                [down, up].map(|x| x.flatten_all().unwrap().to_vec1().unwrap()).concat()
            }
            _ => panic!("a LoRA has two factors"),
        });
        factors.flatten().collect()
    };
    let (a, b) = (values(a), values(b));
    let largest = a.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    a.iter().zip(&b).fold(0f32, |far, (a, b)| far.max((a - b).abs())) / largest
}

/// Starts a training and sends `signal` once a checkpoint is there; gives the exit code, none for a kill.
fn stop(world: &World, name: &str, options: &[&str], signal: &str) -> Option<i32> {
    let checkpoint = world.at(&format!("{name}.training/lora.checkpoint.safetensors"));
    let (person, out) = (world.person(1), world.at(&format!("{name}.safetensors")));
    let mut child: Child = Command::new(env!("CARGO_BIN_EXE_difflora"))
        .args(["train-lora", text(&person), "--out", text(&out), "--quiet"])
        .args(options)
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !checkpoint.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no checkpoint appears");
        assert!(child.try_wait().unwrap().is_none(), "the training ended before it could be stopped");
        std::thread::sleep(Duration::from_millis(5));
    }
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let status = child.wait().unwrap();
    assert!(!out.exists(), "it was stopped before its end");
    status.code()
}

#[cfg(unix)]
#[test]
fn a_run_that_was_stopped_and_goes_on_ends_in_the_same_bytes() {
    let world = World::new(1);
    let options = [
        "--steps",
        "80",
        "--batch",
        "1",
        "--rank",
        "1",
        "--checkpoint-every",
        "3",
        "--flip",
        "--colour",
        "0.1",
        "--accumulate",
        "2",
        "--clip",
        "1",
        "--ema",
        "0.9",
    ];
    let whole = world.train("whole", &options[..]);
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    for (name, signal, code) in [
        ("killed", "-KILL", None),
        ("interrupted", "-INT", Some(130)),
        ("terminated", "-TERM", Some(143)),
        ("hung-up", "-HUP", Some(129)),
    ] {
        assert_eq!(stop(&world, name, &options, signal), code);
        let more = [&options[..], &["--resume"]].concat();
        let run = world.train(name, &more);
        assert_eq!(run.code, 0, "{}", run.stderr);
        // The file's name stands in its metadata.
        let read =
            |name: &str| fs::read(world.at(&format!("{name}.training/lora.checkpoint.safetensors"))).unwrap();
        assert_eq!(tensor_bytes(&read(name)), tensor_bytes(&read("whole")), "{name}");
        assert_eq!(apart(&world.lora(name), &world.lora("whole")), 0.0);
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_checkpoint_and_does_not_end_the_run() {
    let world = World::new(1);
    let options = ["--steps", "40", "--batch", "1", "--rank", "4", "--checkpoint-every", "3"];
    assert_eq!(stop(&world, "full", &options, "-KILL"), None);
    let checkpoint = world.at("full.training/lora.checkpoint.safetensors");
    let before = fs::read(&checkpoint).unwrap();
    // Files may grow to half a checkpoint: a LoRA fits, a state does not. The signal is ignored, so that writing fails.
    let blocks = before.len() / 1024 / 2;
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    let (person, out) = (world.person(1), world.at("full.safetensors"));
    let output = Command::new("bash")
        .args(["-c", &script, "bash", env!("CARGO_BIN_EXE_difflora")])
        .args(["train-lora", text(&person), "--out", text(&out), "--resume"])
        .args(options)
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("the checkpoint before it is kept"), "{stderr}");
    assert!(fs::read(&checkpoint).unwrap() == before && out.exists());
    assert_eq!(world.train("full", &[&options[..], &["--resume"]].concat()).code, 0);
}

/// The bytes behind the header, whose order of entries may change.
fn tensor_bytes(file: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let tensors = safetensors::SafeTensors::deserialize(file).unwrap();
    tensors.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect()
}

#[test]
fn many_people_at_once_are_as_each_alone() {
    let world = World::new(3);
    // Adam divides a gradient by its own size. Where it should be zero and is a rounding error, that would make a whole
    // step of it, in one direction alone and in another together; an ε above such errors keeps them small.
    let config = world.at("run.toml");
    fs::write(&config, "[training]\neps = 1e-6").unwrap();
    let options = [
        "--config",
        text(&config),
        "--steps",
        "4",
        "--batch",
        "2",
        "--rank",
        "2",
        "--seed",
        "5",
        "--clip",
        "0.5",
        "--ema",
        "0",
    ];
    let (people, out) = (world.at("people"), world.at("loras"));
    let many = |more: &[&str]| {
        let mut arguments = vec!["train-lora", "--many", text(&people), "--out", text(&out), "--json"];
        arguments.extend(options);
        arguments.extend(more);
        difflora(&arguments)
    };
    // Two share a pass; the third takes the first seat that is free, in a pass of its own.
    let run = many(&["--people-per-batch", "2"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    for number in 1..=3 {
        let (images, alone) = (world.person(number), world.at("alone.safetensors"));
        let mut arguments = vec!["train-lora", text(&images), "--out", text(&alone)];
        arguments.extend(options);
        assert_eq!(difflora(&arguments).code, 0);
        let together = file::read_adapters(
            &out.join(format!("person-{number:04}.safetensors")),
            &BlockLayout::uniform(3, 1),
        );
        let far = apart(&together.unwrap(), &world.lora("alone"));
        assert!(far <= 1e-5, "person {number} is {far} apart");
    }
    // What is done is not done again, and groups in threads of their own give the same.
    let first = out.join("person-0001.safetensors");
    let before = fs::metadata(&first).unwrap().modified().unwrap();
    fs::remove_file(out.join("person-0002.safetensors")).unwrap();
    fs::remove_dir_all(out.join("person-0002.training")).unwrap();
    let run = many(&["--people-per-batch", "1", "--groups", "2", "--resume"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(fs::metadata(&first).unwrap().modified().unwrap(), before);
    assert!(out.join("person-0002.safetensors").exists());
}

#[test]
fn who_fails_does_not_stop_the_others_and_everybody_has_steps_of_its_own() {
    let world = World::new(3);
    fs::write(world.person(1).join("0001.txt"), b"caf\xe9").unwrap();
    fs::remove_file(world.person(3).join("0003.png")).unwrap();
    let (people, out) = (world.at("people"), world.at("loras"));
    let run = difflora(&[
        "train-lora",
        "--many",
        text(&people),
        "--out",
        text(&out),
        "--steps-per-image",
        "2",
        "--batch",
        "1",
    ]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("person-0001") && run.stderr.contains("UTF-8"), "{}", run.stderr);
    for (person, steps) in [("person-0002", "6"), ("person-0003", "4")] {
        let lora =
            file::read_adapters(&out.join(format!("{person}.safetensors")), &BlockLayout::uniform(3, 1));
        assert_eq!(lora.unwrap().metadata["ss_steps"], steps);
    }
}

#[test]
fn settings_come_from_flag_environment_file_and_preset_in_this_order() {
    let world = World::new(1);
    let config = world.at("run.toml");
    fs::write(&config, "seed = 3\n[training]\nlr = 1e-4\nwarmup = 1\n[lora]\ntargets = \"attn+ff\"").unwrap();
    let environment = [("DIFFLORA_LR", "2e-4"), ("DIFFLORA_SEED", "4")];
    let run = world.train_with(&environment, "one", &["--config", text(&config), "--seed", "5"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let written = fs::read_to_string(world.at("one.training/settings.toml")).unwrap();
    let settings: toml::Table = toml::from_str(&written).unwrap();
    assert_eq!(settings["seed"].as_integer(), Some(5));
    assert_eq!(settings["training"]["lr"].as_float(), Some(2e-4));
    assert_eq!(settings["training"]["warmup"].as_integer(), Some(1));
    assert_eq!(settings["lora"]["targets"].as_str(), Some("attn-ff"));
    assert_eq!(settings["pictures"]["class_word"].as_str(), Some("person"));
    fs::write(&config, "[training]\nlearning_rate = 1e-4").unwrap();
    let run = world.train("one", &["--config", text(&config)]);
    assert_eq!(run.code, 4);
    assert!(run.stderr.contains("learning_rate"), "{}", run.stderr);
    // What was written is a configuration too.
    let run = world.train("one", &["--config", text(&world.at("one.training/settings.toml"))]);
    assert_eq!(run.code, 0, "{}", run.stderr);
}

#[test]
fn a_state_of_other_settings_is_refused_with_what_differs() {
    let world = World::new(1);
    assert_eq!(world.train("one", &[]).code, 0);
    fs::remove_file(world.person(1).join("0002.png")).unwrap();
    let run = world.train("one", &["--resume", "--lr", "0.5"]);
    assert_eq!(run.code, 2);
    for words in ["training.lr: 0.003, now 0.5", "pictures.count: 3, now 2"] {
        assert!(run.stderr.contains(words), "{}", run.stderr);
    }
}

#[test]
fn bad_input_is_named() {
    let world = World::new(1);
    let person = world.person(1);
    let empty = world.at("empty");
    fs::create_dir(&empty).unwrap();
    let out = world.at("bad.safetensors");
    let run = difflora(&["train-lora", text(&empty), "--out", text(&out)]);
    assert_eq!(run.code, 4);
    assert!(run.stderr.contains("no image in this folder"), "{}", run.stderr);
    for (options, words) in [
        (&["--rank", "100"][..], "rank 100 does not fit the layer"),
        (&["--rank", "0"], "rank is 0"),
        (&["--lr=-1"], "lr must be above 0"),
        (&["--config", "no-such-preset"], "presets are tiny, sdxl-dreambooth"),
        (&["--num-class-images", "2"], "--class-images DIR"),
        (&["--resolution", "63"], "multiples of"),
    ] {
        let mut arguments = vec!["train-lora", text(&person), "--out", text(&out), "--steps", "1"];
        arguments.extend(options);
        let run = difflora(&arguments);
        assert_eq!(run.code, 2, "{}", run.stderr);
        assert!(run.stderr.contains(words), "{}", run.stderr);
    }
    // Before class images are drawn, which takes long.
    let class = world.at("class");
    let class_images = ["--class-images", text(&class), "--rank", "100"];
    let run = difflora(&[&["train-lora", text(&person), "--out", text(&out)][..], &class_images].concat());
    assert!(run.code == 2 && !class.exists(), "{}", run.stderr);
    // An image that cannot be read is named and left out; few images and missing faces are warned of.
    fs::write(person.join("0001.png"), b"no image").unwrap();
    Image::filled(64, 64, [90, 120, 90]).save(&person.join("0002.png"), None).unwrap();
    let run = world.train("poor", &["--steps", "1"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    for words in ["0001.png", "only 2 images", "no face is found in"] {
        assert!(run.stderr.contains(words), "{words}: {}", run.stderr);
    }
    fs::write(person.join("0003.txt"), b"caf\xe9").unwrap();
    let run = world.train("bad", &[]);
    assert_eq!(run.code, 4);
    assert!(run.stderr.contains("0003.txt") && run.stderr.contains("byte 4 is not UTF-8"), "{}", run.stderr);
}

#[test]
fn a_learning_rate_that_explodes_stops_with_advice_and_keeps_a_good_state() {
    let world = World::new(1);
    let options = ["--steps", "200", "--lr", "50", "--warmup", "200", "--checkpoint-every", "1"];
    let run = world.train("hot", &options);
    assert_eq!(run.code, 1);
    assert!(
        run.stderr.contains("times the weights") && run.stderr.contains("try a tenth of it"),
        "{}",
        run.stderr
    );
    assert!(!world.at("hot.safetensors").exists());
    // The state before is there and is taken up; it runs away again.
    assert!(run.stderr.contains("the last good state is kept in"), "{}", run.stderr);
    let again = world.train("hot", &[&options[..], &["--resume"]].concat());
    assert_eq!(again.code, 1);
    assert_eq!(again.stderr, run.stderr);
}

#[test]
fn class_images_are_drawn_once_and_count() {
    let world = World::new(1);
    let class = world.at("class");
    let options = ["--class-images", text(&class), "--num-class-images", "2"];
    assert_eq!(world.train("with", &options).code, 0);
    let drawn = class.join("class-00001.png");
    let before = fs::read(&drawn).unwrap();
    fs::remove_file(class.join("class-00002.png")).unwrap();
    assert_eq!(world.train("again", &options).code, 0);
    assert!(fs::read(&drawn).unwrap() == before && class.join("class-00002.png").exists());
    assert_eq!(apart(&world.lora("with"), &world.lora("again")), 0.0);
    assert_eq!(world.train("without", &[]).code, 0);
    assert!(apart(&world.lora("with"), &world.lora("without")) > 1e-3);
}

#[test]
fn text_encoders_and_convolutions_are_written_with_all_that_other_programs_read() {
    let world = World::new(1);
    let run = world.train(
        "all",
        &["--targets", "conv", "--text-encoders", "--trigger", "sks", "--sample-every", "2", "--freeze-a"],
    );
    assert_eq!(run.code, 0, "{}", run.stderr);
    let lora = world.lora("all");
    let kernels = |change: &difflora::lora::adapter::Adapter| matches!(&change.kind, AdapterKind::LowRank { down, .. } if down.rank() == 4);
    assert!(lora.modules["down_blocks.0.resnets.0.conv1"].kind_name() == "LoCon");
    assert!(lora.modules.values().any(kernels));
    for part in ["text_encoder.", "text_encoder_2."] {
        assert!(lora.modules.keys().any(|path| path.starts_with(part)), "{part}");
    }
    for (key, value) in [
        ("ss_network_module", "networks.lora"),
        ("ss_network_dim", "1"),
        ("ss_network_args", r#"{"conv_alpha":"1","conv_dim":"1"}"#),
        ("ss_base_model_version", "sdxl_base_v1-0"),
        ("ss_resolution", "(128, 128)"),
        ("ss_num_epochs", "1"),
        ("ss_num_train_images", "3"),
        ("ss_tag_frequency", ""),
        ("modelspec.trigger_phrase", "sks person"),
        ("difflora.down", "frozen"),
        ("difflora.down_seed", "0"),
    ] {
        let found = lora.metadata.get(key).unwrap_or_else(|| panic!("{key} is missing"));
        assert!(value.is_empty() || found == value, "{key} is {found}");
    }
    let sheet = Image::open(&world.at("all.training/samples/step-000002.png")).unwrap();
    assert!(sheet.width > 4 * 128 && sheet.height > 128);
    let image = world.at("drawn.png");
    let file = world.at("all.safetensors");
    let run = difflora(&[
        "gen",
        "--prompt",
        "a photo of a person",
        "--lora",
        text(&file),
        "--steps",
        "2",
        "--out",
        text(&image),
    ]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    // With the same seed another person's frozen `down`s are the same.
    assert_eq!(
        world.train("other", &["--targets", "attn", "--freeze-a", "--template", "a {} there"]).code,
        0
    );
    let other = world.lora("other");
    let down = |changes: &AdapterFile, path: &str| match &changes.modules[path].kind {
        AdapterKind::LowRank { down, .. } => down.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        _ => panic!("a LoRA has two factors"),
    };
    for path in other.modules.keys() {
        assert_eq!(down(&other, path), down(&lora, path), "{path}");
    }
}

#[test]
fn images_of_any_proportions_are_trained_on() {
    let world = World::new(1);
    let person = world.person(1);
    let image = Image::open(&person.join("0001.png")).unwrap();
    image.crop(0, 8, 64, 48).save(&person.join("0001.png"), None).unwrap();
    image.crop(10, 0, 44, 64).save(&person.join("0002.png"), None).unwrap();
    for (name, options) in [
        ("buckets", &["--crop", "buckets", "--flip"][..]),
        ("random", &["--crop", "random", "--flip", "--colour", "0.2"]),
        ("center", &["--crop", "center", "--dtype", "f16", "--loss-scale", "64"]),
        ("offset", &["--noise-offset", "0.1", "--timesteps", "uniform", "--min-snr-gamma", "5"]),
    ] {
        let run = world.train(name, &[options, &["--batch", "2", "--steps", "4"]].concat());
        assert_eq!(run.code, 0, "{name}: {}", run.stderr);
    }
    let buckets = &world.lora("buckets").metadata["ss_bucket_info"];
    assert!(buckets.contains("[144,112]") && buckets.contains("[104,152]"), "{buckets}");
}

#[test]
fn a_folder_in_the_layout_of_sd_scripts_gives_trigger_and_captions() {
    let world = World::new(1);
    let images = world.at("images");
    let inside = images.join("10_sks woman");
    fs::create_dir_all(&inside).unwrap();
    for (name, number) in [("a", 1), ("b", 2), ("b-masklabel", 3)] {
        let from = world.person(1).join(format!("{number:04}.png"));
        fs::copy(from, inside.join(format!("{name}.png"))).unwrap();
    }
    fs::write(inside.join("b.caption"), "one line\nanother line\n").unwrap();
    // Written among the images, as users do: the second run must not train on the first one's sheets.
    let out = images.join("me.safetensors");
    let options = ["--steps", "2", "--batch", "1", "--rank", "1", "--sample-every", "2"];
    for _ in 0..2 {
        let run = difflora(&[&["train-lora", text(&images), "--out", text(&out)][..], &options].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.stderr.contains("2 used") && run.stderr.contains("skipped 1 masks"), "{}", run.stderr);
    }
    let metadata = file::read_adapters(&out, &BlockLayout::uniform(3, 1)).unwrap().metadata;
    assert_eq!(metadata["ss_num_train_images"], "2");
    assert_eq!(metadata["modelspec.trigger_phrase"], "sks woman");
    for caption in ["a photo of a sks woman", "one line", "another line"] {
        assert!(metadata["ss_tag_frequency"].contains(caption), "{}", metadata["ss_tag_frequency"]);
    }
}

#[test]
fn resuming_what_was_never_begun_and_an_output_in_use_are_refused() {
    let world = World::new(1);
    let run = world.train("new", &["--resume"]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(
        run.stderr.contains("there is no state") && run.stderr.contains("new.training"),
        "{}",
        run.stderr
    );
    let lock = difflora::files::FolderLock::acquire(&world.at("new.training")).unwrap();
    let run = world.train("new", &[]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains(&format!("process {}", std::process::id())), "{}", run.stderr);
    drop(lock);
    assert_eq!(world.train("new", &[]).code, 0);
}

#[test]
fn a_person_alone_and_many_people_do_not_write_one_lora_together() {
    let world = World::new(1);
    let (people, many) = (world.at("people"), world.at("many"));
    fs::create_dir(&many).unwrap();
    let together =
        ["train-lora", "--many", text(&people), "--out", text(&many), "--steps", "2", "--rank", "1"];
    let (person, out) = (world.person(1), many.join("person-0001.safetensors"));
    let alone = ["train-lora", text(&person), "--out", text(&out), "--steps", "2", "--rank", "1"];
    for (locked, arguments) in
        [(many.clone(), &alone[..]), (many.join("person-0001.training"), &together[..])]
    {
        let lock = difflora::files::FolderLock::acquire(&locked).unwrap();
        let run = difflora(arguments);
        let id = format!("process {}", std::process::id());
        assert!(run.code == 2 && run.stderr.contains(&id), "{}", run.stderr);
        drop(lock);
        assert_eq!(difflora(arguments).code, 0);
    }
}

#[cfg(unix)]
#[test]
fn an_interruption_says_how_to_continue() {
    let world = World::new(1);
    let (person, out) = (world.person(1), world.at("me.safetensors"));
    let checkpoint = world.at("me.training/lora.checkpoint.safetensors");
    let child = Command::new(env!("CARGO_BIN_EXE_difflora"))
        .args(["train-lora", text(&person), "--out", text(&out), "--quiet"])
        .args(["--steps", "100000", "--rank", "1", "--batch", "1", "--checkpoint-every", "1"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !checkpoint.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no checkpoint appears");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{said}");
    assert!(
        said.contains("interrupted by SIGTERM; the state after step ") && said.contains("--resume"),
        "{said}"
    );
}

#[test]
fn folders_of_systems_and_tables_of_captions_are_named() {
    let world = World::new(1);
    let person = world.person(1);
    for name in ["__MACOSX", "@eaDir", "$RECYCLE.BIN"] {
        fs::create_dir(person.join(name)).unwrap();
        fs::copy(person.join("0001.png"), person.join(name).join("0001.png")).unwrap();
    }
    fs::write(person.join("metadata.csv"), "file_name,text\n0001.png,a cat\n").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink("..", person.join("circle")).unwrap();
    let run = world.train("me", &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("3 image files found, 3 used"), "{}", run.stderr);
    for name in ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "metadata.csv"] {
        assert_eq!(run.stderr.matches(name).count(), 1, "{name}: {}", run.stderr);
    }
    #[cfg(unix)]
    assert_eq!(run.stderr.matches("circle").count(), 1, "{}", run.stderr);
}

#[test]
fn prompts_of_previews_are_read_as_those_of_gen() {
    let world = World::new(1);
    let sheet = |name: &str, prompt: &str| {
        let run = world.train(name, &["--steps", "1", "--sample-every", "1", "--sample-prompt", prompt]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        (fs::read(world.at(&format!("{name}.training/samples/step-000001.png"))).unwrap(), run.stderr)
    };
    let (plain, _) = sheet("plain", "a photo of a person, smiling");
    let (same, said) = sheet("same", "a photo of a person, smiling <lora:me:1>");
    assert!(plain == same && said.contains("<lora:me> in a preview's prompt is ignored"), "{said}");
    let (strong, _) = sheet("strong", "a photo of a person, (smiling:1.8)");
    assert!(plain != strong);
    let deep = "(".repeat(100) + "a" + &")".repeat(100);
    let run = world.train("deep", &["--sample-every", "1", "--sample-prompt", &deep]);
    assert!(run.code == 2 && run.stderr.contains("100 brackets"), "{}", run.stderr);
}
