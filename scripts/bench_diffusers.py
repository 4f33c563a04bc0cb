"""Draws one image at SDXL's true size with random weights, in diffusers and in difflora in turn, and compares
time and memory of the whole processes.

    python scripts/bench_diffusers.py make FOLDER                    # random weights, 7 GB in 16 bits
    python scripts/bench_diffusers.py run FOLDER [--size 512] [--steps 2] [--dtype f32] [--runs 3]

`run` calls each program in turn (A B A B …), `--runs` times each. Both time each step themselves, guidance 5 (two
samples a step); the first is told apart from the others, because it warms caches up. It prints the medians of the whole
process, the first step, the further steps and the peak memory, and their ratios; with --json every figure as well.
Needs Python with the packages of scripts/requirements.txt, 24 GB of memory, and a release build of difflora
(`cargo build --release --locked`; or name another program with --program).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = "a photo of a person, smiling"


def vocabulary(merges):
    """CLIP's token table, which its merges determine (openai/CLIP, simple_tokenizer.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    return {word: i for i, word in enumerate(words + ["<|startoftext|>", "<|endoftext|>"])}


def make(folder):
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def random(build):
        with torch.device("meta"):
            model = build()
        model = model.to(torch.float16).to_empty(device="cpu")
        noise = torch.randn(1 << 22) * 0.02
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("position_ids"):
                    value.copy_(torch.arange(value.numel()).view(value.shape))
                elif value.dim() < 2:
                    value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                else:
                    repeats = -(-value.numel() // noise.numel())
                    value.copy_(noise.repeat(repeats)[: value.numel()].view(value.shape))
        return model

    unet = random(lambda: UNet2DConditionModel(
        sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, use_linear_projection=True))
    levels = 4
    vae = random(lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, scaling_factor=0.13025))
    text = random(lambda: CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407)))
    text_2 = random(lambda: CLIPTextModelWithProjection(CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407)))
    folder.mkdir(parents=True, exist_ok=True)
    merges = (ROOT / "src/assets/clip/merges.txt").read_text().splitlines()
    merges = [line for line in merges if line and not line.startswith("#version")]
    (folder / "words").mkdir(exist_ok=True)
    (folder / "words/vocab.json").write_text(json.dumps(vocabulary(merges)))
    (folder / "words/merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    files = [str(folder / "words/vocab.json"), str(folder / "words/merges.txt")]
    tokenizers = [CLIPTokenizer(*files, model_max_length=77, pad_token=pad) for pad in ("<|endoftext|>", "!")]
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    StableDiffusionXLPipeline(vae, text, text_2, *tokenizers, unet, scheduler).save_pretrained(folder)


def draw(folder, size, steps, dtype):
    """One image in diffusers; its own process, so that time and memory are its own."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    begin = time.monotonic()
    types = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=types[dtype])
    pipeline.set_progress_bar_config(disable=True)

    def told(what, since):
        print(f"time: {time.monotonic() - since:.2f} s {what}")

    def timed(call, what):
        def run(*args, **kwargs):
            since = time.monotonic()
            out = call(*args, **kwargs)
            told(what, since)
            return out

        return run

    told("loading", begin)
    pipeline.encode_prompt = timed(pipeline.encode_prompt, "encoding the prompts")
    pipeline.unet.forward = timed(pipeline.unet.forward, "a step")
    pipeline.vae.decode = timed(pipeline.vae.decode, "decoding")
    pipeline(PROMPT, height=size, width=size, num_inference_steps=steps, guidance_scale=5.0).images[0].save(
        folder / "diffusers.png"
    )


def process(command):
    """Seconds and peak memory in GiB of a process, and the lines that it wrote."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, text=True)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - begin
        said.seek(0)
        lines = said.read().splitlines()
    if status:
        sys.exit(f"{command[0]} failed:\n" + "\n".join(lines))
    return seconds, usage.ru_maxrss / 1024**2, lines


def measure(command):
    """Seconds, seconds of each step, and peak memory in GiB of a process that draws."""
    seconds, memory, lines = process(command)
    stages = [line.split(maxsplit=3) for line in lines if line.startswith("time:")]
    steps = [float(stage[1]) for stage in stages if stage[3] == "a step"]
    others = {stage[3]: float(stage[1]) for stage in stages if stage[3] != "a step"}
    loading = sum(taken for stage, taken in others.items() if stage.startswith("loading"))
    return {"whole": seconds, "first": steps[0], "further": steps[1:], "memory": memory, "loading": loading,
            "text": others["encoding the prompts"], "decoding": others["decoding"], "stages": others}


def run(args):
    size, steps = str(args.size), str(args.steps)
    ours = [args.program, "gen", "--verbose", "--base", str(args.folder), "--prompt", PROMPT, "--sampler", "euler",
            "--guidance", "5", "--width", size, "--height", size, "--dtype", args.dtype, "--steps", steps,
            "--out", str(args.folder / "difflora.png")]
    theirs = [sys.executable, __file__, "draw", str(args.folder), "--size", size, "--steps", steps, "--dtype", args.dtype]
    results = {"diffusers": [], "difflora": []}
    for _ in range(args.runs):
        for name, command in (("diffusers", theirs), ("difflora", ours)):
            results[name].append(measure(command))
            print(name, json.dumps(results[name][-1]), file=sys.stderr)
    if args.json:
        print(json.dumps(results, indent=1))
    print(f"| {size}×{size}, {steps} steps with guidance, {args.dtype}, medians of {args.runs} | diffusers | difflora | ratio |")
    print("|---|--:|--:|--:|")
    for key, figure in [("loading", "loading, s"), ("text", "encoding the prompts, s"), ("first", "first step, s"),
                        ("further", "a further step, s"), ("decoding", "decoding, s"), ("whole", "whole process, s"),
                        ("memory", "peak memory, GiB")]:
        values = {name: [row[key] for row in rows] for name, rows in results.items()}
        if key == "further":
            values = {name: [step for steps in rows for step in steps] for name, rows in values.items()}
        if all(values.values()):
            a, b = (statistics.median(values[name]) for name in ("diffusers", "difflora"))
            print(f"| {figure} | {a:.2f} | {b:.2f} | {b / a:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "draw"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", choices=["f32", "bf16", "f16"], default="f32")
    parser.add_argument("--runs", type=int, default=3, help="of each program")
    parser.add_argument("--program", default=str(ROOT / "target/release/difflora"))
    parser.add_argument("--json", action="store_true", help="also print every figure")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder)
    elif args.what == "draw":
        draw(args.folder, args.size, args.steps, args.dtype)
    else:
        run(args)


if __name__ == "__main__":
    main()
