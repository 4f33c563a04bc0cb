//! LDM names of the UNet's layers: those of Stability's own checkpoints, whose block numbers depend on the model.
//!
//! Rules as in sd-scripts' `library/sdxl_model_util.py`.

/// How many ResNet layers the UNet has on each level: all that LDM paths depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockLayout {
    /// On the way down, from the highest resolution; the way up has one more each.
    pub layers_per_block: Vec<usize>,
}

impl Default for BlockLayout {
    /// SDXL: three levels of two.
    fn default() -> Self {
        Self::uniform(3, 2)
    }
}

impl BlockLayout {
    /// `levels` levels with `layers_per_block` layers each, as `unet/config.json` has it.
    pub fn uniform(levels: usize, layers_per_block: usize) -> Self {
        Self { layers_per_block: vec![layers_per_block; levels] }
    }
}

/// diffusers name ↔ LDM name of what lies outside the blocks.
const OUTSIDE: [(&str, &str); 7] = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

/// diffusers name ↔ LDM name within a ResNet block.
const RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
];

/// The three parts of the middle block, in LDM order.
const MIDDLE: [(&str, usize); 3] = [("resnets", 0), ("attentions", 0), ("resnets", 1)];

/// The LDM path of a UNet layer, the way back from [`from_ldm`].
pub fn to_ldm(path: &str, layout: &BlockLayout) -> Option<String> {
    if let Some((_, ldm)) = OUTSIDE.iter().find(|(ours, _)| *ours == path) {
        return Some((*ldm).to_string());
    }
    if let Some(rest) = path.strip_prefix("mid_block.") {
        let (kind, index, rest) = kind_and_index(rest)?;
        let place = MIDDLE.iter().position(|part| *part == (kind, index))?;
        return Some(format!("middle_block.{place}.{}", inner_to_ldm(kind, rest)?));
    }
    let (side, rest) = path.split_once('.')?;
    let (level, rest) = rest.split_once('.')?;
    let level: usize = level.parse().ok()?;
    let (kind, index, rest) = kind_and_index(rest)?;
    let sizes = match side {
        "down_blocks" => layout.down(),
        "up_blocks" => layout.up(),
        _ => return None,
    };
    let (first, size) = *sizes.get(level)?;
    let (block, place) = match (side, kind) {
        (_, "resnets" | "attentions") if index >= size => return None,
        (_, "resnets") => (first + index, 0),
        (_, "attentions") => (first + index, 1),
        ("down_blocks", "downsamplers") => (first + size, 0),
        // After the ResNet and the transformer; SDXL has a transformer on every level with an upsampler.
        ("up_blocks", "upsamplers") => (first + size - 1, 2),
        _ => return None,
    };
    let side = if side == "down_blocks" { "input_blocks" } else { "output_blocks" };
    Some(format!("{side}.{block}.{place}.{}", inner_to_ldm(kind, rest)?))
}

/// The diffusers path of a UNet layer's LDM path, both with dots: `input_blocks.4.1.norm` → `down_blocks.1.attentions.0.norm`.
pub fn from_ldm(path: &str, layout: &BlockLayout) -> Option<String> {
    if let Some((ours, _)) = OUTSIDE.iter().find(|(_, ldm)| *ldm == path) {
        return Some((*ours).to_string());
    }
    let (side, rest) = path.split_once('.')?;
    let (block, rest) = rest.split_once('.')?;
    let block: usize = block.parse().ok()?;
    if side == "middle_block" {
        let (kind, index) = MIDDLE.get(block)?;
        return Some(format!("mid_block.{kind}.{index}.{}", inner_from_ldm(kind, rest)?));
    }
    let (place, rest) = rest.split_once('.')?;
    let (side, sizes) = match side {
        "input_blocks" => ("down_blocks", layout.down()),
        "output_blocks" => ("up_blocks", layout.up()),
        _ => return None,
    };
    // The last level that begins at or before the block.
    let level = sizes.iter().rposition(|(first, _)| *first <= block)?;
    let (first, size) = sizes[level];
    let index = block - first;
    let (kind, index) = match (side, place) {
        ("down_blocks", "0") if index == size => ("downsamplers", 0),
        _ if index >= size => return None,
        (_, "0") => ("resnets", index),
        (_, "1") => ("attentions", index),
        ("up_blocks", "2") if index == size - 1 => ("upsamplers", 0),
        _ => return None,
    };
    Some(format!("{side}.{level}.{kind}.{index}.{}", inner_from_ldm(kind, rest)?))
}

