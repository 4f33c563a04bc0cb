"""Golden values for what stands between a person and a latent: mixers, the transformer's variants, DDIM on x_0.

Writes tests/data/golden/hypernet_{mixer_face,mixer_image,mixer_concat,dit_clusters}.safetensors in the form of
golden_hypernet.py, and hypernet_ddim.safetensors: what diffusers' DDIMScheduler makes of predictions of the clean
sample, with and without fresh noise. Needs torch, diffusers and safetensors:

    python scripts/golden_denoiser.py
"""

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import nn

from golden_hypernet import OUT, Dit, Mlp, golden


class OneMlp(nn.Module):
    """A mixer without a gate, on what it is allowed to see."""

    def __init__(self, name, width_in, width):
        super().__init__()
        self.add_module(name, Mlp(width_in, width))
        self.name = name
        self.null_condition = nn.Parameter(torch.randn(width))

    def forward(self, face, image):
        seen = {"face": face, "image": image, "both": torch.cat([image, face], 1)}[self.name]
        return getattr(self, self.name)(seen)

    def drop(self, condition, keep):
        return torch.where(keep[:, None] > 0, condition, self.null_condition)


def sincos(tokens, width):
    """facebookresearch/DiT models.py, get_1d_sincos_pos_embed_from_grid."""
    omega = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2.0))
    out = torch.einsum("m,d->md", torch.arange(tokens, dtype=torch.float64), omega)
    return torch.cat([out.sin(), out.cos()], 1).float()


class ClusterDit(Dit):
    """Places by sines and cosines, and an embedding for each Gaussian of the prior."""

    def __init__(self, latent, token, width, depth, heads, clusters):
        super().__init__(latent, token, width, depth, heads)
        del self.position
        self.register_buffer("position", sincos(latent // token, width))
        self.cluster = nn.Parameter(torch.randn(clusters, width))

    def forward(self, x, t, condition, cluster):
        return super().forward(x, t, condition + self.cluster[cluster])


def network(x, t):
    """Any smooth function of the sample and the timestep."""
    return (0.7 * x).tanh() + (float(t) / 1000 - 0.3)


def main():
    torch.manual_seed(0)
    face, image, target = torch.randn(6, 10), torch.randn(6, 14), torch.randn(6, 16)
    keep = torch.tensor([1.0, 1, 0, 1, 0, 1])
    for file, name, width_in in [("face", "face", 10), ("image", "image", 14), ("concat", "both", 24)]:
        mixer = OneMlp(name, width_in, 16)
        condition = mixer(face, image)
        tensors = {"face": face, "image": image, "target": target, "keep": keep, "condition": condition}
        tensors["dropped"] = mixer.drop(condition, keep)
        golden(f"mixer_{file}", mixer, lambda: ((mixer.drop(mixer(face, image), keep) - target) ** 2).mean(), tensors)

    dit = ClusterDit(latent=12, token=3, width=16, depth=1, heads=2, clusters=3)
    x, condition, target = torch.randn(5, 12), torch.randn(5, 16), torch.randn(5, 12)
    t, cluster = torch.tensor([0.0, 3, 250, 700, 999]), torch.tensor([2, 0, 0, 1, 2])
    tensors = {"x": x, "t": t, "condition": condition, "target": target, "cluster": cluster.to(torch.uint32)}
    tensors["y"] = dit(x, t, condition, cluster)
    golden("dit_clusters", dit, lambda: ((dit(x, t, condition, cluster) - target) ** 2).mean(), tensors)

    start, fresh = torch.randn(2, 6), torch.randn(50, 2, 6)
    tensors = {"start": start, "fresh": fresh}
    for schedule in ["linear", "squaredcos_cap_v2"]:
        for steps in [1, 4, 10, 50]:
            for eta in [0.0, 0.5, 1.0]:
                scheduler = DDIMScheduler(
                    beta_start=1e-4,
                    beta_end=0.02,
                    beta_schedule=schedule,
                    prediction_type="sample",
                    clip_sample=False,
                    set_alpha_to_one=True,
                    timestep_spacing="trailing",
                )
                scheduler.set_timesteps(steps)
                x = start
                for i, t in enumerate(scheduler.timesteps):
                    x = scheduler.step(network(x, t), t, x, eta=eta, variance_noise=fresh[i]).prev_sample
                tensors[f"{schedule}.{steps}.{eta}"] = x
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUT / "hypernet_ddim.safetensors")


if __name__ == "__main__":
    main()
