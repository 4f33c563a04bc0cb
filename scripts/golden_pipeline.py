"""Golden values for tests/parity/pipeline.rs: images of diffusers' StableDiffusionXLPipeline, and what leads to them.

    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python scripts/golden_pipeline.py [pipeline] [distilled]

Writes tiny random models of different structure into tests/data/golden/pipeline/ and distilled/, weights as f16, and
tests/data/golden/pipeline.safetensors and distilled.safetensors: final latents and pixels of every case, f32 arithmetic,
and for one case of each model the text encoders' outputs, the UNet's blocks and the VAE's output. The cases are in the
metadata.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from golden_samplers import KINDS
from golden_sdxl_parts import randomised, vocabulary
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

GOLDEN = Path(__file__).parent.parent / "tests/data/golden"
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
PROMPTS = [
    "a photo of a person, smiling",
    "naïve café — 日本語 🙂 ÀÉÎ",
    "a photo of an person wearing glasses, " * 12 + "red background",  # more than 77 tokens
    "",
]
NEGATIVES = [None, "", "lower, low"]
MODELS = {
    # SDXL in miniature: Euler, noise, leading.
    "two": dict(
        unet=dict(
            sample_size=8, layers_per_block=2, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2),
        ),
        vae=dict(block_out_channels=(4, 8), norm_num_groups=2, force_upcast=True, scaling_factor=0.13025 * 4),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
        zeros=True,
        sizes=[(16, 16), (24, 16)],
    ),
    # Three levels, no attention on the first, velocity, trailing; latents with a mean; sides that do not halve twice.
    "three": dict(
        unet=dict(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 8, 12), norm_num_groups=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(0, 1, 2), attention_head_dim=(1, 2, 3),
        ),
        vae=dict(
            block_out_channels=(4, 6, 8), norm_num_groups=2, force_upcast=False, scaling_factor=0.8,
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.0, 1.2],
        ),
        scheduler=DDIMScheduler(
            **SCHEDULE, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
        ),
        zeros=False,
        sizes=[(32, 32), (24, 32)],
    ),
}
# Distilled from SDXL: what SSD-1B, Segmind Vega, KOALA and LCM leave out, each in miniature.
DISTILLED = {
    # Single layers of other depth, another way up, a middle block of one ResNet block.
    "layers": dict(
        unet=dict(
            sample_size=8, layers_per_block=2, block_out_channels=(8, 8, 12), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, [2, 1], [1, 3]],
            reverse_transformer_layers_per_block=[[1, 2, 3], [2, 1, 1], 1],
            mid_block_type="UNetMidBlock2D", attention_head_dim=(1, 2, 3),
        ),
        vae=dict(block_out_channels=(4, 8), norm_num_groups=2, force_upcast=True, scaling_factor=0.13025 * 4),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
        zeros=True,
        sizes=[(16, 16), (24, 16)],
    ),
    # No middle block, and the guidance scale as an input.
    "guided": dict(
        unet=dict(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2), mid_block_type=None, time_cond_proj_dim=9,
        ),
        vae=dict(block_out_channels=(4, 8), norm_num_groups=2, force_upcast=True, scaling_factor=0.13025 * 4),
        scheduler=LCMScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
        zeros=True,
        sizes=[(16, 16), (24, 16)],
    ),
}
DETERMINISTIC = ["ddim", "euler", "dpmpp-2m", "dpmpp-2m-karras", "unipc"]


def text_encoders(folder, seed):
    """Two encoders of different width over one small vocabulary, in whose tokenizers only the padding differs."""
    for name, pad in [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")]:
        place = folder / name
        place.mkdir(parents=True)
        vocabulary(place)
        config = dict(
            tokenizer_class="CLIPTokenizer", model_max_length=77, bos_token="<|startoftext|>", pad_token=pad,
            eos_token="<|endoftext|>", unk_token="<|endoftext|>", do_lower_case=True, errors="replace",
            add_prefix_space=False,
        )
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = len(json.loads((folder / "tokenizer/vocab.json").read_text("utf-8")))
    sizes = dict(vocab_size=tokens, num_hidden_layers=2, num_attention_heads=2, bos_token_id=tokens - 2, eos_token_id=tokens - 1)
    one = CLIPTextConfig(**sizes, hidden_size=8, intermediate_size=16, hidden_act="quick_gelu")
    two = CLIPTextConfig(**sizes, hidden_size=12, intermediate_size=24, hidden_act="gelu", projection_dim=10)
    return randomised(CLIPTextModel(one), seed), randomised(CLIPTextModelWithProjection(two), seed + 1)


def build(name, model, folder, seed):
    one, two = text_encoders(folder, seed)
    unet = UNet2DConditionModel(
        **model["unet"], cross_attention_dim=20, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10,
    )
    levels = len(model["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        **model["vae"], layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )
    tokenizers = [CLIPTokenizer.from_pretrained(folder / part) for part in ("tokenizer", "tokenizer_2")]
    pipe = StableDiffusionXLPipeline(
        vae=randomised(vae, seed + 2), text_encoder=one, text_encoder_2=two, tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=randomised(unet, seed + 3), scheduler=model["scheduler"],
        force_zeros_for_empty_prompt=model["zeros"], add_watermarker=False,
    )
    kept = folder.with_name("tokenizers")
    kept.mkdir()
    for part in ("tokenizer", "tokenizer_2"):
        shutil.move(folder / part, kept / part)
    pipe.to(torch.float16).save_pretrained(folder)
    for part in ("tokenizer", "tokenizer_2"):  # as SDXL ships them, not as transformers 5 writes them
        shutil.rmtree(folder / part)
        shutil.move(kept / part, folder / part)
    kept.rmdir()
    return pipe.to(torch.float32)


def main():
    names = sys.argv[1:] or ["pipeline", "distilled"]
    if "pipeline" in names:
        write("pipeline", MODELS, DETERMINISTIC, [1, 4, 20], [1.0, 5.0, 9.0])
    if "distilled" in names:
        write("distilled", DISTILLED, ["euler"], [4], [1.0, 5.0])


def write(file, models, samplers, step_counts, guidances):
    root = GOLDEN / file
    shutil.rmtree(root, ignore_errors=True)
    tensors, cases = {}, []
    for seed, (name, model) in enumerate(models.items()):
        folder = root / name
        folder.mkdir(parents=True)
        pipe = build(name, model, folder, 10 * seed)
        pipe.set_progress_bar_config(disable=True)
        own = pipe.scheduler.config
        factor = pipe.vae_scale_factor
        generator = torch.Generator().manual_seed(7)
        starts = {size: torch.randn(1, 4, size[1] // factor, size[0] // factor, generator=generator) for size in model["sizes"]}
        noise = {size: torch.randn(20, *start.shape[1:], generator=generator) for size, start in starts.items()}
        for (width, height), start in starts.items():
            tensors[f"{name}.start.{width}x{height}"] = start
            tensors[f"{name}.noise.{width}x{height}"] = noise[width, height][:4]

        def draw(kind, steps, guidance, size, **more):
            number = len(cases)
            prompt, negative = PROMPTS[number % len(PROMPTS)], NEGATIVES[number % len(NEGATIVES)]
            extra = dict(clip_sample=False) if kind == "ddim" else {}
            if kind == "dpmpp-2m-karras":
                extra = dict(use_karras_sigmas=True)
            pipe.scheduler = KINDS[kind].from_config(own, **extra)  # in `own` a default would be dropped
            fresh = iter(noise[size])
            for module in (scheduling_euler_ancestral_discrete, scheduling_lcm):
                module.randn_tensor = lambda shape, **_: next(fresh)[None]
            kept = {}

            def keep(pipe, i, t, state):
                kept["latents"] = state["latents"].clone()
                return {}

            image = pipe(
                prompt, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance, width=size[0],
                height=size[1], latents=starts[size].clone(), output_type="np", callback_on_step_end=keep, **more,
            ).images[0]
            tensors[f"{number}.latents"] = kept["latents"]
            tensors[f"{number}.pixels"] = torch.from_numpy((image * 255).round().astype("uint8"))
            cases.append(dict(model=name, sampler=kind, steps=steps, guidance=guidance, width=size[0], height=size[1], prompt=prompt, negative=negative) | {k: list(v) for k, v in more.items()})

        for kind, steps, guidance, size in itertools.product(samplers, step_counts, guidances, model["sizes"]):
            draw(kind, steps, guidance, size)
        for kind, steps in itertools.product(["euler-a", "lcm"], [1, 4]):
            draw(kind, steps, 5.0, model["sizes"][1])
        draw("euler", 4, 5.0, model["sizes"][0], original_size=(40, 72), target_size=(56, 24), crops_coords_top_left=(8, 16))
        pipe.scheduler = model["scheduler"]
        parts(name, pipe, starts[model["sizes"][1]], tensors)
    tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
    save_file(tensors, GOLDEN / f"{file}.safetensors", metadata={"cases": json.dumps(cases)})
    size = sum(path.stat().st_size for path in [*root.rglob("*.*"), GOLDEN / f"{file}.safetensors"] if path.is_file())
    print(len(cases), "cases,", size, "bytes with the models")


def parts(name, pipe, latents, tensors):
    """What each part of the model makes of the second prompt, so that a fault is found where it is."""
    handles = []

    def watch(module, part):
        def hook(module, inputs, output):
            tensors[f"{name}.unet.{part}"] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(hook))

    unet = pipe.unet
    watch(unet.conv_in, "conv_in")
    if unet.mid_block is not None:
        watch(unet.mid_block, "mid_block")
    for kind in ("down_blocks", "up_blocks"):
        for i, block in enumerate(getattr(unet, kind)):
            watch(block, f"{kind}.{i}")
    with torch.no_grad():
        for tokenizer, encoder, part in [
            (pipe.tokenizer, pipe.text_encoder, "text_encoder"),
            (pipe.tokenizer_2, pipe.text_encoder_2, "text_encoder_2"),
        ]:
            ids = tokenizer(PROMPTS[1], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            out = encoder(ids, output_hidden_states=True)
            tensors[f"{name}.{part}.penultimate"] = out.hidden_states[-2]
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS[1], do_classifier_free_guidance=False)
        tensors[f"{name}.context"], tensors[f"{name}.pooled"] = context, pooled
        height, width = [side * pipe.vae_scale_factor for side in latents.shape[2:]]
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        added = dict(text_embeds=pooled, time_ids=sizes)
        width = unet.config.time_cond_proj_dim
        told = pipe.get_guidance_scale_embedding(torch.tensor([5.0 - 1]), width) if width else None
        tensors[f"{name}.unet.out"] = unet(
            latents, torch.tensor(601.0), context, timestep_cond=told, added_cond_kwargs=added
        ).sample
        tensors[f"{name}.vae"] = pipe.vae.decode(latents).sample
    for handle in handles:
        handle.remove()


if __name__ == "__main__":
    main()
