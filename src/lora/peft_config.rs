//! PEFT's configuration of an adapter, which holds alpha: the tensors do not.
//!
//! It lies in `adapter_config.json` beside the weights (`PeftModel.save_pretrained`), or in the weights' metadata under
//! `lora_adapter_metadata`, each key behind the name of its model: `unet.lora_alpha` (diffusers,
//! `loaders/lora_base.py`).

use std::collections::BTreeMap;
use std::path::Path;

use fancy_regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use super::{LoraError, keys};
use crate::files;
use crate::weights::header::{Header, Pairs};

/// The weights beside `adapter_config.json`, as PEFT names them.
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// Initialisations that subtract the adapter's first state from the base (PEFT, `tuners/lora/layer.py`).
const CHANGES_BASE: [&str; 4] = ["pissa", "olora", "corda", "loftq"];

/// `adapter_config.json` in the folder of a file.
pub struct ConfigFile {
    text: String,
    /// Whether the file has the name that PEFT gives to the weights of this config.
    is_named: bool,
}

impl ConfigFile {
    /// That of the weights in `path`, if there is one.
    ///
    /// # Errors
    /// [`LoraError::Config`] for a config that cannot be read.
    pub fn beside(path: &Path) -> Result<Option<Self>, LoraError> {
        let config = files::folder_of(path).join("adapter_config.json");
        if !config.is_file() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&config).map_err(|error| wrong(error.to_string()))?;
        Ok(Some(Self { text, is_named: path.file_name().is_some_and(|name| name == WEIGHTS) }))
    }
}

/// What PEFT's configuration says of the modules of a file.
#[derive(Debug, Default)]
pub struct PeftConfig {
    /// Of `adapter_config.json`.
    beside: Option<Settings>,
    /// Of the metadata, by the name of the model: `unet`.
    noted: BTreeMap<String, Settings>,
}

/// The settings of one adapter.
#[derive(Debug, Default)]
struct Settings {
    /// Where no pattern fits.
    alpha: Option<f64>,
    /// Of single modules; the first pattern that fits counts.
    alphas: Vec<(Regex, f64)>,
    rank: Option<f64>,
    ranks: Vec<(Regex, f64)>,
    /// Scale alpha / √R instead of alpha / R (rsLoRA).
    by_root: bool,
    /// PEFT scales a LoKr of two whole matrices too.
    is_lokr: bool,
    is_dora: bool,
    /// Whether the file may hold whole weights (`modules_to_save`) or biases (`bias`) in the place of the base's.
    replaces: bool,
}

impl PeftConfig {
    /// That of a file: what its metadata say, and for PEFT's own files what lies beside them.
    ///
    /// # Errors
    /// [`LoraError::Config`] for a pattern that is no regular expression, and for adapters that PEFT does not add to the
    /// weights of the original base.
    pub fn of(header: &Header, beside: Option<&ConfigFile>) -> Result<Self, LoraError> {
        let raw = || header.tensors.iter().any(|entry| entry.key.starts_with("base_model.model."));
        let beside = beside.filter(|config| config.is_named || raw());
        let beside = beside.map(|config| {
            let fields = serde_json::from_str(&config.text).map_err(|error| wrong(error.to_string()))?;
            // PEFT's default where a config leaves it out.
            let settings = Settings::read(fields)?;
            Ok::<_, LoraError>(Settings { alpha: settings.alpha.or(Some(8.0)), ..settings })
        });
        let mut noted: BTreeMap<String, BTreeMap<String, Field>> = BTreeMap::new();
        let text = header.metadata.get("lora_adapter_metadata").map_or("", String::as_str);
        let fields: BTreeMap<String, Field> = serde_json::from_str(text).unwrap_or_default();
        for (key, field) in fields {
            if let Some((model, key)) = key.split_once('.') {
                noted.entry(model.to_string()).or_default().insert(key.to_string(), field);
            }
        }
        let noted = noted.into_iter().map(|(model, fields)| Ok((model, Settings::read(fields)?)));
        let config = Self { beside: beside.transpose()?, noted: noted.collect::<Result<_, LoraError>>()? };
        let has_magnitudes = || header.tensors.iter().any(|entry| entry.key.contains("magnitude_vector"));
        if config.all().any(|settings| settings.is_dora) && !has_magnitudes() {
            return Err(wrong("`use_dora` is set, and the file holds no `lora_magnitude_vector`".into()));
        }
        Ok(config)
    }

    fn all(&self) -> impl Iterator<Item = &Settings> {
        self.beside.iter().chain(self.noted.values())
    }

    /// Whether keys like `conv_in.weight` and `conv_in.bias` replace what the base has there.
    pub fn replaces(&self) -> bool {
        self.all().any(|settings| settings.replaces)
    }

