"""Trains the LoRA autoencoder of configs/hypernet-sdxl.toml at its true size for a few steps, in PyTorch and in difflora
in turn, on the same random LoRAs, and compares the time of a step and the memory of the whole processes.

    python scripts/bench_lae.py make FOLDER     # 20 random LoRAs of SDXL's attention at rank 8, 0.5 GB in 16 bits
    python scripts/bench_lae.py run FOLDER [--steps 4] [--batch 4]

Both take squared error + 0.1 · L_WP, noise on the latents, AdamW, and a moving average of the weights, in f32 on all
cores. Needs torch, numpy and safetensors, 10 GB of memory, and a release build (`cargo build --release --locked`).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RANK, PATCH, COMPONENTS, NARROW, CHANNELS = 8, 5120, 17, 64, 8


def modules():
    """Attention projections of SDXL's UNet as (path, outputs, inputs)."""
    places = [("down_blocks.1", 2, 2, 640), ("down_blocks.2", 2, 10, 1280), ("mid_block", 1, 10, 1280)]
    places += [("up_blocks.0", 3, 10, 1280), ("up_blocks.1", 3, 2, 640)]
    for place, attentions, blocks, width in places:
        for a in range(attentions):
            for b in range(blocks):
                for attention, inputs in [("attn1", width), ("attn2", 2048)]:
                    path = f"{place}.attentions.{a}.transformer_blocks.{b}.{attention}"
                    yield f"{path}.to_q", width, width
                    yield f"{path}.to_k", width, inputs
                    yield f"{path}.to_v", width, inputs
                    yield f"{path}.to_out.0", width, width


def make(folder):
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for part in ["loras", "embeddings"]:
        (folder / part).mkdir(exist_ok=True)
    rows = []
    for person in range(22):
        torch.manual_seed(person)
        lora = {}
        for path, out, inputs in modules():
            lora[f"unet.{path}.lora_A.weight"] = (torch.randn(RANK, inputs) * 0.02).half()
            lora[f"unet.{path}.lora_B.weight"] = (torch.randn(out, RANK) * 0.01).half()
        name = f"p{person:02d}.safetensors"
        save_file(lora, folder / "loras" / name)
        save_file({"face": torch.randn(1, 512), "image": torch.randn(1, 1024)}, folder / "embeddings" / name)
        row = {"id": f"p{person:02d}", "split": "train" if person < 20 else "held-out", "person": [1, person]}
        row |= {"lora": f"loras/{name}", "embeddings": f"embeddings/{name}", "loss": 0.1, "settings": "random"}
        rows.append(json.dumps(row) + "\n")
    (folder / "manifest.jsonl").write_text("".join(rows))
    model = {"name": "random", "sha256": "0" * 64}
    header = {"base": model, "face_encoder": model, "image_encoder": model}
    (folder / "dataset.json").write_text(json.dumps(header))


def twin(folder, steps, batch):
    """The same training in PyTorch; prints its figures as JSON."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from torch import nn

    def vector(path):
        lora = load_file(path)
        parts = []
        for name, _, _ in sorted(modules()):
            parts.append(lora[f"unet.{name}.lora_B.weight"].float().flatten())
            parts.append(lora[f"unet.{name}.lora_A.weight"].float().T.flatten())
        return torch.cat(parts)

    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    data = torch.stack([vector(folder / row["lora"]) for row in rows if row["split"] == "train"])
    p = data.shape[1]
    data -= data.mean(0)
    data /= data.std()

    class Correction(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.widen = nn.Linear(NARROW, CHANNELS), nn.Linear(CHANNELS, NARROW)
            self.position = nn.Parameter(torch.randn(p // NARROW, CHANNELS) * 0.02)
            nn.init.zeros_(self.widen.weight), nn.init.zeros_(self.widen.bias)

        def forward(self, x):
            h = F.gelu(self.narrow(x.view(len(x), -1, NARROW)) + self.position, approximate="tanh")
            return x + self.widen(h).view(len(x), p)

    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            patches = p // PATCH
            self.basis = nn.Parameter(torch.randn(patches, COMPONENTS, PATCH) / PATCH**0.5)
            self.before, self.after = Correction(), Correction()

        def encode(self, x):
            x = self.before(x).view(len(x), -1, PATCH).transpose(0, 1)  # (patches, B, patch)
            return torch.bmm(x, self.basis.transpose(1, 2))

        def decode(self, z):
            return self.after(torch.bmm(z, self.basis).transpose(0, 1).reshape(z.shape[1], p))

    model = Local()
    average = [weight.detach().clone() for weight in model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, foreach=True)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        x = data[torch.randint(len(data), (batch,))]
        z = model.encode(x)
        z = z + torch.randn_like(z) * 0.05 * z.detach().square().mean().sqrt()
        error = x - model.decode(z)
        loss = error.square().mean() + 0.1 * (x.abs() * error.abs()).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 0.001)
        times.append(time.perf_counter() - start)
    # The first step makes the moments; difflora's has them before.
    with torch.no_grad():
        start = time.perf_counter()
        model.decode(torch.randn(p // PATCH, 1, COMPONENTS))
        decode = time.perf_counter() - start
    print(json.dumps({"step": sum(times[1:]) / len(times[1:]), "decode": decode, "parameters": p}))


def measure(command):
    """Runs a command; gives its standard output and the most memory it held, in GB."""
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    return output, usage.ru_maxrss / 1e6


def ours(program, folder, steps, batch):
    sweep = folder / "sweep.toml"
    plan = f'plan = {{ steps = {steps}, batch = {batch}, shards = 1 }}'
    sweep.write_text(f'[[variant]]\nname = "true-size"\n{plan}\n')
    out = folder / "out"
    command = [program, "train-lae", "--dataset", folder, "--out", out, "--sweep", sweep, "--memory", "2.5"]
    command += ["--config", ROOT / "configs/hypernet-sdxl.toml", "--json", "--quiet"]
    output, memory = measure(command)
    report = json.loads(output)[0]["report"]
    last = json.loads((out / "true-size/training/lae.jsonl").read_text().splitlines()[-1])
    figures = {"step": batch / last["samples_a_second"], "decode": report["decode_seconds"]}
    return figures | {"memory": memory, "parameters": report["parameters"], "latent": report["latent"]}


def run(program, folder, steps, batch):
    output, memory = measure([sys.executable, __file__, "twin", folder, "--steps", steps, "--batch", batch])
    theirs = json.loads(output) | {"memory": memory}
    figures = ours(program, folder, steps, batch)
    if figures["parameters"] != theirs["parameters"]:
        sys.exit(f"vectors of {figures['parameters']} and {theirs['parameters']} values")
    print(f"{figures['parameters']} values in {figures['latent']}")
    for name, unit in [("step", "s a step"), ("decode", "s to decode one LoRA"), ("memory", "GB at most")]:
        a, b = theirs[name], figures[name]
        print(f"{unit:>22}: PyTorch {a:.2f}, difflora {b:.2f}, ratio {b / a:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "twin"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "target/release/difflora")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder)
    elif args.what == "run":
        run(args.program, args.folder, args.steps, args.batch)
    else:
        twin(args.folder, args.steps, args.batch)


if __name__ == "__main__":
    main()
