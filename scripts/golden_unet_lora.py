"""Writes tests/data/golden/unet_lora.safetensors: ten steps of LoRA training on the small UNet of unet.safetensors,
in diffusers and peft with gradient checkpointing.

    pip install -r scripts/requirements.txt && python scripts/golden_unet_lora.py
"""
import json

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file

with safe_open("tests/data/golden/unet.safetensors", "pt") as file:
    config = json.loads(file.metadata()["sdxl"])
    prefix = "sdxl.model."
    weights = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
torch.manual_seed(5)
unet = UNet2DConditionModel.from_config(config)
unet.load_state_dict(weights)
unet.requires_grad_(False)
# Some of each kind, and both sides of the time embedding.
targets = r".*(to_q|to_v|ff\.net\.0\.proj|resnets\.1\.conv1|time_emb_proj|time_embedding\.linear_1)"
unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False))
unet.enable_gradient_checkpointing()
unet.train()

lora = {}
for name, p in unet.named_parameters():
    if p.requires_grad:
        path, factor = name.replace(".default.weight", "").rsplit(".", 1)
        lora[f"{path}.{dict(lora_A='down', lora_B='up')[factor]}"] = p
tensors = {f"start.{name}": p.detach().clone() for name, p in lora.items()}
optimiser = torch.optim.AdamW(lora.values(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.01)
for step in range(10):
    inputs = dict(
        latents=torch.randn(2, 4, 8, 12), timesteps=torch.randint(0, 1000, (2,)).float(),
        context=torch.randn(2, 5, config["cross_attention_dim"]).requires_grad_(), pooled=torch.randn(2, 10),
        time_ids=torch.tensor([[64.0, 48, 0, 8, 64, 96]] * 2), target=torch.randn(2, 4, 8, 12),
    )
    out = unet(
        inputs["latents"], inputs["timesteps"], inputs["context"],
        added_cond_kwargs=dict(text_embeds=inputs["pooled"], time_ids=inputs["time_ids"]),
    ).sample
    loss = torch.nn.functional.mse_loss(out, inputs["target"])
    loss.backward()
    tensors |= {f"in.{step}.{name}": value.detach() for name, value in inputs.items()}
    tensors[f"loss.{step}"] = loss.detach()
    if step == 0:
        tensors |= {f"grad.{name}": p.grad.clone() for name, p in lora.items()}
        tensors["grad_context"] = inputs["context"].grad
    torch.nn.utils.clip_grad_norm_(lora.values(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    print(step, loss.item())
tensors |= {f"after.{name}": p.detach().clone() for name, p in lora.items()}
save_file({k: v.contiguous() for k, v in tensors.items()}, "tests/data/golden/unet_lora.safetensors",
          metadata={"scale": json.dumps(3 / 2)})