    /// The alpha of `module`, which has this rank and whose keys begin with `stem`; such that alpha / R is the scale.
    pub fn alpha(&self, module: &str, stem: &str, rank: usize) -> Option<f32> {
        let (settings, names) = self.settings(module, stem)?;
        let alpha = first(&settings.alphas, &names).or(settings.alpha)?;
        let alpha = if settings.by_root { alpha * (rank as f64).sqrt() } else { alpha };
        Some(alpha as f32)
    }

    /// The scale of a LoKr of two whole matrices, which tell no rank; 1 in LyCORIS' own files.
    pub fn whole_lokr_scale(&self, module: &str, stem: &str) -> f64 {
        let scale = || {
            let (settings, names) = self.settings(module, stem).filter(|(settings, _)| settings.is_lokr)?;
            let rank = first(&settings.ranks, &names).or(settings.rank)?;
            Some(first(&settings.alphas, &names).or(settings.alpha)? / rank)
        };
        scale().unwrap_or(1.0)
    }

    /// The settings for a module, and what PEFT calls the module within the model that they are for.
    fn settings<'a>(&self, module: &'a str, stem: &'a str) -> Option<(&Settings, [&'a str; 3])> {
        let path = keys::peft(module);
        let model = path.split('.').next()?;
        let inside = module.strip_prefix(model).and_then(|rest| rest.strip_prefix('.')).unwrap_or(module);
        let raw = stem.strip_prefix("base_model.model.").unwrap_or(stem);
        let within = raw.strip_prefix(model).and_then(|rest| rest.strip_prefix('.')).unwrap_or(raw);
        let settings = self.noted.get(model).or(self.beside.as_ref())?;
        Some((settings, [raw, within, inside]))
    }
}

/// What the first pattern says that fits one of the names.
fn first(patterns: &[(Regex, f64)], names: &[&str]) -> Option<f64> {
    let fits = |pattern: &Regex| names.iter().any(|name| pattern.is_match(name).unwrap_or(false));
    patterns.iter().find(|(pattern, _)| fits(pattern)).map(|(_, value)| *value)
}

/// A field of a config; patterns in the order in which they stand there.
#[derive(Deserialize)]
#[serde(untagged)]
enum Field {
    Patterns(Pairs),
    Other(Value),
}

impl Settings {
    fn read(mut fields: BTreeMap<String, Field>) -> Result<Self, LoraError> {
        let mut take = |name: &str| match fields.remove(name) {
            Some(Field::Other(value)) => Some(value).filter(|value| !value.is_null()),
            _ => None,
        };
        let kind = take("peft_type").and_then(|value| value.as_str().map(str::to_uppercase));
        if let Some(init) = take("init_lora_weights").as_ref().and_then(Value::as_str)
            && CHANGES_BASE.iter().any(|kind| init.to_lowercase().starts_with(kind))
        {
            return Err(wrong(format!(
                "`init_lora_weights` is `{init}`: the adapter was trained on a base with other weights; save it with \
                 PEFT's `path_initial_model_for_weight_conversion`"
            )));
        }
        let number = |value: Option<Value>| value.and_then(|value| value.as_f64());
        let (lora, lycoris) = (number(take("lora_alpha")), number(take("alpha")));
        let rank = number(take("r"));
        let mut flag = |name: &str| take(name).and_then(|value| value.as_bool()).unwrap_or(false);
        let (by_root, is_dora) = (flag("use_rslora"), flag("use_dora"));
        let list =
            take("modules_to_save").is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty()));
        let bias = take("bias").is_some_and(|value| value.as_str().is_some_and(|bias| bias != "none"));
        let replaces = list || bias;
        let mut patterns = |name: &str| match fields.remove(name) {
            Some(Field::Patterns(Pairs(pairs))) => pairs.into_iter().map(pattern).collect(),
            _ => Ok(Vec::new()),
        };
        let is_lokr = kind.as_deref() == Some("LOKR");
        let (alphas, ranks) = (patterns("alpha_pattern")?, patterns("rank_pattern")?);
        Ok(Self { alpha: lora.or(lycoris), alphas, rank, ranks, by_root, is_lokr, is_dora, replaces })
    }
}

/// As PEFT matches it: `re.match(rf"(.*\.)?({key})$", name)` (`utils/other.py`, `get_pattern_key`).
fn pattern((key, value): (String, Value)) -> Result<(Regex, f64), LoraError> {
    let regex = Regex::new(&format!(r"^(?:(?:.*\.)?(?:{key})$)"))
        .map_err(|error| wrong(format!("the pattern `{key}` is no regular expression: {error}")))?;
    let value = value.as_f64().ok_or_else(|| wrong(format!("the pattern `{key}` has no number")))?;
    Ok((regex, value))
}

