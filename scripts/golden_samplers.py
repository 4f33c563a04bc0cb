"""Golden values for src/diffusion: tables and final latents of diffusers' schedulers.

    OMP_NUM_THREADS=1 python scripts/golden_samplers.py     # writes tests/data/golden/samplers.json

Needs torch, diffusers 0.42.1. The denoiser is the toy `0.3*x + 0.0005*t - 0.1`: linear, but dependent on both. The
schedulers are made from the config as `SCHEDULER.from_config` makes them, and their fresh noise is the file's.
"""

import itertools
import json
import pathlib

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm

SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
KINDS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
    "dpmpp-2m-karras": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
SPACINGS = ["leading", "trailing", "linspace"]


def toy(x, t):
    return 0.3 * x + 0.0005 * float(t) - 0.1


def run(kind, config, steps, eta, start, noise):
    extra = dict(clip_sample=False) if kind == "ddim" else {}
    if kind == "dpmpp-2m-karras":
        extra = dict(use_karras_sigmas=True)
    scheduler = KINDS[kind].from_config(dict(config, **extra))
    scheduler.set_timesteps(steps)
    fresh = iter(noise)
    for module in (scheduling_euler_ancestral_discrete, scheduling_lcm):
        module.randn_tensor = lambda shape, **_: next(fresh)
    x = (start * scheduler.init_noise_sigma)[None]
    for i, t in enumerate(scheduler.timesteps):
        output = toy(scheduler.scale_model_input(x, t), t)
        extra = dict(eta=eta, variance_noise=noise[i][None] if eta > 0 else None) if kind == "ddim" else {}
        x = scheduler.step(output, t, x, **extra).prev_sample
    levels = kind not in ("ddim", "lcm")
    return dict(
        sampler=kind,
        config={**config, "clip_sample": False, "_class_name": type(scheduler).__name__},
        steps=steps,
        eta=eta,
        timesteps=[rounded(t) for t in scheduler.timesteps],
        sigmas=[rounded(s) for s in scheduler.sigmas] if levels else [],
        initial_sigma=rounded(scheduler.init_noise_sigma),
        final=[rounded(value) for value in x[0]],
    )


def rounded(value):
    """Nine digits tell every f32 from its neighbours."""
    return float(f"{float(value):.9g}")


def main():
    torch.manual_seed(0)
    start = torch.randn(4)
    noise = torch.randn(20, 4)
    cases = []

    def add(kind, config, steps, eta=0.0):
        cases.append(run(kind, config, steps, eta, start, noise))

    predictions = ["epsilon", "v_prediction", "sample"]
    for kind, spacing, steps, prediction in itertools.product(["ddim", "euler"], SPACINGS, [1, 4, 20], predictions):
        add(kind, dict(SDXL, timestep_spacing=spacing, prediction_type=prediction), steps)
    for eta in [0.5, 1.0]:
        add("ddim", dict(SDXL, timestep_spacing="leading"), 20, eta)
    for kind, spacing, steps in itertools.product(list(KINDS)[2:], SPACINGS, [1, 4, 20]):
        for prediction in predictions[:2]:
            add(kind, dict(SDXL, timestep_spacing=spacing, prediction_type=prediction), steps)
    odd = [  # one setting changed at a time
        dict(SDXL),
        dict(SDXL, set_alpha_to_one=False),
        dict(SDXL, final_sigmas_type="sigma_min"),
        dict(SDXL, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction"),
        dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        dict(SDXL, num_train_timesteps=500, timestep_spacing="trailing"),
        dict(SDXL, use_karras_sigmas=True),
        dict(SDXL, use_karras_sigmas=True, timestep_spacing="leading", final_sigmas_type="sigma_min"),
        dict(SDXL, lower_order_final=False, final_sigmas_type="sigma_min"),
        dict(SDXL, euler_at_final=True, final_sigmas_type="sigma_min"),
        dict(SDXL, original_inference_steps=40, timestep_scaling=3.0),
    ]
    for config, kind, steps in itertools.product(odd, KINDS, [7, 20]):
        if kind == "dpmpp-2m-karras" and config.get("beta_schedule") == "squaredcos_cap_v2":
            continue  # refused by difflora
        if kind == "lcm" and "beta_schedule" in config and "beta_start" not in config:
            continue  # LCMScheduler has other defaults for β
        add(kind, config, steps)
    alphas = {}
    for name in ["linear", "scaled_linear", "squaredcos_cap_v2"]:
        for rescale in [False, True]:
            scheduler = DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=rescale)
            alphas[f"{name}{' rescaled' if rescale else ''}"] = scheduler.alphas_cumprod[::37].tolist() + [
                float(scheduler.alphas_cumprod[-1])
            ]
    out = pathlib.Path(__file__).parent.parent / "tests/data/golden/samplers.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    golden = dict(start=start.tolist(), noise=noise.tolist(), alphas_bar=alphas, cases=cases)
    out.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")
    print(f"{len(cases)} cases, {out.stat().st_size} bytes: {out}")


if __name__ == "__main__":
    main()
