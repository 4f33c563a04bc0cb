"""Holds CLIP's image encoder against transformers at true size, with random weights in f32.

    python scripts/check_clip.py DIR [--size L14|H14] [--image FILE]

Makes a CLIPVisionModelWithProjection in DIR (kept for the next time; L14 1.2 GB, H14 2.5 GB), has
`difflora face embed --image-encoder DIR --whole-image` write the projected embedding and all tokens of
`hidden_states[-2]`, computes both with transformers and its own CLIPImageProcessor, and prints cosines, the largest
difference, and time and peak memory of both whole processes. Exit code 1 below a cosine of 0.99999.

Needs Python with the packages of scripts/requirements.txt and a release build (`cargo build --release --locked`).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    # openai/clip-vit-large-patch14, laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    "L14": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=768, patch_size=14, hidden_act="quick_gelu"),
    "H14": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, projection_dim=1024, patch_size=14, hidden_act="gelu"),
}


def make(folder, size):
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES[size]))
    # transformers' own start is so small that layers hardly matter; norms and biases get numbers that do.
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() < 2:
                value.add_(torch.randn_like(value) * 0.1)
            elif "layers" in name:
                value.copy_(torch.randn_like(value) * value.shape[1] ** -0.5)
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def reference(folder, image, out):
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    torch.set_num_threads(2)
    model = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    pixels = CLIPImageProcessor.from_pretrained(folder)(Image.open(image).convert("RGB"), return_tensors="pt").pixel_values
    with torch.no_grad():
        given = model(pixels, output_hidden_states=True)
    save_file({"projected": given.image_embeds[0].contiguous(), "tokens": given.hidden_states[-2][0].contiguous()}, out)


def run(command):
    """Seconds and peak memory in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--size", choices=SIZES, default="L14")
    arguments.add_argument("--image", type=Path, default=ROOT / "tests/data/astronaut.png")
    arguments.add_argument("--difflora", default=str(ROOT / "target/release/difflora"))
    arguments.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    folder, image = arguments.folder, arguments.image
    if arguments.reference:
        reference(folder, image, arguments.reference)
        return
    if not (folder / "model.safetensors").exists():
        make(folder, arguments.size)
    import numpy as np
    from safetensors.numpy import load_file

    theirs_file = folder / "theirs.safetensors"
    theirs_cost = run([sys.executable, __file__, str(folder), "--image", str(image), "--reference", str(theirs_file)])
    theirs, worst = load_file(theirs_file), 1.0
    for output in ("projected", "tokens"):
        ours_file = folder / f"{output}.safetensors"
        ours_cost = run([arguments.difflora, "face", "embed", str(image), "--image-encoder", str(folder), "--whole-image", "--image-output", output, "--out", str(ours_file)])
        (ours,) = load_file(ours_file).values()
        a, b = ours.astype(np.float64).ravel(), theirs[output].astype(np.float64).ravel()
        if output == "projected":
            b /= np.linalg.norm(b)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        token = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a.reshape(-1, ours.shape[-1]), b.reshape(-1, ours.shape[-1]))]
        worst = min(worst, cosine, *token)
        print(f"{arguments.size} {output} {list(ours.shape)}: cosine {cosine:.8f}, least of a token {min(token):.8f}, largest difference {np.abs(a - b).max():.2e} of {np.abs(b).max():.2f}")
    for name, (seconds, memory) in (("transformers", theirs_cost), ("difflora", ours_cost)):
        print(f"{name}: {seconds:.1f} s, {memory:.2f} GiB (whole process)")
    sys.exit(int(worst < 0.99999))


if __name__ == "__main__":
    main()
