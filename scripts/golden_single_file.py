"""Writes tests/data/golden/single_file: a tiny SDXL as diffusers folder (`folder/`) and as one LDM file (`one.safetensors`).

    pip install -r scripts/requirements.txt && python scripts/golden_single_file.py

The names in the file come from the tables below; diffusers' own loader of such files must find the folder's weights in
it, every one bit for bit. Heads are not SDXL's 64 wide, so `base-config.json` holds what tensors do not tell.
"""
import json
import pathlib
import re
import shutil

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = pathlib.Path(__file__).parent.parent
OUT = HERE / "tests/data/golden/single_file"
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
OUTSIDE = {"time_embedding.linear_": "time_embed.", "add_embedding.linear_": "label_emb.0.", "conv_in": "input_blocks.0.0",
           "conv_norm_out": "out.0", "conv_out": "out.2"}


def models():
    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(4, 8, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 4), cross_attention_dim=20,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8), layers_per_block=2, latent_channels=4, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    )
    text = dict(vocab_size=712, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=48, bos_token_id=710, eos_token_id=711, pad_token_id=711)
    one = CLIPTextModel(CLIPTextConfig(hidden_size=8, projection_dim=8, hidden_act="quick_gelu", **text))
    two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=12, projection_dim=10, hidden_act="gelu", **text))
    for model in (unet, vae, one, two):
        with torch.no_grad():  # norms away from 1 and 0, so that they cannot be exchanged unseen
            for p in model.parameters():
                p.copy_((p + 0.1 * torch.randn_like(p)).bfloat16())
    return unet, vae, one, two


def unet_name(name):
    for ours, theirs in OUTSIDE.items():
        if name.startswith(ours):
            rest = name[len(ours):]
            return theirs + (str((int(rest[0]) - 1) * 2) + rest[1:] if ours.endswith("_") else rest)
    middle = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
    if found := re.match(r"mid_block\.(\w+\.\d)\.(.*)", name):
        place, kind, rest = f"middle_block.{middle[found[1]]}", found[1].split(".")[0], found[2]
    else:
        side, level, kind, index, rest = re.match(r"(\w+)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()
        level, index = int(level), int(index)
        block = {"down": 3 * level + index + 1, "up": 3 * level + index}[side]
        if kind == "downsamplers":
            return f"input_blocks.{3 * level + 3}.0.op" + rest.removeprefix("conv")
        if kind == "upsamplers":
            return f"output_blocks.{3 * level + 2}.2.{rest}"
        place = f"{'input' if side == 'down' else 'output'}_blocks.{block}.{int(kind == 'attentions')}"
    if kind == "resnets":
        layer, end = rest.rsplit(".", 1)
        rest = f"{RESNET[layer]}.{end}"
    return f"{place}.{rest}"


def vae_name(name, levels=2):
    for ours, theirs in {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.resnets.0": "mid.block_1",
                         "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
                         "group_norm": "norm", "to_out.0": "proj_out", "to_q": "q", "to_k": "k", "to_v": "v",
                         "downsamplers.0": "downsample", "upsamplers.0": "upsample", "resnets": "block",
                         "down_blocks": "down"}.items():
        name = name.replace(ours, theirs)
    return re.sub(r"up_blocks\.(\d)", lambda level: f"up.{levels - 1 - int(level[1])}", name)


def open_clip(weights):
    out, parts = {}, {}
    for name, value in weights.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            out["text_projection"] = value.T
        elif name.startswith("embeddings."):
            out[{"token": "token_embedding.weight", "posit": "positional_embedding"}[name[11:16]]] = value
        elif name.startswith("final_layer_norm"):
            out[name.replace("final_layer_norm", "ln_final")] = value
        elif found := re.match(r"encoder\.layers\.(\d)\.self_attn\.([qkv])_proj\.(\w+)", name):
            parts.setdefault(f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}", {})[found[2]] = value
        else:
            for ours, theirs in {"encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm": "ln_",
                                 "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}.items():
                name = name.replace(ours, theirs)
            out[name] = value
    return out | {name: torch.cat([three[k] for k in "qkv"]) for name, three in parts.items()}


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    folder = OUT / "folder"
    unet, vae, one, two = models()
    for name, model in dict(unet=unet, vae=vae, text_encoder=one, text_encoder_2=two).items():
        model.bfloat16().save_pretrained(folder / name)
    tiny = HERE / "src/assets/tiny/base"  # its vocabulary has 712 tokens
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(tiny / part, folder / part)
    shutil.copy(tiny / "model_index.json", folder)

    vae_weights = {vae_name(k): v for k, v in vae.state_dict().items()}
    for name in list(vae_weights):
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):  # 1×1 convolutions in LDM
            vae_weights[name] = vae_weights[name][:, :, None, None]
    text = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in one.state_dict().items()}
    parts = {
        "model.diffusion_model.": {unet_name(k): v for k, v in unet.state_dict().items()},
        "first_stage_model.": vae_weights,
        "conditioner.embedders.0.transformer.": text,
        "conditioner.embedders.1.model.": open_clip(two.state_dict()) | {"logit_scale": torch.tensor(4.6)},
    }
    whole = {prefix + k: v.contiguous() for prefix, part in parts.items() for k, v in part.items()}
    save_file(whole, OUT / "one.safetensors", metadata={"format": "pt"})

    # diffusers must read the folder's weights out of it.
    read = load_file(OUT / "one.safetensors")
    clip = {k: v for k, v in read.items() if "logit_scale" not in k}
    read_two = convert_open_clip_checkpoint(two, clip, prefix="conditioner.embedders.1.model.")
    for name, found, model in [
        ("unet", convert_ldm_unet_checkpoint(dict(read), dict(unet.config)), unet),
        ("vae", convert_ldm_vae_checkpoint(dict(read), dict(vae.config)), vae),
        ("text_encoder_2", read_two, two),
    ]:
        own = model.state_dict()
        assert set(found) == set(own), (name, set(found) ^ set(own))
        for key in own:
            assert torch.equal(found[key].reshape(own[key].shape), own[key]), (name, key)
        print(name, len(own), "tensors, equal in diffusers' eyes")
    settings = {
        "unet": {"attention_head_dim": [1, 2, 4], "norm_num_groups": 2, "sample_size": 8},
        "vae": {"norm_num_groups": 2, "scaling_factor": 0.5, "sample_size": 16},
        "text_encoder": {"num_attention_heads": 2}, "text_encoder_2": {"num_attention_heads": 2},
        "scheduler": json.loads((folder / "scheduler/scheduler_config.json").read_text()),
    }
    (OUT / "base-config.json").write_text(json.dumps(settings, indent=1) + "\n")
    for path in OUT.rglob("*"):
        if path.is_file():
            print(path.relative_to(OUT), path.stat().st_size)


if __name__ == "__main__":
    main()
