//! Weighted prompts → tokens in chunks of the text encoders' length → conditioning.
//!
//! Each chunk is encoded alone; the chunks follow each other in the context, and the pooled output is that of the first.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::prompt::{EMBEDDING, Piece, PromptSyntax, next_embedding, parse_a1111, parse_comfyui};
use super::text::{ClipTextModel, TextConditioning, TextEncoders, Word};
use super::tokenizer::ClipTokenizer;

/// A text goes on in the next chunk after its last comma, if that is at most so many tokens back (A1111's default of
/// `comma_padding_backtrack`).
const COMMA_BACKTRACK: usize = 20;

/// Longest word in tokens that ComfyUI moves to the next chunk whole (`SDTokenizer.max_word_length`).
const LONG_WORD: usize = 8;

/// As many tokens as a text encoder takes, begin and end included, each with its weight.
#[derive(Clone, Debug, PartialEq)]
struct Chunk {
    ids: Vec<u32>,
    weights: Vec<f32>,
}

impl TextEncoders {
    /// The conditioning of one prompt, (1, N, D₁ + D₂) and (1, P); N is a multiple of the tokenizer's length.
    pub fn encode(&self, prompt: &str, syntax: PromptSyntax) -> Result<TextConditioning> {
        let chunks = |tokenizer, words| {
            let vocabulary = Vocabulary { tokenizer, words };
            match syntax {
                PromptSyntax::Comfyui => comfyui_chunks(vocabulary, &parse_comfyui(prompt)),
                PromptSyntax::A1111 => a1111_chunks(vocabulary, &parse_a1111(prompt)),
                PromptSyntax::Plain => Ok(vec![plain_chunk(vocabulary, prompt)?]),
            }
        };
        if syntax == PromptSyntax::Plain && self.words[0].is_empty() {
            return self.encode_prompts(&[prompt]);
        }
        let mut one = chunks(&self.tokenizer, &self.words[0])?;
        let mut two = chunks(&self.tokenizer_2, &self.words[1])?;
        let count = one.len().max(two.len());
        one.resize(count, Chunk::empty(&self.tokenizer));
        two.resize(count, Chunk::empty(&self.tokenizer_2));
        let (mut contexts, mut pooled) = (Vec::new(), None);
        for (one, two) in one.iter().zip(&two) {
            let ids = one.tensor(self.encoder.device())?;
            let ids_2 = two.tensor(self.encoder_2.device())?;
            let plain = self.encode_ids(&ids, &ids_2)?;
            let width = self.encoder.width();
            let both = plain.context.dim(2)?;
            let context = if one.is_plain() && two.is_plain() {
                plain.context
            } else {
                let weighted = |part: Tensor, chunk: &Chunk, encoder, tokenizer| match syntax {
                    PromptSyntax::Comfyui => chunk.away_from_empty(&part, encoder, tokenizer),
                    _ => chunk.keeping_the_mean(&part),
                };
                let first = plain.context.narrow(2, 0, width)?;
                let second = plain.context.narrow(2, width, both - width)?;
                let first = weighted(first, one, &self.encoder, &self.tokenizer)?;
                let second = weighted(second, two, &self.encoder_2, &self.tokenizer_2)?;
                Tensor::cat(&[first, second], 2)?
            };
            contexts.push(context);
            pooled.get_or_insert(plain.pooled);
        }
        let context = Tensor::cat(&contexts, 1)?;
        let pooled = pooled.unwrap_or_else(|| context.clone());
        Ok(TextConditioning { context, pooled })
    }
}

impl Chunk {
    fn empty(tokenizer: &ClipTokenizer) -> Self {
        let special = tokenizer.special();
        let mut ids = vec![special.begin, special.end];
        ids.resize(tokenizer.max_length(), special.pad);
        Self { weights: vec![1.0; ids.len()], ids }
    }

    fn tensor(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::new(self.ids.as_slice(), device)?.unsqueeze(0)?)
    }

    fn is_plain(&self) -> bool {
        self.weights.iter().all(|weight| *weight == 1.0)
    }

    /// The weights as (1, N, 1).
    fn weights(&self, like: &Tensor) -> Result<Tensor> {
        Ok(Tensor::new(self.weights.as_slice(), like.device())?.reshape((1, self.weights.len(), 1))?)
    }

    /// A1111's emphasis: each token's output (1, N, D) times its weight, then all of it times what brings the mean back.
    fn keeping_the_mean(&self, output: &Tensor) -> Result<Tensor> {
        let (dtype, output) = (output.dtype(), output.to_dtype(DType::F32)?);
        let weighted = output.broadcast_mul(&self.weights(&output)?)?;
        let mean = |tensor: &Tensor| -> Result<f64> {
            Ok(tensor.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?)
        };
        let factor = mean(&output)? / mean(&weighted)?;
        let weighted = if factor.is_finite() { (weighted * factor)? } else { weighted };
        Ok(weighted.to_dtype(dtype)?)
    }

    /// ComfyUI's emphasis: each token's output (1, N, D) is moved away from that of the empty prompt.
    fn away_from_empty(
        &self,
        output: &Tensor,
        encoder: &ClipTextModel,
        tokenizer: &ClipTokenizer,
    ) -> Result<Tensor> {
        let empty = Self::empty(tokenizer).tensor(encoder.device())?;
        let empty = encoder.forward(&empty)?.penultimate.to_dtype(DType::F32)?;
        let away = (output.to_dtype(DType::F32)? - &empty)?.broadcast_mul(&self.weights(&empty)?)?;
        Ok((away + empty)?.to_dtype(output.dtype())?)
    }
}

