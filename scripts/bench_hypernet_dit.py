"""The diffusion transformer of configs/hypernet-sdxl.toml at its true size, in PyTorch and in difflora in turn: 50 DDIM
steps for one person, and a training step (forward, backward, AdamW, moving average), in f32 with random weights.

    cargo build --release --locked --bench dit
    python scripts/bench_hypernet_dit.py [--batch 4] [--steps 4] [--bench PROGRAM]

Memory is the peak of the whole process, sampling first. Needs torch and 6 GB of memory.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LATENT, TOKEN, FACE, IMAGE = 38_556, 612, 512, 1024


def twin(batch, steps):
    import torch
    from diffusers import DDIMScheduler

    from golden_hypernet import Dit, Mixer

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    torch.manual_seed(0)
    dit, mixer = Dit(LATENT, TOKEN, 768, 12, 12), Mixer(FACE, IMAGE, 768)
    weights = [*dit.parameters(), *mixer.parameters()]
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(50)
    begin = time.perf_counter()
    with torch.no_grad():
        condition = mixer(torch.randn(1, FACE), torch.randn(1, IMAGE))[0]
        x = torch.randn(1, LATENT)
        for t in scheduler.timesteps:
            x = scheduler.step(dit(x, t[None], condition), t, x).prev_sample
    sampling, sampling_peak = time.perf_counter() - begin, peak()

    optimiser = torch.optim.AdamW(weights, lr=1e-4)
    average = [weight.detach().clone() for weight in weights]
    face, image, x0 = torch.randn(batch, FACE), torch.randn(batch, IMAGE), torch.randn(batch, LATENT)
    times = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        t = torch.randint(0, 1000, (batch,))
        x_t = scheduler.add_noise(x0, torch.randn_like(x0), t)
        loss = ((dit(x_t, t, mixer(face, image)[0]) - x0) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1e-4)
        times.append(time.perf_counter() - begin)
    print(json.dumps({
        "parameters": sum(weight.numel() for weight in weights), "sampling_s": sampling, "sampling_mb": sampling_peak,
        "step_s": min(times[1:]), "step_mb": peak(),
    }))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--bench", help="the built bench; by itself the newest of target/release/deps")
    parser.add_argument("--twin", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.twin:
        return twin(args.batch, args.steps)
    sizes = ["--batch", str(args.batch), "--steps", str(args.steps)]
    built = [path for path in (ROOT / "target/release/deps").glob("dit-*") if not path.suffix]
    if not (args.bench or built):
        sys.exit("build it first: cargo build --release --locked --bench dit")
    bench = args.bench or str(max(built, key=lambda path: path.stat().st_mtime))
    run = lambda command: json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    theirs = run([sys.executable, __file__, "--twin", *sizes])
    ours = run([bench, *sizes])
    print(f"{ours['parameters'] / 1e6:.1f} million weights (PyTorch {theirs['parameters'] / 1e6:.1f}), batch {args.batch}")
    print(f"{'':<28} {'PyTorch':>10} {'difflora':>10} {'ratio':>7}")
    for name, key in [
        ("50 DDIM steps, s", "sampling_s"), ("peak memory after them, MB", "sampling_mb"),
        ("training step, s", "step_s"), ("peak memory, MB", "step_mb"),
    ]:
        print(f"{name:<28} {theirs[key]:>10.2f} {ours[key]:>10.2f} {ours[key] / theirs[key]:>7.2f}")


if __name__ == "__main__":
    main()
