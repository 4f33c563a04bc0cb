"""Draws with our base model and our LoRA in diffusers, and compares with the image that difflora drew.

    difflora gen --lora me.safetensors --prompt "a photo of sks person" --init-latents noise.safetensors \\
        --sampler ddim --steps 20 --guidance 3 --out ours.png
    python scripts/check_diffusers.py --base DIR --lora me.safetensors --prompt "a photo of sks person" \\
        --init-latents noise.safetensors --sampler ddim --steps 20 --guidance 3 --expect ours.png

Prints which weights the LoRA changes and the largest difference of a pixel; fails when it is above --max-difference.
Without --init-latents it makes them from --seed (and writes them with --write-latents), without --expect it only
draws. Needs Python with the packages of scripts/requirements.txt; it runs offline, on the CPU, in f32.
"""

import argparse
import pathlib
import sys

try:
    import numpy as np
    import torch
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UniPCMultistepScheduler,
    )
    from PIL import Image
    from safetensors.torch import load_file, save_file
except ImportError as missing:
    sys.exit(f"{missing}\nThis check needs Python packages: pip install -r scripts/requirements.txt")

# The samplers without fresh noise. DDIM clips x0 by default, which is meant for pixels.
SAMPLERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, type=pathlib.Path, help="diffusers folder of the base model")
    parser.add_argument("--lora", type=pathlib.Path, help="LoRA file; without it the base alone")
    parser.add_argument("--lora-scale", type=float, default=1.0)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--init-latents", type=pathlib.Path, help="tensor `latents` (1, C, H/f, W/f), unit normal")
    parser.add_argument("--write-latents", type=pathlib.Path, help="where to put latents made from --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--expect", type=pathlib.Path, help="picture that difflora drew")
    parser.add_argument("--out", type=pathlib.Path, help="where to put the image that diffusers drew")
    parser.add_argument("--max-difference", type=int, default=2, help="of 255, allowed for a pixel (default 2)")
    return parser.parse_args()


def load_lora(pipe, path, scale):
    """Loads and merges the file; every layer in it must have changed a weight."""
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    layers = sum(key.endswith(("lora_up.weight", "lora_B.weight")) for key in load_file(path))
    print(f"{path.name}: {layers} layers, {len(changed)} weights of the UNet changed")
    return len(changed) == layers


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    pipe = StableDiffusionXLPipeline.from_pretrained(
        args.base, torch_dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    scheduler, extra = SAMPLERS[args.sampler]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **extra)
    complete = load_lora(pipe, args.lora, args.lora_scale) if args.lora else True

    if args.init_latents:
        latents = load_file(args.init_latents)["latents"].float()
    else:
        side = pipe.unet.config.sample_size
        latents = torch.randn(1, pipe.unet.config.in_channels, side, side)
        if args.write_latents:
            save_file({"latents": latents}, args.write_latents)
    factor = pipe.vae_scale_factor
    image = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        latents=latents,
        height=latents.shape[2] * factor,
        width=latents.shape[3] * factor,
    ).images[0]
    if args.out:
        image.save(args.out)
    if not complete:
        sys.exit("diffusers did not use every layer of the LoRA")
    if args.expect:
        ours = np.asarray(Image.open(args.expect).convert("RGB"), dtype=int)
        theirs = np.asarray(image, dtype=int)
        if ours.shape != theirs.shape:
            sys.exit(f"difflora drew {ours.shape}, diffusers {theirs.shape}")
        difference = np.abs(ours - theirs)
        print(f"largest difference of a pixel {difference.max()} of 255, mean {difference.mean():.4f}")
        if difference.max() > args.max_difference:
            sys.exit(f"more than {args.max_difference}")


if __name__ == "__main__":
    main()
