"""A LoRA training step at SDXL's true size: diffusers + peft with gradient checkpointing, and difflora, in turn.

    python scripts/bench_diffusers.py make FOLDER        # random weights, 7 GB in 16 bits
    python scripts/bench_train.py FOLDER [--size 512] [--steps 3] [--programs diffusers:f32 difflora:f16 …]

Both train rank 8 on the attention layers with batch 1 and AdamW. Each program runs with one step and with `--steps`
more: the difference is the time of the further steps, which leaves out start, loading and the encoding of images.
Memory is the peak of the whole process; diffusers' holds the UNet alone, with latents and text drawn at random, and
difflora's is the user's command, which begins with images and captions. difflora computes in f32 whatever the type of
the weights, except that it multiplies bf16 where the processor can; weights that are stored in f16 lose nothing by
staying so. Needs Python with the packages of
scripts/requirements.txt, 24 GB of memory, and `cargo build --release --locked`.
"""

import argparse
import pathlib
import sys
import tempfile

from bench_diffusers import ROOT, process

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def train(folder, size, steps, dtype):
    """diffusers' examples/dreambooth/train_dreambooth_lora_sdxl.py, reduced to its loop."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    dtype = getattr(torch, DTYPES[dtype])
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(
        r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    unet.enable_gradient_checkpointing()
    unet.train()
    cast_training_params(unet, dtype=torch.float32)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    for _ in range(steps):
        latents = torch.randn(1, 4, size // 8, size // 8)
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (1,))
        noisy = schedule.add_noise(latents, noise, t).to(dtype)
        added = {"text_embeds": torch.randn(1, 1280, dtype=dtype),
                 "time_ids": torch.tensor([[size, size, 0, 0, size, size]], dtype=dtype)}
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = unet(noisy, t, torch.randn(1, 77, 2048, dtype=dtype), added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(out.float(), noise)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        print(loss.item(), file=sys.stderr)


def images(folder, size):
    from PIL import Image

    for i in range(3):
        Image.effect_noise((size, size), 40 + 10 * i).convert("RGB").save(folder / f"{i}.png")


def run(args):
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        images(work, args.size)
        ours = [args.binary, "train-lora", str(work), "--quiet", "--base", str(args.folder), "--rank", "8", "--batch", "1",
                "--targets", "attn", "--resolution", str(args.size), "--out", str(work / "person.safetensors")]
        theirs = [sys.executable, __file__, str(args.folder), "--loop", "--size", str(args.size)]
        programs = {"diffusers": ("diffusers + peft", theirs, "--dtypes"), "difflora": ("difflora", ours, "--dtype")}
        print(f"| {args.size}×{args.size} | weights | a step, s | peak memory, GiB |\n|---|---|--:|--:|", flush=True)
        for program in args.programs:
            name, dtype = program.split(":")
            name, command, option = programs[name]
            command = [*command, option, dtype, "--steps"]
            one, _, _ = process([*command, "1"])
            many, memory, _ = process([*command, str(1 + args.steps)])
            print(f"| {name} | {dtype} | {(many - one) / args.steps:.2f} | {memory:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--programs", nargs="+", metavar="PROGRAM:DTYPE", default=[
        "diffusers:f32", "difflora:f32", "difflora:f16", "diffusers:bf16", "difflora:bf16"])
    parser.add_argument("--binary", default=str(ROOT / "target/release/difflora"))
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtypes", choices=list(DTYPES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        train(args.folder, args.size, args.steps, args.dtypes)
    else:
        run(args)


if __name__ == "__main__":
    main()
