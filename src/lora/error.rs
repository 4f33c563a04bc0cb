//! What can be wrong with a LoRA, or between a LoRA and a model.

/// What can be wrong with a LoRA, or between a LoRA and a model.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// No key of a file belongs to a LoRA.
    #[error(
        "none of its {count} tensors belongs to a LoRA that this program knows{}{}",
        if examples.is_empty() { String::new() } else { format!(", for example {}", listed(examples)) },
        guess.map(|guess| format!("; {guess}")).unwrap_or_default()
    )]
    NoLayers {
        /// Tensors in the file.
        count: usize,
        /// Their keys.
        examples: Vec<String>,
        /// What the file seems to be.
        guess: Option<&'static str>,
    },
    /// Two keys that say the same.
    #[error("`{first}` and `{second}` are the same part of the same layer in two spellings")]
    Twice {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// A kind of adapter that is not implemented, or not here.
    #[error("`{key}`: {kind} is not supported here")]
    Kind {
        /// A key that shows it.
        key: String,
        /// Its name.
        kind: &'static str,
    },
    /// PEFT's configuration of the adapter cannot be followed.
    #[error("PEFT's adapter config: {why}")]
    Config {
        /// What is wrong.
        why: String,
    },
    /// LDM names that the base's blocks do not have, in a file that says which base it is for.
    #[error(
        "{count} of its tensors have no place in the blocks of this base, for example `{example}`; the LoRA was made \
         for the base `{base}`: give it as --base"
    )]
    OtherBlocks {
        /// How many tensors.
        count: usize,
        /// A key of them.
        example: String,
        /// The base by the file's metadata.
        base: String,
    },
    /// A bundled embedding that is none.
    #[error("the embedding `{name}`: {why}")]
    Embedding {
        /// The word by which prompts call it.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// Parts of a file that are left out, where the user wants none to be.
    #[error("{why} (--strict)")]
    Incomplete {
        /// What would be left out.
        why: String,
    },
    /// Only one of the two factors is there.
    #[error("layer `{module}` lacks its `{missing}` factor")]
    Half {
        /// Which layer.
        module: String,
        /// `up` or `down`, or another part's name.
        missing: &'static str,
    },
    /// The two factors do not fit each other.
    #[error("layer `{module}`: down {down:?} and up {up:?} are not (R, in) and (out, R)")]
    Factors {
        /// Which layer.
        module: String,
        /// Shape of `down`.
        down: Vec<usize>,
        /// Shape of `up`.
        up: Vec<usize>,
    },
    /// A part of a shape that no such part has.
    #[error("layer `{module}`: {part} of shape {shape:?} is no part of a LoRA")]
    Part {
        /// Which layer.
        module: String,
        /// Which part.
        part: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A factor or alpha that is NaN or infinite.
    #[error("`{module}` holds numbers that are not finite")]
    NotFinite {
        /// Which layer, or which key of a file.
        module: String,
    },
    /// A layer of another size than the model's.
    #[error(
        "layer `{module}` is made for a weight of {lora:?}, the model has {model:?}{}",
        guess.as_deref().unwrap_or("; is the LoRA made for this base?")
    )]
    Size {
        /// Which layer.
        module: String,
        /// Shape of the weight that the LoRA wants, 0 for an axis that it does not tell.
        lora: Vec<usize>,
        /// Shape of the model's weight.
        model: Vec<usize>,
        /// What the LoRA seems to be made for.
        guess: Option<String>,
    },
    /// Layers for which the model has no place.
    #[error(
        "{} of {count} layers have no place in this model: {}{}",
        modules.len(), listed(modules), guess.as_deref().unwrap_or("; is the LoRA made for this base?")
    )]
    NoPlace {
        /// Layers in the LoRA.
        count: usize,
        /// Those without a place.
        modules: Vec<String>,
        /// What the LoRA seems to be made for.
        guess: Option<String>,
    },
    /// A file that is damaged or no safetensors.
    #[error(transparent)]
    Header(#[from] crate::weights::header::HeaderError),
    /// A module that has no name in a file format.
    #[error("layer `{module}` has no name in {format} files")]
    NoName {
        /// Which layer.
        module: String,
        /// The format.
        format: &'static str,
    },
    /// A LoRA and a layout that do not fit.
    #[error("layer `{module}`: {why}; the layout is another one than the LoRA was made with")]
    Layout {
        /// Which layer.
        module: String,
        /// What differs.
        why: String,
    },
    /// A vector of another length than the layout's.
    #[error("a vector of {given} numbers, the layout has {wanted}")]
    Length {
        /// Numbers given.
        given: usize,
        /// Numbers in the layout.
        wanted: usize,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Up to ten names, and how many more there are.
pub(crate) fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(10).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(10) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// The same for a warning; all names where the user asked for everything (`--verbose`).
pub(crate) fn listed_for_user(names: &[String]) -> String {
    if !crate::progress::is_verbose() {
        return listed(names);
    }
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
