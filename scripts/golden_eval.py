"""The measures of `difflora eval`, by transformers, scikit-image, scipy and numpy, on the same random images.

    python scripts/golden_eval.py tests/data/golden

Writes `eval/vit` and `eval/dinov2` (folders of transformers with random weights), and `eval.safetensors`: images, what
the two encoders make of them (DINOv2 at another size than it was made for), PSNR and SSIM of pairs, and for two sets
of features the Fréchet distance (as clean-fid computes it) and the unbiased KID (Bińkowski et al. 2018).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy import linalg
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

root = Path(sys.argv[1])
torch.manual_seed(0)
rng = np.random.default_rng(0)
out = {}


def scatter(model):
    # Norms and scales away from one, so that a missing one shows.
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    return model.eval()


vit = scatter(ViTModel(ViTConfig(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=48, patch_size=16,
), add_pooling_layer=True))
dino = scatter(Dinov2Model(Dinov2Config(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14,
)))
for name, model, size in (("vit", vit, (48, 48)), ("dinov2", dino, (42, 56))):
    model.save_pretrained(root / "eval" / name)
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        out[f"{name}.pixels"], out[f"{name}.class"] = pixels, model(pixel_values=pixels).last_hidden_state[:, 0].contiguous()

smooth = np.kron(rng.integers(0, 255, (6, 5, 3)), np.ones((4, 4, 1)))
first = np.clip(smooth + rng.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)  # 24 high, 20 wide
second = np.clip(first + rng.normal(0, 25, first.shape), 0, 255).astype(np.uint8)
_, ssim = structural_similarity(
    first, second, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True,
)
out["images"] = torch.from_numpy(np.stack([first, second]))
# Only where the whole window fits, as the paper's own code.
out["ssim"] = torch.tensor(ssim[5:-5, 5:-5].mean(), dtype=torch.float64)
out["psnr"] = torch.tensor(peak_signal_noise_ratio(first, second, data_range=255), dtype=torch.float64)

a = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
b = rng.normal(size=(30, 6)) @ rng.normal(size=(6, 6)) + 0.5
out["features.a"], out["features.b"] = torch.from_numpy(a), torch.from_numpy(b)


def frechet(a, b):
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(sigma_a @ sigma_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sigma_a + sigma_b - 2 * root)


def kid(a, b):
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    n, m = len(a), len(b)
    within = lambda x, n: (kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1))
    return within(a, n) + within(b, m) - 2 * kernel(a, b).mean()


out["frechet"] = torch.tensor(frechet(a, b), dtype=torch.float64)
out["kid"] = torch.tensor(kid(a, b), dtype=torch.float64)
save_file(out, root / "eval.safetensors")
