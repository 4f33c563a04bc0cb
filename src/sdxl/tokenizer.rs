//! CLIP's byte-pair encoding: prompt → token numbers, the same as transformers' `CLIPTokenizer`.
//!
//! Normalise (NFC, one space for any white space, lower case), split by CLIP's pattern, encode bytes, merge pairs;
//! `<|startoftext|>` before, `<|endoftext|>` after, cut and padded to `model_max_length`. The pipeline is that of
//! transformers 5.23, `models/clip/tokenization_clip.py`, on the same crate that it stands on.

use std::collections::HashMap;

use anyhow::{Context, Result, anyhow};
use candle_core::{Device, Tensor};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Splitters;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{
    AddedToken, Normalizer, OffsetReferential, OffsetType, PaddingParams, PaddingStrategy,
    PreTokenizedString, PreTokenizer, SplitDelimiterBehavior, Tokenizer, TruncationParams,
};

use crate::weights::model_folder::ModelFiles;

const BOS: &str = "<|startoftext|>";
const EOS: &str = "<|endoftext|>";
const WORD_END: &str = "</w>";
const PATTERN: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A prompt's token numbers.
#[derive(Clone)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    /// The same without cutting and padding.
    whole: Tokenizer,
    max_length: usize,
    special: SpecialTokens,
}

/// Numbers of tokens that a sequence is built with.
#[derive(Clone, Copy, Debug)]
pub(super) struct SpecialTokens {
    pub(super) begin: u32,
    pub(super) end: u32,
    pub(super) pad: u32,
    /// Of `,</w>`, where the vocabulary has it.
    pub(super) comma: Option<u32>,
}

impl ClipTokenizer {
    /// Reads `folder`: `vocab.json` and `merges.txt` (or both from the `tokenizer.json` that transformers 5 writes in
    /// their place) and `tokenizer_config.json`.
    pub fn new(files: &ModelFiles, folder: &str) -> Result<Self> {
        let place = |file: &str| format!("{folder}/{file}");
        let config_file = place("tokenizer_config.json");
        let config: TokenizerConfig = files.json(&config_file)?;
        let vocab_file = place("vocab.json");
        let (file, vocab, merges) = if files.exists(&vocab_file) {
            let vocab: HashMap<String, u32> = files.json(&vocab_file)?;
            let merges_file = place("merges.txt");
            let merges = parse_merges(&files.text(&merges_file)?)
                .map_err(|error| files.unusable(&merges_file, error))?;
            (vocab_file, vocab, merges)
        } else {
            let file = place("tokenizer.json");
            let whole: WholeTokenizer = files.json(&file)?;
            let merges = whole.model.merges.into_iter().map(Merge::into_pair).collect();
            (file, whole.model.vocab, merges)
        };
        // Without a limit transformers writes 10³⁰.
        let max_length = config
            .model_max_length
            .filter(|length| (3.0..1e5).contains(length))
            .ok_or_else(|| files.unusable(&config_file, "`model_max_length` is missing; in SDXL it is 77"))?;
        Self::from_parts(vocab, merges, &config, max_length as usize)
            .map_err(|error| files.unusable(&file, format!("{error:#}")))
    }

