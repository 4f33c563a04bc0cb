"""Merges a LoRA of 722 modules into SDXL's UNet at its true size, in diffusers and in difflora in turn, and compares
time and memory.

    python scripts/bench_diffusers.py make FOLDER        # random weights of the whole model, once
    python scripts/bench_lora.py make FOLDER             # a random LoRA: rank 16, f16, names as sd-scripts writes them
    python scripts/bench_lora.py run FOLDER [--runs 3]

`run` measures two things. In memory: diffusers' `load_lora_weights` and `fuse_lora` on a loaded UNet, beside the same
work in `difflora lora merge`, which tells how long it read LoRAs and computed (`--json`, `seconds`). Whole processes:
from the start to the merged UNet on disk. Needs Python with the packages of scripts/requirements.txt, 8 GB of memory,
10 GB of disk, and a release build of difflora (`cargo build --release --locked`).
"""

import argparse
import json
import os
import pathlib
import statistics
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RANK = 16


def ldm_name(path):
    """`down_blocks.1.attentions.0.…` → `input_blocks.4.1.…`, for attentions (sd-scripts, library/sdxl_model_util.py)."""
    pieces = path.split(".")
    if pieces[0] == "mid_block":
        return ".".join(["middle_block", "1", *pieces[3:]])
    level, index = int(pieces[1]), int(pieces[3])
    side, block = ("input_blocks", 3 * level + index + 1) if pieces[0] == "down_blocks" else ("output_blocks", 3 * level + index)
    return ".".join([side, str(block), "1", *pieces[4:]])


def make(folder):
    import torch
    from safetensors.torch import save_file

    with open(folder / "unet/diffusion_pytorch_model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    layers = {name[: -len(".weight")]: entry["shape"] for name, entry in header.items()
              if ".attentions." in name and name.endswith(".weight") and len(entry["shape"]) == 2}
    assert len(layers) == 722, len(layers)
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for path, (out, inner) in sorted(layers.items()):
        stem = "lora_unet_" + ldm_name(path).replace(".", "_")
        for part, shape in (("lora_down.weight", (RANK, inner)), ("lora_up.weight", (out, RANK))):
            tensors[f"{stem}.{part}"] = (torch.randn(shape, generator=generator) * 0.02).half()
        tensors[f"{stem}.alpha"] = torch.tensor(float(RANK / 2)).half()
    save_file(tensors, folder / "lora722.safetensors", metadata={"ss_network_dim": str(RANK)})


def fuse(folder, out):
    """diffusers' part; its own process, so that time and memory are its own."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    none = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float16, **none)
    begin = time.monotonic()
    pipeline.load_lora_weights(folder, weight_name="lora722.safetensors")
    loaded = time.monotonic()
    pipeline.fuse_lora()
    fused = time.monotonic()
    pipeline.unload_lora_weights()
    pipeline.unet.save_pretrained(out)
    print(json.dumps({"loras": loaded - begin, "merging": fused - loaded}))


def measure(command):
    """What a process prints, its seconds and its peak memory in GiB."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            sys.exit(f"{command[0]} failed:\n{errors.read()}")
    return json.loads(said), time.monotonic() - begin, usage.ru_maxrss / 1024**2


def same(one, two):
    """The largest difference of two merged UNets, in steps of f16 of each tensor's largest value."""
    import torch
    from safetensors import safe_open

    worst = 0.0
    with safe_open(one, "pt") as a, safe_open(two, "pt") as b:
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():
            x, y = a.get_tensor(name).float(), b.get_tensor(name).float()
            step = max(torch.finfo(torch.float16).eps * x.abs().max().item(), 1e-7)
            worst = max(worst, (x - y).abs().max().item() / step)
    return worst


def run(folder, runs, compare, program):
    results = {"diffusers": [], "difflora": []}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        scratch = pathlib.Path(scratch)
        base = scratch / "base"
        base.mkdir()
        (base / "unet").symlink_to((folder / "unet").resolve())
        theirs, ours = scratch / "theirs", scratch / "ours"
        calls = {
            "diffusers": [sys.executable, __file__, "fuse", str(folder), "--out", str(theirs)],
            "difflora": [str(program), "lora", "merge", "--quiet", "--json", "--base", str(base),
                         "--lora", str(folder / "lora722.safetensors"), "--out", str(ours)],
        }
        for _ in range(runs):
            for name, command in calls.items():
                subprocess.run(["rm", "-rf", str(ours)], check=True)
                told, whole, memory = measure(command)
                seconds = told.get("seconds", told)
                row = (seconds["loras"], seconds["merging"], seconds["loras"] + seconds["merging"], whole, memory)
                results[name].append(row)
                print(name, *(f"{value:.2f}" for value in row), file=sys.stderr)
            if compare:
                weights = "diffusion_pytorch_model.safetensors"
                print(f"largest difference: {same(theirs / weights, ours / 'unet' / weights):.2f} steps of f16", file=sys.stderr)
                compare = False
    weights = (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size / 1024**3
    figures = ["reading the LoRA, s", "merging, s", "both, s", "whole process, s", "peak memory, GiB"]
    print(f"| 722 modules, rank {RANK}, f16, UNet of {weights:.2f} GiB, medians of {runs} | diffusers | difflora | ratio |\n|---|--:|--:|--:|")
    for i, figure in enumerate(figures):
        a, b = (statistics.median(row[i] for row in results[name]) for name in ("diffusers", "difflora"))
        print(f"| {figure} | {a:.2f} | {b:.2f} | {b / a:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "fuse"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--compare", action="store_true", help="hold the two merged UNets against each other")
    parser.add_argument("--program", default=ROOT / "target/release/difflora", help="difflora to measure")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder)
    elif args.what == "fuse":
        fuse(args.folder, args.out)
    else:
        run(args.folder, args.runs, args.compare, args.program)


if __name__ == "__main__":
    main()
