"""Writes tests/data/golden/train_lora.safetensors: LoRA training with peft and diffusers on a tiny SDXL.

    pip install -r scripts/requirements.txt && python scripts/golden_train_lora.py

The loss is that of diffusers' examples/dreambooth/train_dreambooth_lora_sdxl.py: mean squared error to noise or velocity,
prior loss on the second half of the batch, min-SNR weights from compute_snr. For velocities min-SNR is divided by
SNR + 1, as in train_text_to_image_lora_sdxl.py and in the paper. Noise, timesteps and token numbers are stored, so that
no generator has to be shared.
"""
import json

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

STEPS, RANK, SIDE = 10, 2, (6, 4)
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
UNET = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(4, 8),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=1, attention_head_dim=2, cross_attention_dim=14, norm_num_groups=2,
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 6,
)
TEXT = dict(vocab_size=40, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=7, bos_token_id=38,
            eos_token_id=39, pad_token_id=39, projection_dim=6)
CASES = {
    "plain": {},
    "clip": dict(clip=0.05),
    "prior": dict(prior=0.7),
    "min_snr": dict(gamma=5.0),
    "velocity": dict(prediction="v_prediction", gamma=5.0, accumulate=2),
    "conv": dict(targets="conv"),
    "text": dict(text=True, clip=1.0),
}


def randomised(model, seed):
    """All parameters random, rounded to 16 bits so that the file can keep 16."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        fan = value[0].numel() if value.ndim > 1 else 1
        norm = "norm" in name and name.endswith("weight")
        value.data = (1 + 0.2 * noise if norm else noise * (0.2 if value.ndim == 1 else fan**-0.5)).half().float()
    return model.eval().requires_grad_(False)


def models():
    unet = randomised(UNet2DConditionModel(**UNET), 1)
    one = CLIPTextModel(CLIPTextConfig(**TEXT, hidden_size=6, intermediate_size=10, hidden_act="quick_gelu"))
    two = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_size=8, intermediate_size=12, hidden_act="gelu"))
    return {"unet": unet, "text_encoder": randomised(one, 2), "text_encoder_2": randomised(two, 3)}


def encode(parts, ids):
    one = parts["text_encoder"](ids, output_hidden_states=True)
    two = parts["text_encoder_2"](ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds


def ours(part, name):
    """A module of ours: the UNet's without prefix, the text encoders' with text_model, which transformers 5 dropped."""
    if part == "unet":
        return name
    return f"{part}.{name}" if name.startswith("text_model.") else f"{part}.text_model.{name}"


def factors(parts):
    """Every LoRA factor by our name."""
    found = {}
    for part, model in parts.items():
        for name, value in model.named_parameters():
            if ".lora_" in name:
                module, kind = name.removesuffix(".default.weight").rsplit(".", 1)
                found[("down." if kind == "lora_A" else "up.") + ours(part, module)] = value
    return found


tensors, settings = {}, {}
for part, model in models().items():
    for name, value in model.named_parameters():
        tensors[f"{part}.{name}"] = value.half()
    config = json.loads(model.to_json_string()) if part == "unet" else model.config.to_dict()
    settings[part] = config if part == "unet" else config | {"architectures": [type(model).__name__]}

generator = torch.Generator().manual_seed(4)
normal = lambda *shape: torch.randn(*shape, generator=generator)
images, samples = 3, 2
x0 = normal(images + 2, 4, *SIDE)  # the person's, then those of the class
ids = torch.randint(0, 38, (images + 2, 7), generator=generator)
ids[:, 0], ids[:, 5:] = 38, 39
time_ids = torch.tensor([[48.0, 32, 0, 8, 48, 32], [96, 64, 4, 0, 48, 32], [48, 32, 0, 0, 48, 32]] + 2 * [[48, 32, 0, 0, 48, 32]])
passes = 2 * STEPS
draws = dict(
    chosen=torch.cat([torch.randint(0, images, (passes, samples), generator=generator),
                      torch.arange(images, images + 2).repeat(passes, 1)], 1),
    t=torch.randint(0, 1000, (passes, 2 * samples), generator=generator),
    eps=normal(passes, 2 * samples, 4, *SIDE),
)
tensors |= {"x0": x0, "ids": ids, "time_ids": time_ids} | draws

for case, options in CASES.items():
    parts = models()
    targets = ATTENTION
    if options.get("targets") == "conv":
        targets = [name for name, module in parts["unet"].named_modules()
                   if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")]
    config = lambda targets: LoraConfig(r=RANK, lora_alpha=2 * RANK, init_lora_weights=True, target_modules=targets)
    torch.manual_seed(5)
    parts["unet"].add_adapter(config(targets))
    trained = ["unet"]
    if options.get("text"):
        for part in ("text_encoder", "text_encoder_2"):
            parts[part].add_adapter(config(["q_proj", "k_proj", "v_proj", "out_proj"]))
            trained.append(part)
    all_factors = factors(parts)
    starts = {name: value for name, value in all_factors.items() if name.startswith("down.")}
    if case in ("plain", "conv", "text"):  # the others start as "plain"
        tensors |= {f"{case}.start.{name}": value.detach().clone() for name, value in starts.items()}
    groups = [dict(params=[v for n, v in all_factors.items() if "text_encoder" not in n], lr=1e-2)]
    if options.get("text"):
        groups.append(dict(params=[v for n, v in all_factors.items() if "text_encoder" in n], lr=2e-3))
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              prediction_type=options.get("prediction", "epsilon"))
    n = 2 * samples if "prior" in options else samples
    accumulate, losses = options.get("accumulate", 1), []
    for step in range(STEPS):
        mean = 0.0
        for micro in range(accumulate):
            at = step * accumulate + micro
            chosen, t, noise = draws["chosen"][at, :n], draws["t"][at, :n], draws["eps"][at, :n]
            context, pooled = encode(parts, ids[chosen])
            noisy = scheduler.add_noise(x0[chosen], noise, t)
            out = parts["unet"](noisy, t, context,
                                added_cond_kwargs=dict(text_embeds=pooled, time_ids=time_ids[chosen])).sample
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(x0[chosen], noise, t) if velocity else noise
            prior = 0.0
            if "prior" in options:
                out, out_prior = out.chunk(2)
                target, target_prior = target.chunk(2)
                t = t.chunk(2)[0]
                prior = options["prior"] * F.mse_loss(out_prior, target_prior)
            if "gamma" in options:
                snr = compute_snr(scheduler, t)
                weights = snr.clamp(max=options["gamma"]) / (snr + 1 if velocity else snr)
                loss = (F.mse_loss(out, target, reduction="none").mean((1, 2, 3)) * weights).mean() + prior
            else:
                loss = F.mse_loss(out, target) + prior
            (loss / accumulate).backward()
            mean += loss.item() / accumulate
        losses.append(mean)
        if step == 0:
            for name, value in all_factors.items():
                if value.grad is not None:
                    tensors[f"{case}.grad.{name}"] = value.grad.clone()
        if "clip" in options:
            torch.nn.utils.clip_grad_norm_(all_factors.values(), options["clip"])
        optimiser.step()
        optimiser.zero_grad()
    tensors[f"{case}.losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors |= {f"{case}.end.{name}": value.detach().clone() for name, value in all_factors.items()}
    settings[case] = options

settings = {name: json.dumps(value) for name, value in settings.items()}
save_file({k: v.contiguous() for k, v in tensors.items()}, "tests/data/golden/train_lora.safetensors", metadata=settings)