impl BlockLayout {
    /// For each level on the way down: its first LDM block and its layers. Block 0 is `conv_in`, and a
    /// downsampler follows each level.
    fn down(&self) -> Vec<(usize, usize)> {
        let mut first = 1;
        let mut level = |layers: &usize| {
            let here = first;
            first += layers + 1;
            (here, *layers)
        };
        self.layers_per_block.iter().map(&mut level).collect()
    }

    /// For each level on the way up, from the lowest: its first LDM block and its layers.
    fn up(&self) -> Vec<(usize, usize)> {
        let mut first = 0;
        let mut level = |layers: &usize| {
            let here = first;
            first += layers + 1;
            (here, layers + 1)
        };
        self.layers_per_block.iter().rev().map(&mut level).collect()
    }
}

/// `attentions.0.rest` → (`attentions`, 0, `rest`).
fn kind_and_index(path: &str) -> Option<(&str, usize, &str)> {
    let (kind, rest) = path.split_once('.')?;
    let (index, rest) = rest.split_once('.')?;
    Some((kind, index.parse().ok()?, rest))
}

/// Within a transformer both worlds use the same names.
fn inner_to_ldm(kind: &str, rest: &str) -> Option<String> {
    match kind {
        "resnets" => RESNET.iter().find(|(ours, _)| *ours == rest).map(|(_, ldm)| (*ldm).to_string()),
        "downsamplers" => (rest == "conv").then(|| "op".to_string()),
        _ => Some(rest.to_string()),
    }
}

fn inner_from_ldm(kind: &str, rest: &str) -> Option<String> {
    match kind {
        "resnets" => RESNET.iter().find(|(_, ldm)| *ldm == rest).map(|(ours, _)| (*ours).to_string()),
        "downsamplers" => (rest == "op").then(|| "conv".to_string()),
        _ => Some(rest.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SDXL, from sd-scripts' conversion map.
    const SDXL: [(&str, &str); 17] = [
        ("up_blocks.1.resnets.0.norm2", "output_blocks.3.0.out_layers.0"),
        ("mid_block.attentions.0.norm", "middle_block.1.norm"),
        ("conv_norm_out", "out.0"),
        ("down_blocks.0.resnets.1.time_emb_proj", "input_blocks.2.0.emb_layers.1"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        ),
        ("down_blocks.1.attentions.1.proj_in", "input_blocks.5.1.proj_in"),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
            "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj",
        ),
        ("down_blocks.2.resnets.0.conv_shortcut", "input_blocks.7.0.skip_connection"),
        (
            "mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0",
            "middle_block.1.transformer_blocks.3.attn2.to_out.0",
        ),
        ("mid_block.resnets.1.conv1", "middle_block.2.in_layers.2"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.7.ff.net.2",
            "output_blocks.2.1.transformer_blocks.7.ff.net.2",
        ),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.0.proj_out", "output_blocks.3.1.proj_out"),
        ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
    ];

    #[test]
    fn sdxl_s_modules_have_their_ldm_names() {
        let layout = BlockLayout::default();
        for (ours, ldm) in SDXL {
            assert_eq!(to_ldm(ours, &layout).as_deref(), Some(ldm));
            assert_eq!(from_ldm(ldm, &layout).as_deref(), Some(ours));
        }
    }

    #[test]
    fn other_block_layouts_move_the_ldm_numbers() {
        // A UNet of two levels with one layer each.
        let layout = BlockLayout::uniform(2, 1);
        for (ours, ldm) in [
            ("down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
            ("down_blocks.1.attentions.0.proj_in", "input_blocks.3.1.proj_in"),
            ("up_blocks.0.attentions.1.proj_in", "output_blocks.1.1.proj_in"),
            ("up_blocks.1.attentions.0.proj_in", "output_blocks.2.1.proj_in"),
        ] {
            assert_eq!(to_ldm(ours, &layout).as_deref(), Some(ldm));
            assert_eq!(from_ldm(ldm, &layout).as_deref(), Some(ours));
        }
        assert_eq!(to_ldm("down_blocks.2.attentions.0.proj_in", &layout), None);
        assert_eq!(to_ldm("down_blocks.1.attentions.1.proj_in", &layout), None);
    }
}
