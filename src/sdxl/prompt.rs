//! Prompts in the syntaxes of other programs: emphasis, chunks, and LoRAs that are called by name.
//!
//! `a1111` follows AUTOMATIC1111's stable-diffusion-webui (`modules/prompt_parser.py`, `parse_prompt_attention`;
//! `modules/sd_hijack_clip.py`, `tokenize_line` and `process_tokens`; `modules/extra_networks.py`, `parse_prompt`), `comfyui`
//! ComfyUI (`comfy/sd1_clip.py`, `token_weights`). Golden values: `scripts/golden_prompts.py`.

use crate::named::named;
use std::ops::Range;

named! {
    /// How a prompt is read.
    #[derive(Default)]
    pub enum PromptSyntax {
        /// As A1111 and Forge: `(word)` `(word:1.3)` `[word]`, `\(` for a bracket, BREAK, `<lora:NAME:WEIGHT>`; long prompts
        /// in chunks of 75 tokens.
        #[default]
        A1111 = "a1111",
        /// As ComfyUI: `(word)` `(word:1.3)`, `\(` for a bracket, `<lora:NAME:WEIGHT>`; long prompts in chunks of 75 tokens.
        Comfyui = "comfyui",
        /// As diffusers: every character is text, and what is over 77 tokens is cut.
        Plain = "plain",
    }
}

/// A part of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Text, and how strong it is; 1 for plain text.
    Text(String, f64),
    /// The next text begins a new chunk.
    Break,
}

/// A1111's factor of one pair of brackets.
const EMPHASIS: f64 = 1.1;

/// The parts of a prompt as A1111 reads them. Brackets that are not closed count up to the end; unlike there, BREAK counts
/// inside brackets too.
pub fn parse_a1111(prompt: &str) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let (mut round, mut square): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    let emphasise = |pieces: &mut [Piece], from: usize, factor: f64| {
        for piece in &mut pieces[from..] {
            if let Piece::Text(_, weight) = piece {
                *weight *= factor;
            }
        }
    };
    let mut rest = prompt;
    while let Some(first) = rest.chars().next() {
        let mut length = first.len_utf8();
        match first {
            '\\' => {
                let escaped = rest[1..].chars().next().filter(|c| "()[]\\".contains(*c));
                length += escaped.map_or(0, char::len_utf8);
                pieces.push(Piece::Text(escaped.map(String::from).unwrap_or_default(), 1.0));
            }
            '(' => round.push(pieces.len()),
            '[' => square.push(pieces.len()),
            ')' | ']' => {
                let (open, factor) =
                    if first == ')' { (&mut round, EMPHASIS) } else { (&mut square, 1.0 / EMPHASIS) };
                match open.pop() {
                    Some(from) => emphasise(&mut pieces, from, factor),
                    None => pieces.push(Piece::Text(first.into(), 1.0)),
                }
            }
            ':' => match weight_at(rest) {
                Some((weight, end)) if !round.is_empty() => {
                    length = end;
                    let from = round.pop().unwrap_or_default();
                    emphasise(&mut pieces, from, weight);
                }
                _ => pieces.push(Piece::Text(":".into(), 1.0)),
            },
            _ => {
                length = rest.find(['\\', '(', ')', '[', ']', ':']).unwrap_or(rest.len());
                push_with_breaks(&mut pieces, &rest[..length]);
            }
        }
        rest = &rest[length..];
    }
    round.into_iter().for_each(|from| emphasise(&mut pieces, from, EMPHASIS));
    square.into_iter().for_each(|from| emphasise(&mut pieces, from, 1.0 / EMPHASIS));
    let mut merged: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (merged.last_mut(), piece) {
            (Some(Piece::Text(before, same)), Piece::Text(text, weight)) if *same == weight => {
                before.push_str(&text)
            }
            (_, piece) => merged.push(piece),
        }
    }
    merged
}

/// The number of `:1.3)`, and the length of all of it.
fn weight_at(text: &str) -> Option<(f64, usize)> {
    let end = text.find(')')?;
    let given = text[1..end].trim();
    let number = given.strip_prefix(['+', '-']).unwrap_or(given);
    let digits = !number.is_empty() && number.chars().all(|c| c.is_ascii_digit() || c == '.');
    Some((given.parse().ok().filter(|_| digits)?, end + 1))
}

