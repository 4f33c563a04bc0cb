"""Golden values for the LoRA autoencoders, written in PyTorch with its own convolutions.

Writes tests/data/golden/hypernet_{lae,conv1d,local,staged,staged_dense,staged_both}.safetensors, as
golden_hypernet.py does for the other networks:

    python scripts/golden_lae.py
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from golden_hypernet import golden


class Correction(nn.Module):
    """x + conv_transposed(gelu(conv(x) + position)); torch's convolutions, to prove that ours are those."""

    def __init__(self, p, patch, channels):
        super().__init__()
        self.p, self.patch = p, patch
        patches = math.ceil(p / patch)
        self.narrow = nn.Linear(patch, channels)
        self.widen = nn.Linear(channels, patch)
        self.position = nn.Parameter(torch.randn(patches, channels) * 0.5)

    def forward(self, x):
        patches = self.position.shape[0]
        padded = F.pad(x, (0, patches * self.patch - self.p)).unsqueeze(1)
        h = F.conv1d(padded, self.narrow.weight.unsqueeze(1), self.narrow.bias, stride=self.patch)
        h = F.gelu(h + self.position.T, approximate="tanh")
        y = F.conv_transpose1d(h, self.widen.weight.T.unsqueeze(1), stride=self.patch).squeeze(1)
        y = y + self.widen.bias.repeat(patches)
        return x + y[:, : self.p]


class DenseLae(nn.Module):
    def __init__(self, p, latent, patch, channels):
        super().__init__()
        self.basis = nn.Parameter(torch.randn(latent, p) / math.sqrt(p))
        self.before = Correction(p, patch, channels)
        self.after = Correction(p, patch, channels)

    def encode(self, x):
        return self.before(x) @ self.basis.T

    def decode(self, z):
        return self.after(z @ self.basis)


def norm_of(kind, channels):
    """Over (B, C, N)."""
    if kind == "instance":
        return nn.InstanceNorm1d(channels, affine=True)
    return nn.LayerNorm(channels) if kind == "layer" else None


def normalise(norm, x):
    if norm is None:
        return x
    return norm(x.transpose(1, 2)).transpose(1, 2) if isinstance(norm, nn.LayerNorm) else norm(x)


BEND = {"none": lambda x: x, "silu": F.silu, "gelu": F.gelu, "leaky_relu": F.leaky_relu}


