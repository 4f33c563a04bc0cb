"""Times the layers of SDXL's networks one by one, in PyTorch and in difflora in turn, and prints the ratios.

    cargo build --release --locked --bench layers
    python scripts/bench_kernels.py [--runs 3] [--only conv]

Both run with two threads (`--threads`), in f32 and with bf16 weights; difflora's bf16 rounds the operands of products
only and keeps activations in f32. Each figure is the smallest of the medians of `--runs` rounds, in milliseconds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def operations(torch, dtype):
    """Name → a call; the same names and sizes as in tests/bench/layers.rs."""
    from torch.nn import functional as F

    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape).to(dtype)

    def linear(rows, inner, outer):
        x, w, b = draw(rows, inner), draw(outer, inner), draw(outer)
        return lambda: F.linear(x, w, b)

    def conv(batch, inner, outer, side, kernel, stride=1):
        x, w, b = draw(batch, inner, side, side), draw(outer, inner, kernel, kernel), draw(outer)
        return lambda: F.conv2d(x, w, b, stride=stride, padding=kernel // 2)

    def attention(batch, heads, queries, keys, width=64):
        q, k, v = draw(batch, queries, heads * width), draw(batch, keys, heads * width), draw(batch, keys, heads * width)

        def run():
            parts = [x.view(batch, -1, heads, width).transpose(1, 2) for x in (q, k, v)]
            return F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(batch, queries, heads * width)

        return run

    def geglu(rows, width):
        x = draw(rows, width)

        def run():
            value, gate = x.chunk(2, dim=-1)
            return value * F.gelu(gate)

        return run

    def group_norm(batch, channels, side, silu):
        x, w, b = draw(batch, channels, side, side), draw(channels), draw(channels)
        norm = lambda: F.group_norm(x, 32, w, b, 1e-5)
        return (lambda: F.silu(norm())) if silu else norm

    def layer_norm(rows, width):
        x, w, b = draw(rows, width), draw(width), draw(width)
        return lambda: F.layer_norm(x, (width,), w, b)

    def upsample(batch, channels, side):
        x = draw(batch, channels, side, side)
        return lambda: F.interpolate(x, scale_factor=2.0, mode="nearest")

    return {
        "linear 2x1280x1280": linear(2, 1280, 1280),
        "linear 154x2048x1280": linear(154, 2048, 1280),
        "linear 512x1280x1280": linear(512, 1280, 1280),
        "linear 512x1280x10240": linear(512, 1280, 10240),
        "linear 1024x1280x1280": linear(1024, 1280, 1280),
        "linear 2048x640x5120": linear(2048, 640, 5120),
        "linear 2048x5120x1280": linear(2048, 5120, 1280),
        "linear 4096x640x640": linear(4096, 640, 640),
        "conv3 2x320x64": conv(2, 320, 320, 64, 3),
        "conv3 2x640x32": conv(2, 640, 640, 32, 3),
        "conv3 2x1280x16": conv(2, 1280, 1280, 16, 3),
        "conv3 2x2560x1280x16": conv(2, 2560, 1280, 16, 3),
        "conv3/2 2x320x64": conv(2, 320, 320, 64, 3, 2),
        "conv1 2x640x320x64": conv(2, 640, 320, 64, 1),
        "conv3 2x4x320x64": conv(2, 4, 320, 64, 3),
        "conv3 2x320x4x64": conv(2, 320, 4, 64, 3),
        "conv3 1x512x64": conv(1, 512, 512, 64, 3),
        "conv3 1x512x128": conv(1, 512, 512, 128, 3),
        "conv3 1x256x256": conv(1, 256, 256, 256, 3),
        "conv3 1x128x512": conv(1, 128, 128, 512, 3),
        "attention 2x20x256": attention(2, 20, 256, 256),
        "attention 1x20x1024": attention(1, 20, 1024, 1024),
        "attention 1x10x4096": attention(1, 10, 4096, 4096),
        "attention 2x10x1024x77": attention(2, 10, 1024, 77),
        "attention 1x1x4096 d512": attention(1, 1, 4096, 4096, 512),
        "geglu 2048x10240": geglu(2048, 10240),
        "group_norm 2x320x64": group_norm(2, 320, 64, False),
        "group_norm_silu 2x320x64": group_norm(2, 320, 64, True),
        "group_norm_silu 1x128x512": group_norm(1, 128, 512, True),
        "layer_norm 2048x1280": layer_norm(2048, 1280),
        "upsample 2x640x32": upsample(2, 640, 32),
    }


def torch_times(dtype_name, only, seconds):
    """One round in PyTorch: name → median milliseconds."""
    import torch

    times = {}
    with torch.inference_mode():
        for name, call in operations(torch, getattr(torch, dtype_name)).items():
            if only and only not in name:
                continue
            call()
            taken, begin = [], time.perf_counter()
            while len(taken) < 3 or (time.perf_counter() - begin < seconds and len(taken) < 200):
                start = time.perf_counter()
                call()
                taken.append((time.perf_counter() - start) * 1e3)
            times[name] = statistics.median(taken)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each operation in each round")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--bench", type=pathlib.Path, help="the built bench; by default the newest in target/release")
    parser.add_argument("--torch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch:
        print(json.dumps(torch_times(args.torch, args.only, args.seconds)))
        return
    built = sorted((ROOT / "target/release/deps").glob("layers-*"), key=lambda path: path.stat().st_mtime)
    bench = args.bench or next((path for path in reversed(built) if not path.suffix), None)
    if bench is None:
        sys.exit("no bench is built: cargo build --release --locked --bench layers")
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}

    def call(command):
        return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)

    for dtype in args.dtypes.split(","):
        rounds = {"PyTorch": [], "difflora": []}
        common = ["--only", args.only, "--seconds", str(args.seconds)]
        for _ in range(args.runs):
            rounds["PyTorch"].append(call([sys.executable, __file__, "--torch", dtype, *common]))
            rounds["difflora"].append(call([bench, "--dtype", dtype, *common]))
        print(f"| {dtype}, {threads} threads | PyTorch, ms | difflora, ms | ratio |\n|---|--:|--:|--:|")
        for name in rounds["PyTorch"][0]:
            a, b = (min(times[name] for times in rounds[who]) for who in ("PyTorch", "difflora"))
            print(f"| {name} | {a:.2f} | {b:.2f} | {b / a:.2f} |", flush=True)
        print()


if __name__ == "__main__":
    main()