/// Text in which the word BREAK, with the space around it, parts chunks.
fn push_with_breaks(pieces: &mut Vec<Piece>, mut text: &str) {
    const BREAK: &str = "BREAK";
    let in_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let alone = |text: &str, at: usize| {
        !in_word(text[..at].chars().next_back()) && !in_word(text[at + BREAK.len()..].chars().next())
    };
    while let Some((at, _)) = text.match_indices(BREAK).find(|(at, _)| alone(text, *at)) {
        pieces.push(Piece::Text(text[..at].trim_end().into(), 1.0));
        pieces.push(Piece::Break);
        text = text[at + BREAK.len()..].trim_start();
    }
    pieces.push(Piece::Text(text.into(), 1.0));
}

/// The parts of a prompt as ComfyUI reads them.
pub fn parse_comfyui(prompt: &str) -> Vec<Piece> {
    // Escaped brackets become characters that no prompt holds.
    let escaped = prompt.replace("\\)", "\u{0}\u{1}").replace("\\(", "\u{0}\u{2}");
    let mut pieces = Vec::new();
    weigh(&escaped, 1.0, &mut pieces);
    pieces
}

fn weigh(text: &str, weight: f64, pieces: &mut Vec<Piece>) {
    for part in outer_brackets(text) {
        match part.strip_prefix('(').and_then(|inner| inner.strip_suffix(')')) {
            Some(inner) if part.len() >= 2 => {
                let colon = inner.rfind(':').filter(|at| *at > 0);
                let given =
                    colon.and_then(|at| Some((&inner[..at], inner[at + 1..].trim().parse::<f64>().ok()?)));
                let (inner, weight) = given.unwrap_or((inner, weight * EMPHASIS));
                weigh(inner, weight, pieces);
            }
            _ => {
                let text = part.replace("\u{0}\u{1}", ")").replace("\u{0}\u{2}", "(");
                pieces.push(Piece::Text(text, weight));
            }
        }
    }
}

/// The text in brackets of the outermost level, brackets included, and what lies between.
fn outer_brackets(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut begin, mut level) = (0, 0i64);
    for (at, c) in text.char_indices() {
        match c {
            '(' => {
                if level == 0 && at > begin {
                    parts.push(&text[begin..at]);
                    begin = at;
                }
                level += 1;
            }
            ')' => {
                level -= 1;
                if level == 0 {
                    parts.push(&text[begin..=at]);
                    begin = at + 1;
                }
            }
            _ => {}
        }
    }
    parts.push(&text[begin..]);
    parts.retain(|part| !part.is_empty());
    parts
}

/// The parts of a prompt.
fn pieces(prompt: &str, syntax: PromptSyntax) -> Vec<Piece> {
    match syntax {
        PromptSyntax::A1111 => parse_a1111(prompt),
        PromptSyntax::Comfyui => parse_comfyui(prompt),
        PromptSyntax::Plain => vec![Piece::Text(prompt.into(), 1.0)],
    }
}

/// Brackets within brackets that a prompt may have; parsing takes stack and time by their number.
const MAX_NESTING: usize = 64;

/// The largest weight of a text in magnitude. Users write up to 2; far larger ones overflow the text encoders' output.
const MAX_WEIGHT: f64 = 100.0;

