"""From a photo to a LoRA of SDXL's own size: time and memory of `difflora gen` with a hypernetwork of
configs/hypernet-sdxl.toml, whose weights mean nothing.

    python scripts/bench_diffusers.py make BASE          # a random SDXL, 7 GB
    python scripts/bench_photo.py BASE FOLDER [--steps 50] [--runs 3]

Makes random LoRAs, a random CLIP ViT-H/14 with weights of 16 bits, and an autoencoder and a transformer of full size
after one training step, in FOLDER (kept for the next time, 6 GB). Then the whole command runs, as a user runs it: from the
photo to 560 modules of rank 8 in a file. Memory is told for the whole process and for its stages, each with all that the
process has not given back by then. Needs Python with the packages of scripts/requirements.txt, 14 GB of memory,
and a release build (`cargo build --release --locked`).
"""

import argparse
import hashlib
import json
import pathlib
import os
import re
import statistics
import subprocess
import sys
import threading
import time

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


STAGES = ["encoding the photos", "loading the hypernetwork", "sampling the LoRA"]


def watch(command):
    """Seconds of a process, its peak memory in GiB, and the most of each stage, which it names as the stage ends."""
    begin = time.monotonic()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    most, stages, lines = [0.0], {}, []

    def sample():
        while True:
            try:
                status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                return
            found = re.search(r"VmRSS:\s+(\d+)", status)
            if not found:  # it has ended
                return
            most[0] = max(most[0], int(found[1]) / 1024**2)
            time.sleep(0.005)

    threading.Thread(target=sample, daemon=True).start()
    for line in child.stderr:
        lines.append(line)
        if line.startswith("time:"):
            stages[line.split(maxsplit=3)[3].strip()] = most[0]
            most[0] = 0.0
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - begin
    if status:
        sys.exit(f"{command[0]} failed:\n" + "".join(lines))
    return seconds, usage.ru_maxrss / 1024**2, *(stages[stage] for stage in STAGES)


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
    command = [args.program, "gen", "--verbose", "--ref", args.photo, "--hypernet", args.folder / "hypernet", "--base", args.base,
               "--image-encoder", args.folder / "image_encoder", "--identity-steps", args.steps, "--lora-out", args.folder / "photo.safetensors"]
    runs = []
    for run in range(args.runs + 1):  # the first fills the caches: files, and hashes of weights
        runs.append(watch(command))
        print("first" if run == 0 else f"run {run}", *(f"{value:.2f}" for value in runs[-1]), file=sys.stderr)
    size = (args.folder / "photo.safetensors").stat().st_size / 1e6
    seconds, memory, *stages = (statistics.median(values) for values in zip(*runs[1:]))
    print(f"photo → LoRA ({size:.0f} MB), {args.steps} steps: {seconds:.2f} s, at most {memory:.2f} GiB (medians of {args.runs})")
    for stage, most in zip(STAGES, stages):
        print(f"{stage}: at most {most:.2f} GiB")


if __name__ == "__main__":
    main()
