"""Golden values for src/lora: a PEFT LoRA saved by diffusers, and the weights it merges into.

    python scripts/golden_lora.py            # writes tests/data/golden/lora_peft.safetensors and lora_delta.safetensors
    python scripts/golden_lora.py --check    # the kohya files that the Rust tests hold load in diffusers and give the same

Needs torch, diffusers 0.42.1, peft 0.21.2. The UNet is a small SDXL: two levels of two layers, attention on the
lower one, `text_time` conditioning. The LoRA has rank 3 and alpha 5 on the linear layers of the transformers and on
the time projections, but rank 2 on `to_k`. Alpha is the same everywhere: diffusers 0.42.1
takes one alpha for the whole of a kohya file (it looks the others up under names that no module has).
"""

import argparse
import pathlib
import tempfile

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).parent.parent / "tests/data/golden"


def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        cross_attention_dim=12,
        transformer_layers_per_block=1,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
        norm_num_groups=4,
    )


def weights(unet):
    return {name: value.detach().clone() for name, value in unet.state_dict().items()}


def fused(path):
    """ΔW of every weight that the file at `path` changes when diffusers loads and fuses it."""
    unet = small_unet()
    before = weights(unet)
    pipe = StableDiffusionXLPipeline.__new__(StableDiffusionXLPipeline)
    state, alphas, metadata = pipe.lora_state_dict(str(path), unet_config=unet.config, return_lora_metadata=True)
    StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
    after = weights(unet)
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


def make():
    unet = small_unet()
    linear = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=linear, rank_pattern={"to_k": 2})
    unet.add_adapter(config)
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    state = get_peft_model_state_dict(unet)
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionXLPipeline.save_lora_weights(
            folder, unet_lora_layers=state, unet_lora_adapter_metadata=unet.peft_config["default"].to_dict()
        )
        written = pathlib.Path(folder) / "pytorch_lora_weights.safetensors"
        (GOLDEN / "lora_peft.safetensors").write_bytes(written.read_bytes())
    delta = fused(GOLDEN / "lora_peft.safetensors")
    save_file(delta, GOLDEN / "lora_delta.safetensors")
    print(f"{len(delta)} weights change")


def check():
    wanted = load_file(GOLDEN / "lora_delta.safetensors")
    for name in ["lora_kohya.safetensors", "lora_kohya_diffusers.safetensors", "lora_peft_written.safetensors"]:
        delta = fused(GOLDEN / name)
        assert delta.keys() == wanted.keys(), delta.keys() ^ wanted.keys()
        worst = max((delta[key] - wanted[key]).abs().max().item() for key in wanted)
        print(f"{name}: {len(delta)} weights, largest difference {worst:.2e}")
        assert worst < 1e-5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="load the files that the Rust tests hold")
    check() if parser.parse_args().check else make()