/// Refuses brackets and weights that no image can be generated with.
///
/// # Errors
/// The reason, with the text and the limit.
pub fn check(prompt: &str, syntax: PromptSyntax) -> Result<(), String> {
    if syntax == PromptSyntax::Plain {
        return Ok(());
    }
    let (mut level, mut deepest) = (0usize, 0);
    for c in prompt.chars() {
        match c {
            '(' | '[' => level += 1,
            ')' | ']' => level = level.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(level);
    }
    if deepest > MAX_NESTING {
        return Err(format!(
            "a prompt has {deepest} brackets within each other; at most {MAX_NESTING} are read"
        ));
    }
    let too_large = |piece| match piece {
        Piece::Text(text, weight) if weight.abs() > MAX_WEIGHT => Some((text, weight)),
        _ => None,
    };
    match pieces(prompt, syntax).into_iter().find_map(too_large) {
        Some((text, weight)) => Err(format!(
            "`{text}` has the weight {weight} by its brackets; weights go from -{MAX_WEIGHT} to {MAX_WEIGHT}"
        )),
        None => Ok(()),
    }
}

/// The first text of a prompt that has another weight than 1, and its weight.
pub fn emphasis(prompt: &str, syntax: PromptSyntax) -> Option<(String, f64)> {
    pieces(prompt, syntax).into_iter().find_map(|piece| match piece {
        Piece::Text(text, weight) if weight != 1.0 => Some((text, weight)),
        _ => None,
    })
}

/// A LoRA that a prompt calls: `<lora:NAME>`, `<lora:NAME:WEIGHT>`, `<lora:NAME:TE:UNET>`, or A1111's `te=` and `unet=`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraTag {
    /// File name without extension.
    pub name: String,
    /// Weight on the text encoders.
    pub te: f64,
    /// Weight on the UNet.
    pub unet: f64,
}

/// A prompt without the LoRAs that it calls, and these.
///
/// # Errors
/// A tag whose weight is no number, as the user wrote it.
pub fn lora_tags(prompt: &str) -> Result<(String, Vec<LoraTag>), String> {
    let (mut text, mut tags) = (String::new(), Vec::new());
    let mut from = 0;
    while let Some(Range { start, end }) = next_tag(prompt, from) {
        text.push_str(&prompt[from..start]);
        let inside = &prompt[start + 1..end - 1];
        let tag = inside.split_once(':').map_or("", |(_, rest)| rest);
        tags.push(
            LoraTag::parse(tag)
                .ok_or_else(|| format!("`<{inside}>` in a prompt: write <lora:NAME:WEIGHT>"))?,
        );
        from = end;
    }
    text.push_str(&prompt[from..]);
    if !tags.is_empty() {
        text = text.trim().to_string();
    }
    Ok((text, tags))
}

/// Where the next `<lora:…>` or `<lyco:…>` lies.
fn next_tag(prompt: &str, from: usize) -> Option<Range<usize>> {
    let starts = ["<lora:", "<lyco:"].into_iter().filter_map(|mark| prompt[from..].find(mark));
    let start = from + starts.min()?;
    let end = start + prompt[start..].find('>')? + 1;
    Some(start..end)
}

impl LoraTag {
    fn parse(text: &str) -> Option<Self> {
        let mut items = text.split(':');
        let name = items.next().filter(|name| !name.trim().is_empty())?.trim().to_string();
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|number| number.is_finite());
        let (mut te, mut unet) = (None, None);
        for item in items {
            match item.split_once('=') {
                Some(("te", value)) => te = Some(number(value)?),
                Some(("unet", value)) => unet = Some(number(value)?),
                Some(_) => {}
                None if te.is_none() => te = Some(number(item)?),
                None if unet.is_none() => unet = Some(number(item)?),
                None => {}
            }
        }
        let te = te.unwrap_or(1.0);
        Some(Self { name, te, unet: unet.unwrap_or(te) })
    }
}

/// How ComfyUI's prompts call a textual inversion.
pub(super) const EMBEDDING: &str = "embedding:";

/// Where the next `embedding:NAME` of a ComfyUI prompt lies that calls one of `names`, and which; the longest name counts.
pub(super) fn next_embedding<'a>(
    text: &str,
    names: impl Iterator<Item = &'a str>,
) -> Option<(usize, &'a str)> {
    let names: Vec<&str> = names.collect();
    text.match_indices(EMBEDDING).find_map(|(at, _)| {
        let rest = &text[at + EMBEDDING.len()..];
        let ends = |name: &&&str| {
            let after = rest.strip_prefix(**name);
            after.is_some_and(|after| {
                after.chars().next().is_none_or(|c| !c.is_alphanumeric() && !"_-.".contains(c))
            })
        };
        Some((at, *names.iter().filter(ends).max_by_key(|name| name.len())?))
    })
}

