//! How strong a LoRA is, part by part: `FILE`, `FILE:0.8`, `FILE:unet=0.8,te=0.4,down.1=0.5`.

use std::path::PathBuf;

use crate::failure::Failure;

/// Weights of a LoRA for the parts of a model; the most special one counts.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockWeights {
    everywhere: f64,
    /// Path prefix without a final dot, and weight.
    parts: Vec<(String, f64)>,
}

impl BlockWeights {
    /// The same everywhere.
    pub fn all(weight: f64) -> Self {
        Self { everywhere: weight, parts: Vec::new() }
    }

    /// One weight for the text encoders, another for all else.
    pub fn te_and_unet(te: f64, unet: f64) -> Self {
        let parts = ["text_encoder", "text_encoder_2"].map(|prefix| (prefix.to_string(), te));
        Self { everywhere: unet, parts: if te == unet { Vec::new() } else { parts.into() } }
    }

    /// The weight of a module, by its path as in [`Lora`](super::Lora).
    pub fn of(&self, module: &str) -> f64 {
        let below = |prefix: &str| match prefix {
            // All that is in no text encoder.
            "" => !module.starts_with("text_encoder"),
            _ => module.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')),
        };
        let named = self.parts.iter().filter(|(prefix, _)| below(prefix));
        named.max_by_key(|(prefix, _)| prefix.len()).map_or(self.everywhere, |(_, weight)| *weight)
    }

    /// The weight where no part is named.
    pub fn everywhere(&self) -> f64 {
        self.everywhere
    }

    /// All weights times `factor`.
    pub fn times(&self, factor: f64) -> Self {
        let parts = self.parts.iter().map(|(prefix, weight)| (prefix.clone(), weight * factor)).collect();
        Self { everywhere: self.everywhere * factor, parts }
    }

    /// `FILE[:WEIGHT]` of the command line.
    ///
    /// # Errors
    /// [`Failure::Usage`] for weights that are no numbers and parts that no model has.
    pub fn split(argument: &str) -> Result<(PathBuf, Self), Failure> {
        match argument.rsplit_once(':') {
            Some((path, text)) if !path.is_empty() && looks_like_weights(text) => {
                let weights = Self::parse(text)
                    .map_err(|why| Failure::Usage(format!("the weight `{text}` of `{path}`: {why}")))?;
                Ok((path.into(), weights))
            }
            _ => Ok((argument.into(), Self::all(1.0))),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(number),
            _ => Err(format!("`{text}` is no number")),
        };
        let mut weights = Self::all(1.0);
        for item in text.split(',') {
            let Some((name, weight)) = item.split_once('=') else {
                weights.everywhere = number(item)?;
                continue;
            };
            let weight = number(weight)?;
            for prefix in prefixes(name).ok_or_else(|| {
                format!("`{name}` is no part of a model; parts are unet, te, te1, te2, down, down.N, mid, up, up.N")
            })? {
                weights.parts.push((prefix, weight));
            }
        }
        Ok(weights)
    }
}

/// Numbers and `part=number`; a Windows path or a strange file name is neither.
fn looks_like_weights(text: &str) -> bool {
    text.parse::<f64>().is_ok() || text.contains('=')
}

/// The paths that a part's name stands for.
fn prefixes(name: &str) -> Option<Vec<String>> {
    let whole = match name {
        "unet" => Some(vec![""]),
        "te" => Some(vec!["text_encoder", "text_encoder_2"]),
        "te1" => Some(vec!["text_encoder"]),
        "te2" => Some(vec!["text_encoder_2"]),
        "mid" => Some(vec!["mid_block"]),
        "down" => Some(vec!["down_blocks"]),
        "up" => Some(vec!["up_blocks"]),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.into_iter().map(String::from).collect());
    }
    let (side, level) = name.split_once('.')?;
    let level: u8 = level.parse().ok()?;
    matches!(side, "down" | "up").then(|| vec![format!("{side}_blocks.{level}")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_special_part_counts() {
        let (path, weights) =
            BlockWeights::split("a/b.safetensors:0.9,unet=0.8,te=0.4,te2=0.3,down.1=-0.5").unwrap();
        assert_eq!(path, PathBuf::from("a/b.safetensors"));
        for (module, weight) in [
            ("down_blocks.1.attentions.0.proj_in", -0.5),
            ("down_blocks.10.attentions.0.proj_in", 0.8),
            ("mid_block.attentions.0.proj_in", 0.8),
            ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 0.4),
            ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 0.3),
        ] {
            assert_eq!(weights.of(module), weight, "{module}");
        }
        let (_, blocks) = BlockWeights::split("x:0.5,up=2").unwrap();
        assert_eq!((blocks.of("up_blocks.0.x"), blocks.of("mid_block.x")), (2.0, 0.5));
        assert_eq!(blocks.of("text_encoder.x"), 0.5);
    }

    #[test]
    fn what_is_no_weight_belongs_to_the_name_or_is_refused() {
        for name in ["file", "C:\\lora.safetensors", "a:b", ":0.5", "2024-01-01T10:00.safetensors"] {
            assert_eq!(BlockWeights::split(name).unwrap(), (name.into(), BlockWeights::all(1.0)), "{name}");
        }
        assert_eq!(BlockWeights::split("x:-1.5").unwrap(), ("x".into(), BlockWeights::all(-1.5)));
        for (argument, words) in [
            ("x:nan", "`nan` is no number"),
            ("x:inf", "`inf` is no number"),
            ("x:unet=y", "`y` is no number"),
            ("x:vae=1", "`vae` is no part"),
            ("x:down.=1", "`down.` is no part"),
            ("x:mid.0=1", "`mid.0` is no part"),
            ("x:unet=1,", "`` is no number"),
        ] {
            let error = BlockWeights::split(argument).unwrap_err();
            assert!(matches!(&error, Failure::Usage(why) if why.contains(words)), "{argument}: {error}");
        }
    }
}