fn wrong(why: String) -> LoraError {
    LoraError::Config { why }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The config that a file of the keys `stem`… has beside it, or in its metadata.
    fn config(stem: &str, beside: Option<&str>, noted: Option<&str>) -> Result<PeftConfig, LoraError> {
        let metadata = noted.map(|json| ("lora_adapter_metadata".to_string(), json.to_string()));
        let key = format!("{stem}.lora_A.weight");
        let entry = (key.as_str(), crate::weights::header::Storage::F32, &[4usize, 4][..]);
        let header = Header::of(metadata.into_iter().collect(), [entry]);
        let beside = beside.map(|text| ConfigFile { text: text.to_string(), is_named: false });
        PeftConfig::of(&header, beside.as_ref())
    }

    const TO_Q: &str = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q";
    const TO_K: &str = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k";

    /// Alphas of both modules at rank 4, in a raw file of PEFT.
    fn alphas(json: &str) -> [f32; 2] {
        let config = config(&format!("base_model.model.{TO_Q}"), Some(json), None).unwrap();
        [TO_Q, TO_K].map(|module| config.alpha(module, &format!("base_model.model.{module}"), 4).unwrap())
    }

    #[test]
    fn patterns_are_regular_expressions_and_the_first_that_fits_counts() {
        for (patterns, wanted) in [
            (r"{}", [16.0, 16.0]),
            (r#"{"to_q": 2}"#, [2.0, 16.0]),
            (r#"{"attn1.to_q": 2}"#, [2.0, 16.0]),
            (r#"{"_q": 2}"#, [16.0, 16.0]),
            (r#"{".*to_[qk]": 2}"#, [2.0, 2.0]),
            (r#"{"mid_block\\..*\\.to_q|down_blocks\\..*": 2}"#, [2.0, 16.0]),
            (r#"{"to_.": 2, "to_q": 8}"#, [2.0, 2.0]),
            (r#"{"to_q": 8, "to_.": 2}"#, [8.0, 2.0]),
            (r#"{"^mid_block.*to_k": 2}"#, [16.0, 2.0]),
            (r#"{"(?!.*to_q).*": 2}"#, [16.0, 2.0]),
            (r#"{"to": 2}"#, [16.0, 16.0]),
        ] {
            let json = format!(r#"{{"r": 4, "lora_alpha": 16, "alpha_pattern": {patterns}}}"#);
            assert_eq!(alphas(&json), wanted, "{patterns}");
        }
    }

    #[test]
    fn rslora_scales_by_the_root_of_the_rank() {
        assert_eq!(alphas(r#"{"lora_alpha": 16, "use_rslora": true}"#), [32.0, 32.0]);
        assert_eq!(alphas(r#"{"peft_type": "LOHA", "alpha": 3, "r": 4}"#), [3.0, 3.0]);
        assert_eq!(alphas("{}"), [8.0, 8.0]);
    }

    #[test]
    fn metadata_are_by_model() {
        let json =
            r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}, "unet.use_rslora": true}"#;
        let config = config(&format!("unet.{TO_Q}"), None, Some(json)).unwrap();
        let alpha = |module: &str, stem: &str| config.alpha(module, stem, 4);
        assert_eq!(alpha(TO_Q, &format!("unet.{TO_Q}")), Some(4.0));
        assert_eq!(alpha(TO_K, &format!("unet.{TO_K}")), Some(16.0));
        assert_eq!(alpha("text_encoder.text_model.x", "text_encoder.text_model.x"), None);
    }

    #[test]
    fn a_config_beside_a_file_of_another_program_is_not_its_own() {
        let config = config("lora_unet_mid_block_attentions_0_proj_in", Some(r#"{"lora_alpha": 16}"#), None);
        assert_eq!(config.unwrap().alpha(TO_Q, TO_Q, 4), None);
    }

    #[test]
    fn peft_scales_a_lokr_of_whole_matrices() {
        let json = r#"{"peft_type": "LOKR", "alpha": 8, "r": 16, "rank_pattern": {"to_k": 4}}"#;
        let config = config(&format!("base_model.model.{TO_Q}"), Some(json), None).unwrap();
        assert_eq!([TO_Q, TO_K].map(|module| config.whole_lokr_scale(module, module)), [0.5, 2.0]);
        assert_eq!(PeftConfig::default().whole_lokr_scale(TO_Q, TO_Q), 1.0);
    }

    #[test]
    fn configs_that_cannot_be_followed_are_refused() {
        for (json, words) in [
            ("{", "EOF"),
            (r#"{"alpha_pattern": {"(to_q": 2}}"#, "no regular expression"),
            (r#"{"alpha_pattern": {"to_q": "much"}}"#, "no number"),
            (r#"{"use_dora": true}"#, "lora_magnitude_vector"),
            (r#"{"init_lora_weights": "pissa_niter_16"}"#, "path_initial_model_for_weight_conversion"),
        ] {
            let error = config("base_model.model.x", Some(json), None).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("PEFT"), "{error}");
        }
        for (json, replaces) in [
            (r#"{"modules_to_save": ["conv_in"]}"#, true),
            (r#"{"bias": "lora_only"}"#, true),
            (r#"{"modules_to_save": null, "bias": "none"}"#, false),
        ] {
            let config = config("base_model.model.x", Some(json), None).unwrap();
            assert_eq!(config.replaces(), replaces, "{json}");
        }
    }
}
