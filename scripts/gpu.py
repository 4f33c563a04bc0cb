"""PyTorch's side of scripts/gpu.sh, and its table."""

import argparse
import json
import statistics
import sys
import time


def operations(torch, device, dtype, small):
    """Name → (inputs, a call on them); names and sizes are those of tests/bench/gpu.rs."""
    from torch.nn import functional as F

    s, narrow = (32, 8) if small else (1, 1)
    cases = {}

    def case(name, shapes, call):
        cases[name] = ([torch.randn(*shape, device=device, dtype=dtype) for shape in shapes], call)

    for rows, inner, outer in [(8192, 640, 640), (2048, 1280, 1280), (2048, 1280, 10240), (2048, 5120, 1280)]:
        case(f"linear {rows}x{inner}x{outer}", [(rows // s, inner // narrow), (outer // narrow, inner // narrow), (outer // narrow,)],
             F.linear)
    for c, side in [(320, 128), (640, 64), (1280, 32)]:
        case(f"conv3 2x{c}x{side}", [(2, c // narrow, side // s, side // s), (c // narrow, c // narrow, 3, 3), (c // narrow,)],
             lambda x, w, b: F.conv2d(x, w, b, padding=1))
    for heads, n, m in [(10, 4096, 4096), (20, 1024, 1024), (10, 4096, 77)]:
        keys = m if m == 77 else m // s

        def attention(q, k, v, heads=heads):
            split = lambda x: x.unflatten(2, (heads, 64)).transpose(1, 2)
            return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)

        case(f"attention {heads}x{n}x{m}", [(2, n // s, heads * 64), (2, keys, heads * 64), (2, keys, heads * 64)], attention)
    for c, side in [(320, 128), (640, 64), (1280, 32)]:
        case(f"group_norm_silu 2x{c}x{side}", [(2, c, side // s, side // s), (c,), (c,)],
             lambda x, w, b: F.silu(F.group_norm(x, 32, w, b)))
    case("layer_norm 8192x640", [(8192 // s, 640), (640,), (640,)], lambda x, w, b: F.layer_norm(x, (640,), w, b))

    def geglu(x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    case("geglu 8192x5120", [(8192 // s, 5120)], geglu)
    case("upsample 2x640x64", [(2, 640, 64 // s, 64 // s)], lambda x: F.interpolate(x, scale_factor=2.0))
    return cases


def median(torch, device, seconds, work):
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for _ in range(3):
        work()
    wait()
    taken, begin = [], time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begin < seconds and len(taken) < 200:
        start = time.perf_counter()
        work()
        wait()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def ops(args):
    import torch

    results = {}
    for name, (inputs, call) in operations(torch, args.device, getattr(torch, args.dtype), args.small).items():
        with torch.no_grad():
            results[name] = median(torch, args.device, args.seconds, lambda: call(*inputs))
        tracked = [x.requires_grad_() for x in inputs]

        def both():
            for x in tracked:
                x.grad = None
            call(*tracked).sum().backward()

        results[f"{name} with gradients"] = median(torch, args.device, args.seconds, both)
    print(json.dumps(results))


def compare(args):
    ours, theirs = (json.load(open(path)) for path in (args.ours, args.theirs))
    for name, b in theirs.items():
        a = ours.get(name)
        value = round(a / b, 3) if isinstance(a, (int, float)) else None
        unit = f"{a:.3f} / {b:.3f} ms" if value is not None else str(a)[:60].replace('"', "'")
        print(json.dumps({"section": "ops", "name": f"{name} {args.dtype}, difflora / PyTorch", "value": value, "unit": unit,
                          "goal": ""}))


def apart(args):
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(path)).astype(int) for path in (args.a, args.b))
    print(int(abs(a - b).max()))


def draw(args):
    """Seconds of a step in diffusers, with guidance."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    pipeline = StableDiffusionXLPipeline.from_pretrained(args.folder, torch_dtype=dtype).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    if args.how == "compiled":
        pipeline.unet = torch.compile(pipeline.unet)

    def run(steps):
        torch.cuda.synchronize()
        begin = time.monotonic()
        pipeline("a photo of a person", height=args.size, width=args.size, num_inference_steps=steps, guidance_scale=5.0)
        torch.cuda.synchronize()
        return time.monotonic() - begin

    run(2)
    one, many = run(1), run(11)
    print(f"{(many - one) / 10:.4f}")


def train(args):
    """Seconds of a LoRA training step in diffusers and peft: rank 16, attention, bf16, gradient checkpointing."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(args.folder, subfolder="unet", torch_dtype=torch.bfloat16).to("cuda")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian",
                                target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    unet.enable_gradient_checkpointing()
    unet.train()
    cast_training_params(unet, dtype=torch.float32)
    optimiser = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
    side = args.size // 8
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def step():
        added = {"text_embeds": draw(1, 1280),
                 "time_ids": torch.tensor([[args.size, args.size, 0, 0, args.size, args.size]], device="cuda", dtype=torch.bfloat16)}
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = unet(draw(1, 4, side, side), torch.randint(0, 1000, (1,), device="cuda"), draw(1, 77, 2048),
                       added_cond_kwargs=added).sample
        torch.nn.functional.mse_loss(out.float(), draw(1, 4, side, side).float()).backward()
        optimiser.step()
        optimiser.zero_grad()

    print(f"{median(torch, 'cuda', 10, step) / 1e3:.4f}")
    print(f"peak {torch.cuda.max_memory_allocated() >> 20} MiB", file=sys.stderr)


def table(args):
    rows = [json.loads(line) for line in open(args.figures)]
    width = max([len(row["name"]) for row in rows], default=4)
    section = None
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            print(f"\n{section}")
        value = "-" if row["value"] is None else f"{row['value']:g}"
        print(f"  {row['name']:<{width}}  {value:>10} {row['unit']:<22} {row['goal']}".rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(run, *arguments):
        sub = commands.add_parser(run.__name__)
        sub.set_defaults(run=run)
        for argument in arguments:
            sub.add_argument(argument)
        return sub

    sub = command(ops)
    sub.add_argument("--device", default="cuda")
    sub.add_argument("--dtype", default="float16")
    sub.add_argument("--seconds", type=float, default=0.2)
    sub.add_argument("--small", action="store_true")
    command(compare, "ours", "theirs", "dtype")
    command(apart, "a", "b")
    sub = command(draw, "folder")
    sub.add_argument("--size", type=int, default=1024)
    sub.add_argument("--dtype", choices=["f16", "bf16"], default="f16")
    sub.add_argument("--how", choices=["eager", "compiled"], default="eager")
    sub = command(train, "folder")
    sub.add_argument("--size", type=int, default=1024)
    command(table, "figures")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
