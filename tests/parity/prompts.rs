//! Prompts in the syntaxes of A1111 and ComfyUI against their own code (`scripts/golden_prompts.py`).

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use difflora::lora::embedding::Embedding;
use difflora::named::Named;
use difflora::sdxl::prompt::{Piece, PromptSyntax, parse_a1111, parse_comfyui};
use difflora::sdxl::text::TextEncoders;
use difflora::weights::model_folder::ModelFiles;
use serde::Deserialize;

use super::golden::Golden;

#[derive(Deserialize)]
struct Case {
    syntax: String,
    prompt: String,
    pieces: Vec<(String, f64)>,
}

fn encoders() -> TextEncoders {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/pipeline/two");
    TextEncoders::open(&ModelFiles::folder(folder).unwrap(), DType::F32, &Device::Cpu).unwrap()
}

fn apart(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let norm = |x: &Tensor| f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
    norm(&(a - b).unwrap()) / norm(b)
}

/// Runs of equal weight joined, without those that are empty: ComfyUI leaves them apart.
fn joined(pieces: impl Iterator<Item = (String, f64)>) -> Vec<(String, f64)> {
    let mut all: Vec<(String, f64)> = Vec::new();
    for (text, weight) in pieces.filter(|(text, _)| !text.is_empty()) {
        match all.last_mut() {
            Some((before, same)) if (*same - weight).abs() < 1e-9 => before.push_str(&text),
            _ => all.push((text, weight)),
        }
    }
    all
}

#[test]
fn weighted_prompts_are_those_of_a1111_and_comfyui() {
    let (golden, text) = (Golden::open("prompts"), encoders());
    let cases: Vec<Case> = golden.json("cases");
    let mut weighted = 0;
    for (number, Case { syntax, prompt, pieces }) in cases.iter().enumerate() {
        let syntax = PromptSyntax::from_name(syntax).unwrap();
        let ours = if syntax == PromptSyntax::A1111 { parse_a1111(prompt) } else { parse_comfyui(prompt) };
        let ours = ours.into_iter().map(|piece| match piece {
            Piece::Text(text, weight) => (text, weight),
            Piece::Break => ("BREAK".to_string(), -1.0),
        });
        let (ours, theirs) = (joined(ours), joined(pieces.iter().cloned()));
        let same = |((a, v), (b, w)): (&(String, f64), &(String, f64))| a == b && (v - w).abs() < 1e-9;
        assert!(
            ours.len() == theirs.len() && ours.iter().zip(&theirs).all(same),
            "{prompt}: {ours:?} {theirs:?}"
        );
        weighted += usize::from(theirs.iter().any(|(_, weight)| *weight != 1.0));
        let encoded = text.encode(prompt, syntax).unwrap();
        let context = apart(&encoded.context, &golden.get(&format!("{number}.context")));
        let pooled = apart(&encoded.pooled, &golden.get(&format!("{number}.pooled")));
        // The mean that A1111 restores is close to zero, and its f32 sum in another order a little off.
        assert!(context < 1e-4 && pooled < 1e-5, "{syntax:?} `{prompt}`: {context:.1e} {pooled:.1e}");
    }
    assert!(weighted > 10, "{weighted}");
}

#[test]
fn plain_prompts_are_the_same_in_every_syntax() {
    let text = encoders();
    let prompt = "a photo of a person, smiling";
    let plain = text.encode(prompt, PromptSyntax::Plain).unwrap();
    for syntax in [PromptSyntax::A1111, PromptSyntax::Comfyui] {
        let other = text.encode(prompt, syntax).unwrap();
        assert_eq!(apart(&other.context, &plain.context), 0.0);
        assert_eq!(apart(&other.pooled, &plain.pooled), 0.0);
    }
    let weighted = text.encode("a photo of a person, (smiling:1.3)", PromptSyntax::A1111).unwrap();
    assert!(apart(&weighted.context, &plain.context) > 1e-3);
}

#[derive(Deserialize)]
struct Call {
    syntax: String,
    prompt: String,
}

#[test]
fn textual_inversions_stand_for_their_words_as_in_a1111_and_diffusers() {
    let (golden, mut text) = (Golden::open("embeddings"), encoders());
    let calls: Vec<Call> = golden.json("cases");
    let before: Vec<Tensor> =
        calls.iter().map(|call| text.encode(&call.prompt, PromptSyntax::A1111).unwrap().context).collect();
    for name in golden.json::<Vec<String>>("names") {
        let [clip_l, clip_g] = ["clip_l", "clip_g"].map(|part| golden.get(&format!("{name}.{part}")));
        text.add_embedding(&Embedding { name, clip_l, clip_g }).unwrap();
    }
    let mut changed = 0;
    for (number, (Call { syntax, prompt }, before)) in calls.iter().zip(before).enumerate() {
        let encoded = text.encode(prompt, PromptSyntax::from_name(syntax).unwrap()).unwrap();
        let context = apart(&encoded.context, &golden.get(&format!("{number}.context")));
        let pooled = apart(&encoded.pooled, &golden.get(&format!("{number}.pooled")));
        assert!(context < 1e-4 && pooled < 1e-5, "{syntax} `{prompt}`: {context:.1e} {pooled:.1e}");
        changed +=
            usize::from(before.dims() != encoded.context.dims() || apart(&encoded.context, &before) > 1e-2);
    }
    assert_eq!(changed, calls.len() - 1, "one prompt calls none");
    // ComfyUI's call, with the same vectors in the same places.
    let one = text.encode("a photo of sks person, smiling", PromptSyntax::A1111).unwrap().context;
    let two = text.encode("a photo of embedding:sks person, smiling", PromptSyntax::Comfyui).unwrap().context;
    assert_eq!(apart(&one, &two), 0.0);
    let plain = text.encode("a photo of sks person, smiling", PromptSyntax::Comfyui).unwrap().context;
    assert!(apart(&one, &plain) > 1e-2, "bare words are text in ComfyUI's syntax");
}
