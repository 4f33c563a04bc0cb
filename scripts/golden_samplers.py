"""Golden values for src/diffusion: tables and final latents of diffusers' DDIMScheduler and EulerDiscreteScheduler.

    python scripts/golden_samplers.py     # writes tests/data/golden/samplers.json

Needs torch, diffusers 0.42.1. The denoiser is the toy `0.3*x + 0.0005*t - 0.1`: linear, but dependent on both.
"""

import itertools
import json
import pathlib

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def toy(x, t):
    return 0.3 * x + 0.0005 * float(t) - 0.1


def run(kind, config, steps, eta, start, noise):
    extra = dict(clip_sample=False, set_alpha_to_one=config.get("set_alpha_to_one", True)) if kind == "ddim" else {}
    known = {k: v for k, v in config.items() if k != "set_alpha_to_one" and not (kind == "ddim" and k == "final_sigmas_type")}
    scheduler = (DDIMScheduler if kind == "ddim" else EulerDiscreteScheduler)(**known, **extra)
    scheduler.set_timesteps(steps)
    x = start * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        output = toy(scheduler.scale_model_input(x, t), t)
        if kind == "ddim":
            x = scheduler.step(output, t, x, eta=eta, variance_noise=noise[i] if eta > 0 else None).prev_sample
        else:
            x = scheduler.step(output, t, x).prev_sample
    return dict(
        sampler=kind,
        config={**config, "clip_sample": False, "_class_name": type(scheduler).__name__},
        steps=steps,
        eta=eta,
        timesteps=[float(t) for t in scheduler.timesteps],
        sigmas=[float(s) for s in scheduler.sigmas] if kind == "euler" else [],
        initial_sigma=float(scheduler.init_noise_sigma),
        final=x.tolist(),
    )


def main():
    torch.manual_seed(0)
    start = torch.randn(4)
    noise = torch.randn(20, 4)
    cases = []
    for kind, spacing, steps, prediction in itertools.product(
        ["ddim", "euler"], ["leading", "trailing", "linspace"], [1, 4, 20], ["epsilon", "v_prediction", "sample"]
    ):
        config = dict(SDXL, timestep_spacing=spacing, prediction_type=prediction)
        cases.append(run(kind, config, steps, 0.0, start, noise))
    for eta in [0.5, 1.0]:
        cases.append(run("ddim", dict(SDXL, timestep_spacing="leading"), 20, eta, start, noise))
    odd = [  # one setting changed at a time
        dict(SDXL, set_alpha_to_one=False),
        dict(SDXL, final_sigmas_type="sigma_min"),
        dict(SDXL, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type="sample"),
        dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        dict(SDXL, num_train_timesteps=500, timestep_spacing="trailing"),
    ]
    for config, kind, steps in itertools.product(odd, ["ddim", "euler"], [7, 20]):
        cases.append(run(kind, config, steps, 0.0, start, noise))
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
