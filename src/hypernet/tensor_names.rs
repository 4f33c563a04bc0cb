//! Tensor names of `dit.safetensors`, and the names of files that earlier versions wrote.
//!
//! The transformer's tensors are named as in facebookresearch/DiT `models.py` (`x_embedder`, `t_embedder`,
//! `adaLN_modulation`, `final_layer`). Files with the old names are still read.
//!
//! In training, variables keep the old names: the initial value of a variable depends on its name, so a seed gives the
//! same network as before, and checkpoints of earlier versions can be resumed.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;

/// Prefixes of names outside of blocks: today's, and the old one.
const PREFIXES: [(&str, &str); 7] = [
    ("dit.x_embedder.proj.", "dit.input."),
    ("dit.pos_embed", "dit.position"),
    ("dit.t_embedder.mlp.0.", "dit.time.0."),
    ("dit.t_embedder.mlp.2.", "dit.time.1."),
    ("dit.final_layer.adaLN_modulation.1.", "dit.modulation."),
    ("dit.final_layer.linear.", "dit.output."),
    ("mixer.null_condition", "mixer.nobody"),
];

/// The same for what follows `dit.blocks.N.`.
const BLOCK_PREFIXES: [(&str, &str); 5] = [
    ("attn.qkv.", "qkv."),
    ("attn.proj.", "attended."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.1."),
    ("adaLN_modulation.1.", "modulation."),
];

/// The old name of a tensor; other names, old ones included, are returned unchanged.
pub fn to_old(name: &str) -> String {
    rename(name, |(new, old)| (new, old))
}

/// Today's name of a tensor; other names, those of today included, are returned unchanged.
pub fn from_old(name: &str) -> String {
    rename(name, |(new, old)| (old, new))
}

fn rename(
    name: &str,
    direction: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> String {
    let replaced = |table: &[(&'static str, &'static str)], name: &str| {
        table.iter().find_map(|pair| {
            let (from, to) = direction(*pair);
            Some(format!("{to}{}", name.strip_prefix(from)?))
        })
    };
    if let Some((block, rest)) = name.strip_prefix("dit.blocks.").and_then(|rest| rest.split_once('.')) {
        return match replaced(&BLOCK_PREFIXES, rest) {
            Some(rest) => format!("dit.blocks.{block}.{rest}"),
            None => name.to_string(),
        };
    }
    replaced(&PREFIXES, name).unwrap_or_else(|| name.to_string())
}

/// `weights` under today's names.
pub fn all_from_old(weights: impl IntoIterator<Item = (String, Tensor)>) -> BTreeMap<String, Tensor> {
    weights.into_iter().map(|(name, weight)| (from_old(&name), weight)).collect()
}

/// A builder that finds tensors under their old names where `vb` has those.
pub fn old_or_new(vb: VarBuilder<'static>) -> VarBuilder<'static> {
    if vb.contains_tensor("mixer.nobody") { vb.rename_f(to_old) } else { vb }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_dit_and_the_way_back_is_exact() {
        for (new, old) in [
            ("dit.x_embedder.proj.weight", "dit.input.weight"),
            ("dit.pos_embed", "dit.position"),
            ("dit.t_embedder.mlp.2.bias", "dit.time.1.bias"),
            ("dit.blocks.11.attn.qkv.weight", "dit.blocks.11.qkv.weight"),
            ("dit.blocks.0.attn.proj.bias", "dit.blocks.0.attended.bias"),
            ("dit.blocks.3.mlp.fc2.weight", "dit.blocks.3.mlp.1.weight"),
            ("dit.blocks.3.adaLN_modulation.1.bias", "dit.blocks.3.modulation.bias"),
            ("dit.final_layer.adaLN_modulation.1.bias", "dit.modulation.bias"),
            ("dit.final_layer.linear.weight", "dit.output.weight"),
            ("mixer.null_condition", "mixer.nobody"),
            ("mixer.face.0.weight", "mixer.face.0.weight"),
            ("guess.weight", "guess.weight"),
        ] {
            assert_eq!((to_old(new).as_str(), from_old(old).as_str()), (old, new));
            assert_eq!((to_old(old).as_str(), from_old(new).as_str()), (old, new));
        }
    }

    #[test]
    fn the_shipped_hypernetwork_is_read_under_its_old_names() {
        let bytes = include_bytes!("../assets/tiny/hypernet/dit.safetensors");
        let old = crate::weights::read_bytes(bytes).unwrap();
        let new = all_from_old(old.clone());
        assert_eq!(new.len(), old.len());
        assert!(
            new.contains_key("dit.blocks.1.adaLN_modulation.1.weight")
                && !new.contains_key("dit.input.weight")
        );
    }
}
