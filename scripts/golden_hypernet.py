"""Golden values for the hypernetwork: mixer and diffusion transformer written in PyTorch (golden_lae.py has the
autoencoders).

Writes tests/data/golden/hypernet_{mixer,dit,ridge}.safetensors. Each file holds `weight.NAME`, the
inputs, the outputs, `grad.NAME` of every weight for the loss, and `losses` of ten AdamW steps (the loss before
each step). Only torch, numpy and safetensors are needed:

    python scripts/golden_hypernet.py
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

OUT = Path(__file__).parent.parent / "tests/data/golden"


class Mlp(nn.Sequential):
    def __init__(self, i, d):
        super().__init__(nn.Linear(i, d), nn.Linear(d, d))

    def forward(self, x):
        return self[1](F.silu(self[0](x)))


class Mixer(nn.Module):
    def __init__(self, face, image, width):
        super().__init__()
        self.image, self.face = Mlp(image, width), Mlp(face, width)
        self.gate = nn.Linear(image + face, 2)
        self.null_condition = nn.Parameter(torch.randn(width))

    def forward(self, face, image):
        gates = self.gate(torch.cat([image, face], 1)).softmax(-1)
        return gates[:, :1] * self.image(image) + gates[:, 1:] * self.face(face), gates

    def drop(self, condition, keep):
        return torch.where(keep[:, None] > 0, condition, self.null_condition)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """facebookresearch/DiT models.py, DiTBlock."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c).chunk(6, 1)
        b, n, d = x.shape
        q, k, v = (
            part.reshape(b, n, self.heads, -1).transpose(1, 2)
            for part in self.qkv(modulate(self.norm(x), shift, scale)).chunk(3, -1)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + gate.unsqueeze(1) * self.attended(h)
        h = self.mlp[1](F.gelu(self.mlp[0](modulate(self.norm(x), shift2, scale2)), approximate="tanh"))
        return x + gate2.unsqueeze(1) * h


class Dit(nn.Module):
    def __init__(self, latent, token, width, depth, heads):
        super().__init__()
        self.token = token
        self.input = nn.Linear(token, width)
        self.position = nn.Parameter(torch.randn(latent // token, width) * 0.5)
        self.time = nn.Sequential(nn.Linear(256, width), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, token)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x, t, condition):
        b, latent = x.shape
        half = 128
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * freqs[None]
        embedding = torch.cat([angles.cos(), angles.sin()], -1)
        c = F.silu(self.time[1](F.silu(self.time[0](embedding))) + condition)
        x = self.input(x.reshape(b, latent // self.token, self.token)) + self.position
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, 1)
        return self.output(modulate(self.norm(x), shift, scale)).reshape(b, latent)


# Names of facebookresearch/DiT models.py for the attributes of Block and Dit.
BLOCK_NAMES = {"qkv.": "attn.qkv.", "attended.": "attn.proj.", "mlp.0.": "mlp.fc1.", "mlp.1.": "mlp.fc2.",
               "modulation.": "adaLN_modulation.1."}
NAMES = {"input.": "x_embedder.proj.", "position": "pos_embed", "time.0.": "t_embedder.mlp.0.",
         "time.1.": "t_embedder.mlp.2.", "modulation.": "final_layer.adaLN_modulation.1.",
         "output.": "final_layer.linear."}


def stored(name):
    """The name of a parameter in our files."""
    block, rest = re.match(r"(blocks\.\d+\.)?(.*)", name).groups()
    for old, new in (BLOCK_NAMES if block else NAMES).items():
        if rest.startswith(old):
            return (block or "") + new + rest[len(old):]
    return name


def ours(model):
    """Weights under our names: convolution kernels lie flat, (out, in · k) and (in, out · k)."""
    return lambda name, value: value.reshape(value.shape[0], -1) if value.ndim == 3 else value


def golden(name, model, loss, tensors):
    flat = ours(model)
    keep = {f"weight.{stored(n)}": flat(n, p.detach()).clone() for n, p in model.named_parameters()}
    keep |= {n: t.detach().clone() for n, t in tensors.items()}
    loss().backward()
    keep |= {f"grad.{stored(n)}": flat(n, p.grad).clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        optimiser.step()
    keep["losses"] = torch.tensor(losses)
    save_file({n: t.contiguous() for n, t in keep.items()}, OUT / f"hypernet_{name}.safetensors")
    print(name, [round(x, 4) for x in losses])


def main():
    torch.manual_seed(0)
    OUT.mkdir(parents=True, exist_ok=True)

    mixer = Mixer(face=10, image=14, width=16)
    face, image, target = torch.randn(6, 10), torch.randn(6, 14), torch.randn(6, 16)
    keep = torch.tensor([1.0, 1, 0, 1, 0, 1])
    condition, gates = mixer(face, image)
    tensors = {"face": face, "image": image, "target": target, "keep": keep}
    tensors |= {"condition": condition, "gates": gates, "dropped": mixer.drop(condition, keep)}
    golden("mixer", mixer, lambda: ((mixer.drop(mixer(face, image)[0], keep) - target) ** 2).mean(), tensors)

    dit = Dit(latent=12, token=4, width=16, depth=2, heads=4)
    x, condition, target = torch.randn(5, 12), torch.randn(5, 16), torch.randn(5, 12)
    t = torch.tensor([0.0, 3, 250, 700, 999])
    tensors = {"x": x, "t": t, "condition": condition, "target": target, "y": dit(x, t, condition)}
    golden("dit", dit, lambda: ((dit(x, t, condition) - target) ** 2).mean(), tensors)

    # min over W, b of sum |x W' + b - y|^2 + penalty * M * |W|^2, in 64 bits.
    x, y, new = np.random.default_rng(0).normal(size=(3, 20, 7))
    y = y[:, :3] + x[:, :3]
    centred = x - x.mean(0)
    weight = np.linalg.solve(centred.T @ centred + 0.2 * 20 * np.eye(7), centred.T @ (y - y.mean(0))).T
    guess = (new - x.mean(0)) @ weight.T + y.mean(0)
    as_f32 = {"x": x, "y": y, "new": new, "weight": weight, "guess": guess}
    save_file(
        {n: torch.tensor(np.ascontiguousarray(v), dtype=torch.float32) for n, v in as_f32.items()},
        OUT / "hypernet_ridge.safetensors",
    )


if __name__ == "__main__":
    main()
