"""From a photo to a LoRA of SDXL's own size: time and memory of `difflora gen` with a hypernetwork of
configs/hypernet-sdxl.toml, whose weights mean nothing.

    python scripts/bench_diffusers.py make BASE          # a random SDXL, 7 GB
    python scripts/bench_photo.py BASE FOLDER [--steps 50] [--runs 3]

Makes random LoRAs, a random CLIP ViT-H/14 with weights of 16 bits, and an autoencoder and a transformer of full size
after one training step, in FOLDER (kept for the next time, 6 GB). Then the whole command runs, as a user runs it: from the
photo to 560 modules of rank 8 in a file. Needs Python with the packages of scripts/requirements.txt, 14 GB of memory,
and a release build (`cargo build --release --locked`).
"""

import argparse
import hashlib
import json
import pathlib
import re
import statistics
import sys

from bench_diffusers import ROOT, process
from bench_lae import make as make_loras


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make(args):
    import torch
    from check_clip import make as make_encoder
    from safetensors.torch import load_file, save_file

    folder, encoder = args.folder, args.folder / "image_encoder"
    make_loras(folder)
    make_encoder(encoder, "H14")
    weights = {name: value.to(torch.float16) for name, value in load_file(encoder / "model.safetensors").items()}
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})

    tiny = json.loads((ROOT / "src/assets/tiny/hypernet/config.json").read_text())
    header = {
        "base": {"name": args.base.name, "sha256": sha256(args.base / "unet/diffusion_pytorch_model.safetensors")},
        "face_encoder": next(value for key, value in walk(tiny) if key == "face_encoder"),
        "image_encoder": {"name": "image_encoder", "sha256": sha256(encoder / "model.safetensors")},
    }
    (folder / "dataset.json").write_text(json.dumps(header))
    config = (ROOT / "configs/hypernet-sdxl.toml").read_text()
    config = re.sub(r"(?m)^steps = \d\d\d+", "steps = 1", config)  # of training; sampling takes 50
    config = re.sub(r"(?m)^(batch|shards) = \d+", lambda found: f"{found[1]} = {4 if found[1] == 'batch' else 1}", config)
    config = re.sub(r"(?m)^validation = .*\n", "", config)
    (folder / "config.toml").write_text(config)
    for command in (
        ["train-lae", "--dataset", folder, "--out", folder / "lae"],
        ["train-dit", "--dataset", folder, "--lae", folder / "lae", "--out", folder / "hypernet"],
    ):
        process([args.program, *map(str, command), "--config", str(folder / "config.toml"), "--quiet"])


def walk(tree):
    """All keys and values of nested objects."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield key, value
        yield from walk(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--photo", type=pathlib.Path, default=ROOT / "tests/data/astronaut.png")
    parser.add_argument("--program", default=str(ROOT / "target/release/difflora"))
    args = parser.parse_args()
    if not (args.folder / "hypernet/dit.safetensors").exists():
        make(args)
    command = [args.program, "gen", "--quiet", "--ref", args.photo, "--hypernet", args.folder / "hypernet", "--base", args.base,
               "--image-encoder", args.folder / "image_encoder", "--identity-steps", args.steps, "--lora-out", args.folder / "photo.safetensors"]
    runs = []
    for run in range(args.runs + 1):  # the first fills the caches: files, and hashes of weights
        seconds, memory, _ = process([str(part) for part in command])
        print(f"{'first' if run == 0 else f'run {run}'}: {seconds:.2f} s, {memory:.2f} GiB", file=sys.stderr)
        runs.append((seconds, memory))
    size = (args.folder / "photo.safetensors").stat().st_size / 1e6
    seconds, memory = (statistics.median(values) for values in zip(*runs[1:]))
    print(f"photo → LoRA ({size:.0f} MB), {args.steps} steps: {seconds:.2f} s, at most {memory:.2f} GiB (medians of {args.runs})")


if __name__ == "__main__":
    main()
