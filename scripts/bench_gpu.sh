#!/bin/bash
# What a GPU machine has to show: the same images as on the CPU, then time and memory at SDXL's true size beside diffusers.
#
#     scripts/bench_gpu.sh FOLDER [PROGRAM]
#
# FOLDER is an SDXL in diffusers' layout (`python scripts/bench_diffusers.py make FOLDER` makes one with random weights),
# PROGRAM a difflora built with `--features cuda` or `cuda,cudnn` (by default target/release/difflora). Needs a driver, the
# CUDA libraries and Python with PyTorch for CUDA, diffusers and Pillow; PYTHON names the interpreter. Where there is no
# GPU it says that it was skipped, and ends with exit code 77.
set -euo pipefail
folder=${1:?usage: scripts/bench_gpu.sh FOLDER [PROGRAM]}
program=${2:-"$(dirname "$0")/../target/release/difflora"}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> "$work/why"; then
    echo "skipped: PyTorch finds no CUDA GPU here; nothing was measured"
    tail -1 "$work/why" >&2
    exit 77
fi
# PyTorch's wheels carry the CUDA libraries that the program needs.
LD_LIBRARY_PATH=$("$python" -c 'import glob, nvidia; print(":".join(d for p in nvidia.__path__ for d in sorted(glob.glob(p + "/*/lib"))))' 2> /dev/null || true):${LD_LIBRARY_PATH:-}
export LD_LIBRARY_PATH
date -u
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

echo "## The built-in model in f32, CPU beside CUDA"
for device in cpu cuda; do
    "$program" gen --quiet --device $device --dtype f32 --prompt "a photo of a person, smiling" --steps 10 --seed 1 \
        --ref "$(dirname "$0")/../tests/data/astronaut.png" --out "$work/$device.png" --lora-out "$work/$device.safetensors"
done
"$python" - "$work" <<'PY'
import sys
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

work = sys.argv[1]
cpu, cuda = (np.asarray(Image.open(f"{work}/{device}.png")).astype(int) for device in ("cpu", "cuda"))
print(f"largest difference of the images: {abs(cpu - cuda).max()} of 255 (2 or less is expected)")
cpu, cuda = (load_file(f"{work}/{device}.safetensors") for device in ("cpu", "cuda"))
apart = max(float(abs(cpu[key].astype("f4") - cuda[key].astype("f4")).max()) for key in cpu)
print(f"largest difference of the LoRAs: {apart:.1e}")
if abs(np.asarray(Image.open(f"{work}/cpu.png")).astype(int) - np.asarray(Image.open(f"{work}/cuda.png"))).max() > 2:
    sys.exit("the images differ: figures of speed would mean nothing")
PY

# Peak memory of the GPU while a command runs, MiB.
watched() {
    (while :; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; sleep 0.1; done) > "$work/memory" 2>&1 &
    local watcher=$!
    "$@"
    kill $watcher
    wait $watcher 2> /dev/null || true
    echo "peak GPU memory: $(sort -n "$work/memory" | tail -1) MiB"
}

echo "## A image of 1024×1024, f16, 30 steps with guidance"
for steps in 1 31; do
    echo "difflora, $steps steps, whole process:"
    watched bash -c "time '$program' gen --quiet --base '$folder' --device cuda --dtype f16 --sampler euler --guidance 5 \
        --width 1024 --height 1024 --steps $steps --prompt 'a photo of a person' --out '$work/big.png'"
done
cat > "$work/draw.py" <<'PY'
import sys, time
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float16).to("cuda")
pipeline.set_progress_bar_config(disable=True)
if sys.argv[2] == "compiled":
    pipeline.unet = torch.compile(pipeline.unet)
def draw(steps):
    torch.cuda.synchronize()
    begin = time.monotonic()
    pipeline("a photo of a person", height=1024, width=1024, num_inference_steps=steps, guidance_scale=5.0)
    torch.cuda.synchronize()
    return time.monotonic() - begin
draw(2)
one, many = draw(1), draw(31)
print(f"diffusers {sys.argv[2]}: a step {(many - one) / 30:.3f} s, an image of 30 steps {one + 29 * (many - one) / 30:.2f} s, "
      f"peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
PY
for how in eager compiled; do "$python" "$work/draw.py" "$folder" $how; done

echo "## One photo → LoRA with the built-in hypernetwork, whole process, three times"
for _ in 1 2 3; do
    bash -c "time '$program' gen --quiet --device cuda --ref '$(dirname "$0")/../tests/data/astronaut.png' --lora-out '$work/one.safetensors'"
done