    /// Most tokens of a prompt, begin and end included; 77 in SDXL.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Exactly [`ClipTokenizer::max_length`] numbers: cut at the end, or padded.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(prompt, true).map_err(|error| anyhow!(error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The end of `prompt` that [`ClipTokenizer::encode`] leaves out, as the user wrote it.
    pub fn cut<'a>(&self, prompt: &'a str) -> Result<Option<&'a str>> {
        let encoding = self.tokenizer.encode(prompt, true).map_err(|error| anyhow!(error))?;
        let Some(rest) = encoding.get_overflowing().first() else { return Ok(None) };
        let own = rest.get_special_tokens_mask().iter().position(|special| *special == 0);
        let start = own.and_then(|i| rest.get_offsets().get(i)).map_or(prompt.len(), |(start, _)| *start);
        Ok(prompt.get(start..).map(str::trim).filter(|end| !end.is_empty()))
    }

    /// The numbers of the tokens in `text` alone, however many.
    pub(super) fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.whole.encode(text, false).map_err(|error| anyhow!(error))?;
        Ok(encoding.get_ids().to_vec())
    }

    pub(super) fn special(&self) -> SpecialTokens {
        self.special
    }

    /// The numbers of several prompts: (B, N) of `u32`.
    pub fn encode_batch(&self, prompts: &[&str], device: &Device) -> Result<Tensor> {
        let mut ids = Vec::with_capacity(prompts.len() * self.max_length);
        for prompt in prompts {
            ids.extend(self.encode(prompt)?);
        }
        Ok(Tensor::from_vec(ids, (prompts.len(), self.max_length), device)?)
    }

    fn from_parts(
        vocab: HashMap<String, u32>,
        merges: Vec<(String, String)>,
        config: &TokenizerConfig,
        max_length: usize,
    ) -> Result<Self> {
        let special = |token: &Option<Special>| token.as_ref().map_or(EOS, Special::content).to_string();
        let bos = config.bos_token.as_ref().map_or(BOS, Special::content).to_string();
        let (eos, unk, pad) =
            (special(&config.eos_token), special(&config.unk_token), special(&config.pad_token));
        let number = |token: &str| {
            vocab.get(token).copied().with_context(|| format!("the special token `{token}` is not in it"))
        };
        let (bos_id, eos_id, pad_id) = (number(&bos)?, number(&eos)?, number(&pad)?);
        let comma = vocab.get(&format!(",{WORD_END}")).copied();
        let special = SpecialTokens { begin: bos_id, end: eos_id, pad: pad_id, comma };
        let model = BPE::builder()
            .vocab_and_merges(vocab.clone().into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
            .unk_token(unk)
            .end_of_word_suffix(WORD_END.into())
            .build()
            .map_err(|error| anyhow!(error))?;
        let fail = |error| anyhow!("the tokenizer cannot be built: {error}");
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_normalizer(Some(normaliser()?)).map_err(fail)?;
        tokenizer.with_pre_tokenizer(Some(splitter()?));
        tokenizer.with_post_processor(Some(
            RobertaProcessing::new((eos, eos_id), (bos, bos_id)).trim_offsets(false).add_prefix_space(false),
        ));
        tokenizer.add_tokens(config.added_tokens()).map_err(fail)?;
        let whole = tokenizer.clone();
        let truncation = TruncationParams { max_length, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(fail)?;
        tokenizer.with_padding(Some(PaddingParams {
            strategy: PaddingStrategy::Fixed(max_length),
            pad_id,
            pad_token: pad,
            ..PaddingParams::default()
        }));
        Ok(Self { tokenizer, whole, max_length, special })
    }
}

/// The files of a small CLIP vocabulary, `(vocab.json, merges.txt)`, which transformers opens too.
///
/// 256 byte symbols, the same at the end of a word, the merges by which every word of `words` becomes one token,
/// and the two special tokens last. Other text falls apart into smaller pieces and is never unknown.
pub fn build_vocabulary(words: &[&str]) -> Result<(String, String)> {
    let mut vocab: Vec<String> = byte_symbols();
    vocab.extend(byte_symbols().into_iter().map(|symbol| symbol + WORD_END));
    let mut merges: Vec<(String, String)> = Vec::new();
    for word in words {
        for piece in pieces(word)? {
            // A new merge comes after all others, so the words before stay one token.
            loop {
                let parts = merge(&piece, &merges);
                let [first, second, ..] = &parts[..] else { break };
                let (first, second) = (first.clone(), second.clone());
                let joined = format!("{first}{second}");
                if !vocab.contains(&joined) {
                    vocab.push(joined);
                }
                merges.push((first, second));
            }
        }
    }
    vocab.extend([BOS.to_string(), EOS.to_string()]);
    let lines: String = merges.iter().map(|(first, second)| format!("{first} {second}\n")).collect();
    Ok((numbered(&vocab)?, format!("#version: 0.2\n{lines}")))
}

/// CLIP's own vocabulary, which both encoders of SDXL share: `(vocab.json, merges.txt)`.
///
/// The tokens follow from the merges: 256 byte symbols, the same at the end of a word, what each merge makes, and the
/// two special tokens.
pub fn clip_vocabulary() -> Result<(String, &'static str)> {
    let merges = include_str!("../assets/clip/merges.txt");
    let mut vocab: Vec<String> = byte_symbols();
    vocab.extend(byte_symbols().into_iter().map(|symbol| symbol + WORD_END));
    vocab.extend(parse_merges(merges)?.into_iter().map(|(first, second)| first + &second));
    vocab.extend([BOS.to_string(), EOS.to_string()]);
    Ok((numbered(&vocab)?, merges))
}

/// `vocab.json`: each token with its place in the list.
fn numbered(vocab: &[String]) -> Result<String> {
    let mut text = String::from("{");
    for (i, token) in vocab.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        text += &format!("{comma}{}:{i}", serde_json::to_string(token)?);
    }
    text.push('}');
    Ok(text)
}