/// A tokenizer, and the words that stand for vectors of textual inversions.
#[derive(Clone, Copy)]
struct Vocabulary<'a> {
    tokenizer: &'a ClipTokenizer,
    words: &'a [Word],
}

impl Vocabulary<'_> {
    /// The numbers of the tokens in `text`; those of a textual inversion stay together.
    fn tokens(&self, text: &str) -> Result<Vec<Vec<u32>>> {
        let tokens = self.tokenizer.tokens(text)?;
        let (mut all, mut at) = (Vec::new(), 0);
        while at < tokens.len() {
            match self.words.iter().find(|word| tokens[at..].starts_with(&word.tokens)) {
                Some(word) => {
                    all.push(word.vectors.clone());
                    at += word.tokens.len();
                }
                None => {
                    all.push(vec![tokens[at]]);
                    at += 1;
                }
            }
        }
        Ok(all)
    }
}

/// The tokens of a chunk without begin and end, while it fills.
#[derive(Default)]
struct Filling(Vec<(u32, f32)>);

impl Filling {
    /// The whole chunk, padded behind its first end token.
    fn close(self, tokenizer: &ClipTokenizer) -> Chunk {
        let special = tokenizer.special();
        let mut tokens = vec![(special.begin, 1.0)];
        tokens.extend(self.0);
        tokens.resize(tokenizer.max_length(), (special.end, 1.0));
        let first = tokens.iter().position(|(id, _)| *id == special.end).unwrap_or(tokens.len());
        for (id, _) in tokens.iter_mut().skip(first + 1) {
            *id = special.pad;
        }
        let (ids, weights) = tokens.into_iter().unzip();
        Chunk { ids, weights }
    }
}

/// As A1111 parts a prompt (`sd_hijack_clip.py`, `tokenize_line`).
fn a1111_chunks(vocabulary: Vocabulary, pieces: &[Piece]) -> Result<Vec<Chunk>> {
    let tokenizer = vocabulary.tokenizer;
    let room = tokenizer.max_length() - 2;
    let comma = tokenizer.special().comma;
    let mut chunks = Vec::new();
    let (mut filling, mut last_comma) = (Filling::default(), None::<usize>);
    for piece in pieces {
        let (text, weight) = match piece {
            Piece::Text(text, weight) => (text, *weight as f32),
            Piece::Break => {
                chunks.push(std::mem::take(&mut filling).close(tokenizer));
                last_comma = None;
                continue;
            }
        };
        for ids in vocabulary.tokens(text)? {
            let full = filling.0.len() == room;
            if ids.first().copied() == comma {
                last_comma = Some(filling.0.len());
            } else if let Some(at) = last_comma.filter(|at| full && filling.0.len() - at <= COMMA_BACKTRACK) {
                let moved = filling.0.split_off(at + 1);
                chunks.push(std::mem::replace(&mut filling, Filling(moved)).close(tokenizer));
                last_comma = None;
            }
            if filling.0.len() + ids.len() > room {
                chunks.push(std::mem::take(&mut filling).close(tokenizer));
                last_comma = None;
            }
            filling.0.extend(ids.into_iter().map(|id| (id, weight)));
        }
    }
    if !filling.0.is_empty() || chunks.is_empty() {
        chunks.push(filling.close(tokenizer));
    }
    Ok(chunks)
}

/// As diffusers encodes a prompt: one chunk, and what does not fit is cut.
fn plain_chunk(vocabulary: Vocabulary, prompt: &str) -> Result<Chunk> {
    let tokens = vocabulary.tokens(prompt)?.into_iter().flatten();
    let room = vocabulary.tokenizer.max_length() - 2;
    Ok(Filling(tokens.take(room).map(|id| (id, 1.0)).collect()).close(vocabulary.tokenizer))
}

/// As ComfyUI parts a prompt (`sd1_clip.py`, `SDTokenizer.tokenize_with_weights`): words are kept whole, and
/// `embedding:NAME` stands for a textual inversion.
fn comfyui_chunks(vocabulary: Vocabulary, pieces: &[Piece]) -> Result<Vec<Chunk>> {
    let tokenizer = vocabulary.tokenizer;
    let room = tokenizer.max_length() - 2;
    let mut chunks = Vec::new();
    let mut filling = Filling::default();
    for piece in pieces {
        let Piece::Text(text, weight) = piece else { continue };
        let mut words: Vec<Vec<u32>> = Vec::new();
        let plain = |text: &str, words: &mut Vec<Vec<u32>>| -> Result<()> {
            for word in text.split([' ', '\n']).filter(|word| !word.is_empty()) {
                words.push(tokenizer.tokens(word)?);
            }
            Ok(())
        };
        let mut rest = text.as_str();
        while let Some((at, name)) =
            next_embedding(rest, vocabulary.words.iter().map(|word| word.name.as_str()))
        {
            plain(&rest[..at], &mut words)?;
            words.extend(
                vocabulary.words.iter().find(|word| word.name == name).map(|word| word.vectors.clone()),
            );
            rest = &rest[at + EMBEDDING.len() + name.len()..];
        }
        plain(rest, &mut words)?;
        for word in words {
            let mut tokens: Vec<(u32, f32)> = word.into_iter().map(|id| (id, *weight as f32)).collect();
            let is_long = tokens.len() >= LONG_WORD;
            while filling.0.len() + tokens.len() > room {
                let rest = if is_long { tokens.split_off(room - filling.0.len()) } else { tokens.clone() };
                if is_long {
                    filling.0.append(&mut tokens);
                }
                chunks.push(std::mem::take(&mut filling).close(tokenizer));
                tokens = rest;
            }
            filling.0.append(&mut tokens);
        }
    }
    chunks.push(filling.close(tokenizer));
    Ok(chunks)
}