class Folding(nn.Module):
    """A stage of the encoder (norm, activation, convolution, activation, fold), or its mirror in the decoder."""

    def __init__(self, stage, up, length, outer, outermost, position, centred):
        super().__init__()
        norm, activation, kernel, inner, fold = stage
        self.up, self.outermost, self.bend = up, outermost, BEND[activation]
        wide = inner if kernel else outer
        if up:
            centred = norm == "instance" and not outermost
            turn = nn.ConvTranspose1d(inner, wide, fold, stride=fold, bias=not centred or kernel > 0)
        else:
            turn = nn.Conv1d(wide, inner, fold, stride=fold, bias=not centred)
        self.fold, self.weight, self.bias = fold, turn.weight, turn.bias
        self.conv = None
        if kernel:
            ends = (wide, outer) if up else (outer, wide)
            self.conv = nn.Conv1d(*ends, kernel, padding=kernel // 2, bias=not (up and centred))
        self.norm = None if outermost else norm_of(norm, outer)
        self.position = nn.Parameter(torch.randn(length // fold, inner) * 0.5) if position else None

    def outer_side(self, x):
        x = normalise(self.norm, x)
        return x if self.outermost else self.bend(x)

    def forward(self, x):
        if self.up:
            x = x if self.position is None else x + self.position.T
            x = F.conv_transpose1d(x, self.weight, self.bias, stride=self.fold)
            x = x if self.conv is None else self.conv(self.bend(x))
            return self.outer_side(x)
        x = self.outer_side(x)
        x = x if self.conv is None else self.bend(self.conv(x))
        x = F.conv1d(x, self.weight, self.bias, stride=self.fold)
        return x if self.position is None else x + self.position.T


class StagedLae(nn.Module):
    def __init__(self, p, stages, position=False, dense=None):
        super().__init__()
        self.p, self.stride = p, math.prod(stage[4] for stage in stages)
        length, channels = p + -p % self.stride, 1
        down, up = [], []
        for i, stage in enumerate(stages):
            last = i + 1 == len(stages)
            centred = not last and stages[i + 1][0] == "instance"
            shape = (length, channels, i == 0)
            down.append(Folding(stage, False, *shape, position and not (last and dense is None), centred))
            up.append(Folding(stage, True, *shape, position, False))
            length, channels = length // stage[4], stage[3]
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(reversed(up))
        self.shape = (channels, length)
        self.narrow = nn.Linear(channels * length, dense) if dense else None
        self.widen = nn.Linear(dense, channels * length) if dense else None

    def encode(self, x):
        x = F.pad(x, (0, -self.p % self.stride)).unsqueeze(1)
        for stage in self.down:
            x = stage(x)
        # The dense stage sees place after place, the latent channel after channel.
        return self.narrow(x.transpose(1, 2).flatten(1)) if self.narrow else x.flatten(1)

    def decode(self, z):
        channels, length = self.shape
        if self.widen:
            x = self.widen(z).reshape(-1, length, channels).transpose(1, 2)
        else:
            x = z.reshape(-1, channels, length)
        for stage in self.up:
            x = stage(x)
        return x.squeeze(1)[:, : self.p]


class LocalLae(nn.Module):
    """Kernels of their own for each patch: a grouped convolution over (B, patches, patch)."""

    def __init__(self, p, patch, components, narrow, channels):
        super().__init__()
        self.p, self.patches, self.patch = p, math.ceil(p / patch), patch
        self.basis = nn.Parameter(torch.randn(self.patches * components, patch) / math.sqrt(patch))
        self.before, self.after = Correction(p, narrow, channels), Correction(p, narrow, channels)

    def encode(self, x):
        x = F.pad(self.before(x), (0, self.patches * self.patch - self.p))
        x = x.reshape(-1, self.patches, self.patch)
        return F.conv1d(x, self.basis.unsqueeze(1), groups=self.patches).flatten(1)

    def decode(self, z):
        x = F.conv_transpose1d(z.unsqueeze(2), self.basis.unsqueeze(1), groups=self.patches)
        return self.after(x.flatten(1)[:, : self.p])


def lae_loss(model, x, lam, distance="mse"):
    error = x - model.decode(model.encode(x))
    reconstruction = (error**2).mean() if distance == "mse" else error.abs().mean()
    return reconstruction + lam * (x.abs() * error.abs()).mean()


def main():
    torch.manual_seed(0)
    # (norm, activation, kernel, channels, fold)
    plain = [("none", "silu", 0, 6, 2), ("none", "silu", 0, 4, 3)]
    every = [("none", "leaky_relu", 3, 5, 3), ("instance", "silu", 0, 4, 2), ("layer", "gelu", 5, 3, 2)]
    again = [("none", "none", 3, 6, 2), ("layer", "gelu", 3, 5, 3), ("instance", "leaky_relu", 3, 4, 2)]
    for name, model, distance in [
        ("lae", DenseLae(p=50, latent=6, patch=8, channels=12), "mse"),
        ("conv1d", StagedLae(50, plain), "mse"),
        ("local", LocalLae(50, patch=16, components=3, narrow=8, channels=6), "mse"),
        ("staged", StagedLae(50, every, position=True), "l1"),
        ("staged_dense", StagedLae(50, again, position=False, dense=7), "mse"),
        ("staged_both", StagedLae(50, every, position=True, dense=7), "mse"),
    ]:
        x = torch.randn(5, 50)
        z = model.encode(x)
        tensors = {"x": x, "z": z, "x_hat": model.decode(z)}
        golden(name, model, lambda: lae_loss(model, x, 0.5, distance), tensors)


if __name__ == "__main__":
    main()
