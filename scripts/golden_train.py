"""Writes tests/data/golden/train.safetensors: ten steps of torch.optim.AdamW with clipping.

    pip install -r scripts/requirements.txt && python scripts/golden_train.py
"""
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
shapes = {"a": (3, 4), "b": (5,)}
weights = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
tensors = {f"start.{name}": w.detach().clone() for name, w in weights.items()}
optimiser = torch.optim.AdamW(weights.values(), lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)
norms = []
for step in range(10):
    for name, w in weights.items():
        w.grad = torch.randn(w.shape) * (0.2 if step % 2 else 3.0)  # clipped every other step
        tensors[f"grad.{step}.{name}"] = w.grad.clone()
    norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), 1.0))
    for group in optimiser.param_groups:
        group["lr"] = 1e-2 * (step + 1) / 10
    optimiser.step()
    tensors |= {f"after.{step}.{name}": w.detach().clone() for name, w in weights.items()}
tensors["norms"] = torch.stack(norms)
save_file(tensors, "tests/data/golden/train.safetensors")
