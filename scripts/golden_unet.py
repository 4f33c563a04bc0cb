"""Writes tests/data/golden/unet.safetensors: outputs and all gradients of small SDXL-shaped UNets in diffusers.

    pip install -r scripts/requirements.txt && python scripts/golden_unet.py
"""
import json

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

CONFIGS = {
    # SDXL in miniature: no attention on the first level, deeper transformers below.
    "sdxl": dict(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(4, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 4), cross_attention_dim=12,
    ),
    # Two levels, attention on both, one layer, eight channels in.
    "two": dict(
        sample_size=8, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=1, attention_head_dim=4, cross_attention_dim=20,
    ),
}
COMMON = dict(
    norm_num_groups=2, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10,
)

tensors, configs = {}, {}
for name, config in CONFIGS.items():
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**config, **COMMON)
    with torch.no_grad():  # norms away from 1 and 0, so that their gradients are tested too
        for key, p in unet.named_parameters():
            if "norm" in key:
                p.add_(0.1 * torch.randn_like(p))
    side, channels = config["sample_size"], config["in_channels"]
    inputs = dict(
        latents=torch.randn(2, channels, side, side + 8).requires_grad_(),
        timesteps=torch.tensor([999.0, 13.0]),
        context=torch.randn(2, 5, config["cross_attention_dim"]).requires_grad_(),
        pooled=torch.randn(2, 10),
        time_ids=torch.tensor([[64.0, 48, 0, 8, 64, 96], [1024, 768, 16, 0, 512, 512]]),
    )
    out = unet(
        inputs["latents"], inputs["timesteps"], inputs["context"],
        added_cond_kwargs=dict(text_embeds=inputs["pooled"], time_ids=inputs["time_ids"]),
    ).sample
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    configs[name] = json.loads(unet.to_json_string())
    tensors |= {f"{name}.in.{k}": v.detach() for k, v in inputs.items()}
    tensors |= {f"{name}.out": out.detach(), f"{name}.loss_weight": weight}
    tensors |= {f"{name}.grad_in.{k}": inputs[k].grad for k in ("latents", "context")}
    tensors |= {f"{name}.model.{k}": v.detach() for k, v in unet.named_parameters()}
    # Gradients as 16-bit floats: they are compared to 1e-3 of their largest value.
    tensors |= {f"{name}.grad.{k}": v.grad.half() for k, v in unet.named_parameters()}

save_file({k: v.contiguous() for k, v in tensors.items()}, "tests/data/golden/unet.safetensors",
          metadata={k: json.dumps(v) for k, v in configs.items()})
