//! Prompts in A1111's syntax, and LoRAs that they call.

use std::fs;
use std::path::Path;

use crate::{Run, difflora};

fn generate(arguments: &[&str], out: &Path) -> Run {
    let out = out.to_str().unwrap();
    difflora(&[&["gen", "--steps", "2", "--no-metadata", "--out", out], arguments].concat())
}

/// The image that these arguments give, and what is said.
fn image(arguments: &[&str]) -> (Vec<u8>, String) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("image.png");
    let run = generate(arguments, &out);
    assert_eq!(run.code, 0, "{arguments:?}: {}", run.stderr);
    (fs::read(out).unwrap(), run.stderr)
}

#[test]
fn brackets_weigh_words_and_plain_reads_them_as_text() {
    let (unweighted, said) = image(&["--prompt", "a photo of a person, smiling"]);
    assert!(!said.contains("weight"), "{said}");
    let (weighted, said) = image(&["--prompt", "a photo of a person, (smiling:1.3)"]);
    assert!(said.contains("`smiling` has the weight 1.30"), "{said}");
    assert!(weighted != unweighted);
    // Escaped brackets are the same text as brackets in the plain syntax.
    let (escaped, said) = image(&["--prompt", "a photo of a person, \\(smiling\\)"]);
    assert!(!said.contains("weight"), "{said}");
    let (plain, said) = image(&["--prompt", "a photo of a person, (smiling)", "--prompt-syntax", "plain"]);
    assert!(!said.contains("weight"), "{said}");
    assert!(escaped == plain && plain != weighted);
    let (_, said) = image(&["--prompt", "a [man:woman:0.5] AND __hair__"]);
    assert!(said.contains("prompt editing") && said.contains("AND") && said.contains("wildcards"), "{said}");
}

#[test]
fn long_prompts_go_on_in_chunks() {
    let long = "a photo of a person wearing glasses, ".repeat(12);
    let (whole, said) = image(&["--prompt", &long, "--negative-prompt", "red hat"]);
    assert!(!said.contains("left out"), "{said}");
    let (cut, said) = image(&["--prompt", &long, "--negative-prompt", "red hat", "--prompt-syntax", "plain"]);
    assert!(said.contains("left out"), "{said}");
    assert!(whole != cut);
}

#[test]
fn prompts_call_loras_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (inner, me) = (folder.path().join("people"), folder.path().join("people/me.safetensors"));
    fs::create_dir(&inner).unwrap();
    let seed = ["gen", "--ref", "tests/data/astronaut.png", "--lora-out", me.to_str().unwrap()];
    assert_eq!(difflora(&seed).code, 0);
    let dir = ["--lora-dir", folder.path().to_str().unwrap()];
    let prompt = "a photo of a person, smiling";
    let with = |prompt: &str, rest: &[&str]| image(&[&["--prompt", prompt], rest].concat()).0;
    let weighted = format!("{}:0.8", me.display());
    let option = with(prompt, &["--lora", &weighted]);
    assert!(option != with(prompt, &[]));
    for tagged in [
        &format!("{prompt} <lora:me:0.8>"),
        &format!("<lora:me:0.8:0.8>{prompt}"),
        &format!("{prompt}<lora:me:te=0.8>"),
    ] {
        assert!(with(tagged, &dir) == option, "{tagged}");
    }
    // A file of --lora is called by its name as well, with the tag's weight, and not applied twice.
    let tagged = format!("{prompt} <lora:me:0.8>");
    assert!(with(&tagged, &["--lora", me.to_str().unwrap()]) == option);
    let other = with(&format!("{prompt} <lora:me:0.1:0.9>"), &dir);
    assert!(other == with(prompt, &["--lora", &format!("{}:te=0.1,unet=0.9", me.display())]));

    let out = folder.path().join("never.png");
    for (prompt, words) in [
        ("a <lora:nobody:1>", "there is no `nobody.safetensors`"),
        ("a <lora:me:strong>", "`<lora:me:strong>`"),
        ("a <lora:../people/me>", "there is no"),
    ] {
        let run = generate(&[&["--prompt", prompt], &dir[..]].concat(), &out);
        assert!(run.code == 2 && run.stderr.contains(words), "{}", run.stderr);
    }
    let two = ["--prompt", "a <lora:me>", "b", "--lora-dir", dir[1]];
    let run = generate(&two, &folder.path().join("images/"));
    assert!(run.code == 2 && run.stderr.contains("different LoRAs"), "{}", run.stderr);
    // The image's metadata hold the tag once.
    let run = difflora(&[
        "gen",
        "--steps",
        "1",
        "--json",
        "--prompt",
        &tagged,
        dir[0],
        dir[1],
        "--out",
        out.to_str().unwrap(),
    ]);
    let bytes = fs::read(&out).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    assert!(run.code == 0 && text.matches("<lora:me:0.8>").count() == 1, "{}", run.stderr);
}