/// Byte-pair encoding of one piece: the pair that comes first in `merges` is joined, again and again.
fn merge(piece: &str, merges: &[(String, String)]) -> Vec<String> {
    let mut parts: Vec<String> = piece.chars().map(String::from).collect();
    if let Some(last) = parts.last_mut() {
        last.push_str(WORD_END);
    }
    let at = |parts: &[String], (first, second): &(String, String)| {
        parts.windows(2).position(|pair| pair[0] == *first && pair[1] == *second)
    };
    while let Some((i, _)) = merges.iter().find_map(|pair| at(&parts, pair).map(|i| (i, pair))) {
        let second = parts.remove(i + 1);
        parts[i].push_str(&second);
    }
    parts
}

/// The pieces of a text between which nothing is merged, each byte as one printable character.
fn pieces(text: &str) -> Result<Vec<String>> {
    let fail = |error| anyhow!("`{text}` cannot be split: {error}");
    let mut normal = tokenizers::NormalizedString::from(text);
    normaliser()?.normalize(&mut normal).map_err(fail)?;
    let mut split = PreTokenizedString::from(normal);
    splitter()?.pre_tokenize(&mut split).map_err(fail)?;
    let found = split.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    Ok(found.into_iter().map(|(piece, ..)| piece.to_string()).collect())
}

/// GPT-2's printable stand-ins for the 256 bytes, in CLIP's order: printable bytes first, then the others.
fn byte_symbols() -> Vec<String> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..256).filter(|byte| !printable(byte)).count() as u32;
    let symbols = (0..256).filter(printable).chain(256..256 + others);
    symbols.map(|code| char::from_u32(code).expect("codes below 512 are characters").to_string()).collect()
}

fn normaliser() -> Result<Normalizers> {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(|error| anyhow!(error))?;
    Ok(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()]))
}

fn splitter() -> Result<Splitters> {
    let pattern = SplitPattern::Regex(PATTERN.into());
    let split = Split::new(pattern, SplitDelimiterBehavior::Removed, true).map_err(|error| anyhow!(error))?;
    Ok(Splitters::new(vec![split.into(), ByteLevel::new(false, true, true).into()]))
}

/// The lines `first second` of `merges.txt`, after its version.
///
/// # Errors
/// A line that is no pair.
fn parse_merges(text: &str) -> Result<Vec<(String, String)>> {
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.starts_with("#version") && !line.trim().is_empty());
    lines
        .map(|(number, line)| match line.split_once(' ') {
            Some((first, second)) => Ok((first.into(), second.into())),
            None => Err(anyhow!("line {} is no pair of tokens", number + 1)),
        })
        .collect()
}

/// `tokenizer_config.json`, as far as it matters.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    model_max_length: Option<f64>,
    bos_token: Option<Special>,
    eos_token: Option<Special>,
    unk_token: Option<Special>,
    pad_token: Option<Special>,
    added_tokens_decoder: HashMap<String, Value>,
}

impl TokenizerConfig {
    /// Tokens that are found in a prompt before it is split.
    fn added_tokens(&self) -> Vec<AddedToken> {
        let mut listed: Vec<(u32, AddedToken)> = self
            .added_tokens_decoder
            .iter()
            .filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token)?)))
            .collect();
        listed.sort_by_key(|(id, _)| *id);
        let mut tokens: Vec<AddedToken> = listed.into_iter().map(|(_, token)| token).collect();
        let named =
            [(&self.bos_token, BOS), (&self.eos_token, EOS), (&self.unk_token, EOS), (&self.pad_token, EOS)];
        for (token, default) in named {
            let token = match token {
                Some(Special::Flags(flags)) => added_token(flags),
                Some(Special::Text(text)) => Some(AddedToken::from(text, true)),
                None => Some(AddedToken::from(default, true)),
            };
            if let Some(token) = token.filter(|token| tokens.iter().all(|t| t.content != token.content)) {
                tokens.push(token);
            }
        }
        tokens
    }
}

/// A special token: its text, or an object with flags.
#[derive(Deserialize)]
#[serde(untagged)]
enum Special {
    Text(String),
    Flags(Value),
}

impl Special {
    fn content(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Flags(flags) => flags["content"].as_str().unwrap_or(EOS),
        }
    }
}

fn added_token(flags: &Value) -> Option<AddedToken> {
    let flag = |name: &str| flags[name].as_bool().unwrap_or(false);
    Some(
        AddedToken::from(flags["content"].as_str()?, true)
            .normalized(flag("normalized"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .single_word(flag("single_word")),
    )
}

/// `tokenizer.json`, as far as it matters.
#[derive(Deserialize)]
struct WholeTokenizer {
    model: WholeModel,
}

#[derive(Deserialize)]
struct WholeModel {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl Merge {
    fn into_pair(self) -> (String, String) {
        match self {
            Self::Pair(first, second) => (first, second),
            Self::Line(line) => match line.split_once(' ') {
                Some((first, second)) => (first.into(), second.into()),
                None => (line, String::new()),
            },
        }
    }
}