/// Whether a prompt calls the textual inversion `name`.
pub fn calls_embedding(prompt: &str, name: &str, syntax: PromptSyntax) -> bool {
    match syntax {
        PromptSyntax::Comfyui => next_embedding(prompt, [name].into_iter()).is_some(),
        _ => {
            let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
            plain(prompt).contains(&plain(name))
        }
    }
}

/// Names of what other programs would read in this prompt and this one reads as text.
pub fn not_supported(prompt: &str, syntax: PromptSyntax) -> Vec<&'static str> {
    let mut found = Vec::new();
    let words = |c: char| !(c.is_alphanumeric() || c == '_');
    match syntax {
        PromptSyntax::Plain => return found,
        PromptSyntax::A1111 => {
            let inside = |mark: char| {
                prompt
                    .split('[')
                    .skip(1)
                    .any(|rest| rest.split(']').next().is_some_and(|inner| inner.contains(mark)))
            };
            if inside(':') {
                found.push("prompt editing [from:to:when]");
            }
            if inside('|') {
                found.push("alternating words [a|b]");
            }
            if prompt.split(words).any(|word| word == "AND") {
                found.push("composition with AND");
            }
            let called = |rest: &str| {
                let kind = rest.split_once(':').filter(|(_, rest)| rest.contains('>')).map(|(kind, _)| kind);
                kind.is_some_and(|kind| !kind.is_empty() && kind.chars().all(|c| c.is_ascii_alphabetic()))
            };
            if prompt.split('<').skip(1).any(called) {
                found.push("<name:…> of other kinds than <lora:…>");
            }
            if prompt.contains(EMBEDDING) {
                found.push("embedding:NAME (ComfyUI's call; here NAME alone calls a textual inversion)");
            }
        }
        PromptSyntax::Comfyui => {}
    }
    let after_bracket = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit() || c == '+');
    if prompt.split(')').skip(1).any(after_bracket) || prompt.contains("++") {
        found.push("InvokeAI's weights word++ and (words)1.3");
    }
    let choice = prompt.split('{').skip(1);
    if choice.map(|rest| rest.split('}').next().unwrap_or("")).any(|inner| inner.contains('|')) {
        found.push("random choices {a|b}");
    }
    let wildcard = |word: &str| word.len() > 4 && word.starts_with("__") && word.ends_with("__");
    if prompt.split(words).any(wildcard) {
        found.push("wildcards __name__");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts(pieces: &[Piece]) -> Vec<(String, f64)> {
        let rounded = |weight: &f64| (weight * 1e9).round() / 1e9;
        pieces
            .iter()
            .map(|piece| match piece {
                Piece::Text(text, weight) => (text.clone(), rounded(weight)),
                Piece::Break => ("BREAK".into(), -1.0),
            })
            .collect()
    }

    #[test]
    fn a1111_brackets_multiply_weights() {
        for (prompt, wanted) in [
            ("a red hat", vec![("a red hat", 1.0)]),
            ("a (red) hat", vec![("a ", 1.0), ("red", 1.1), (" hat", 1.0)]),
            ("(hat", vec![("hat", 1.1)]),
            ("\\(hat\\]", vec![("(hat]", 1.0)]),
            ("(red)(hat)", vec![("redhat", 1.1)]),
            (
                "one (((cat:1.2)) [sits] by (a lake:0.5)",
                vec![
                    ("one ", 1.0),
                    ("cat", 1.452),
                    (" ", 1.1),
                    ("sits", 1.0),
                    (" by ", 1.1),
                    ("a lake", 0.55),
                ],
            ),
            ("a BREAK b, BREAKFAST", vec![("a", 1.0), ("BREAK", -1.0), ("b, BREAKFAST", 1.0)]),
            ("(a : 1.3 ) b", vec![("a ", 1.3), (" b", 1.0)]),
            ("time 10:30) and C:\\x", vec![("time 10:30) and C:x", 1.0)]),
        ] {
            let wanted: Vec<(String, f64)> =
                wanted.into_iter().map(|(text, weight)| (text.into(), weight)).collect();
            assert_eq!(texts(&parse_a1111(prompt)), wanted, "{prompt}");
        }
    }

    #[test]
    fn deep_brackets_and_large_weights_are_refused() {
        let deep = "(".repeat(60_000) + "a" + &")".repeat(60_000);
        for syntax in [PromptSyntax::A1111, PromptSyntax::Comfyui] {
            assert!(check(&deep, syntax).unwrap_err().contains("60000 brackets"));
            assert!(check("a (hat:101)", syntax).unwrap_err().contains("101"));
            assert_eq!(check("a ((hat:-1.5)) \\(", syntax), Ok(()));
        }
        assert_eq!(check(&deep, PromptSyntax::Plain), Ok(()));
    }

    #[test]
    fn comfyui_reads_round_brackets_alone() {
        for (prompt, wanted) in [
            ("a (b) [c]", vec![("a ", 1.0), ("b", 1.1), (" [c]", 1.0)]),
            ("((a) b:2)", vec![("a", 2.2), (" b", 2.0)]),
            ("(a:much)", vec![("a:much", 1.1)]),
            ("\\(a\\) (b", vec![("(a) ", 1.0), ("(b", 1.0)]),
        ] {
            let wanted: Vec<(String, f64)> =
                wanted.into_iter().map(|(text, weight)| (text.into(), weight)).collect();
            assert_eq!(texts(&parse_comfyui(prompt)), wanted, "{prompt}");
        }
    }

    #[test]
    fn loras_leave_the_prompt() {
        let tag = |name: &str, te, unet| LoraTag { name: name.into(), te, unet };
        for (prompt, text, tags) in [
            ("a photo", "a photo", vec![]),
            ("a photo <lora:me:0.8>", "a photo", vec![tag("me", 0.8, 0.8)]),
            ("<lora:me> a<lyco:x y:0.5:1>b", "ab", vec![tag("me", 1.0, 1.0), tag("x y", 0.5, 1.0)]),
            ("a <lora:me:te=0.2:unet=-0.4:dyn=8>", "a", vec![tag("me", 0.2, -0.4)]),
            ("a <lora:me", "a <lora:me", vec![]),
            ("1 < 2 > 1", "1 < 2 > 1", vec![]),
        ] {
            let (rest, found) = lora_tags(prompt).unwrap();
            assert_eq!(
                (rest.replace(" a", "a").as_str(), found),
                (text.replace(" a", "a").as_str(), tags),
                "{prompt}"
            );
        }
        for odd in ["<lora:me:strong>", "<lora::1>", "<lora:me:nan>"] {
            assert!(lora_tags(odd).unwrap_err().contains(odd));
        }
    }

    #[test]
    fn other_syntax_is_named() {
        let of = |prompt: &str| not_supported(prompt, PromptSyntax::A1111).len();
        for prompt in [
            "a [b:c:0.5]",
            "[a|b]",
            "a AND b",
            "__hair__ colour",
            "{red|blue} hair",
            "smiling++",
            "(red hat)1.3",
            "<hypernet:a:1> b",
            "<LORA:a:1> b",
            "embedding:a",
        ] {
            assert_eq!(of(prompt), 1, "{prompt}");
            assert!(not_supported(prompt, PromptSyntax::Plain).is_empty());
        }
        assert_eq!(of("a photo (smiling:1.2), [red] and ANDes, snake_case, 1 < 2: yes > no"), 0);
    }

    proptest! {
        #[test]
        fn no_text_is_lost_and_nothing_panics(prompt in "[a-c()\\[\\]:.0-9\\\\BREAK <>é]{0,40}") {
            let _ = (lora_tags(&prompt), not_supported(&prompt, PromptSyntax::A1111));
            let letters = |text: &str| text.chars().filter(|c| "abcé".contains(*c)).count();
            for pieces in [parse_a1111(&prompt), parse_comfyui(&prompt)] {
                let kept: usize = texts(&pieces).iter().map(|(text, _)| letters(text)).sum();
                prop_assert_eq!(kept, letters(&prompt));
            }
        }
    }
}
