#!/usr/bin/env bash
# What a GPU machine has to show, in sections that can be asked for singly; a table last, figures in $OUT/figures.jsonl.
#
#     scripts/gpu.sh [--device cuda] [--small] [--program FILE] [--bench FILE] [--sdxl FOLDER] [SECTION...]
#
#     check    60 s  every layer and its gradients on the GPU against the CPU; the built-in model likewise, f32, f16, bf16
#     ops      60 s  each layer at SDXL's shapes beside PyTorch, forward and backward, f16 and bf16
#     draw    240 s  SDXL at true size, random weights, 512² and 1024², beside diffusers eager and compiled
#     train   180 s  train-lora at true size beside diffusers and peft; many small LoRAs; LAE and DiT
#     photo    60 s  one photo → LoRA, whole process
#     world   480 s  the small world from nothing: VAE, UNet, encoders, LoRAs, LAE, DiT
#
# All of them if none is named. The machine needs a driver and Python with PyTorch for CUDA, whose wheels carry the CUDA
# libraries; `draw` and `train` also diffusers, transformers, peft and Pillow. The program and the bench `gpu` are built
# elsewhere and carried in:
#
#     cargo build --release --locked --features cuda,cudnn && cargo build --release --locked --features cuda,cudnn --bench gpu
#     strip target/release/difflora target/release/deps/gpu-*; tar cJf gpu.tar.xz …
#
# `--device cpu --small` runs everything at tiny sizes on a CPU, to see that the script works. OUT is ./gpu-results
# unless it is set, PYTHON the interpreter.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
device=cuda small= program=$root/target/release/difflora bench= sdxl= inside= sections=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?}; shift ;;
    --small) small=1 ;;
    --program) program=${2:?}; shift ;;
    --bench) bench=${2:?}; shift ;;
    --sdxl) sdxl=${2:?}; shift ;;
    --inside) inside=${2:?}; shift ;;
    check | ops | draw | train | photo | world) sections+=("$1") ;;
    *) echo "unknown argument $1; see the head of $0" >&2; exit 2 ;;
  esac
  shift
done
python=${PYTHON:-python3}
export OUT=${OUT:-$PWD/gpu-results}
mkdir -p "$OUT/work"
OUT=$(cd "$OUT" && pwd)
work=$OUT/work
bench=${bench:-$(ls -t "$root"/target/release/deps/gpu-* 2>/dev/null | grep -v '\.d$' | head -1 || true)}
# PyTorch's wheels carry the CUDA libraries that the program needs.
libraries=$("$python" -c 'import glob, nvidia; print(":".join(d for p in nvidia.__path__ for d in sorted(glob.glob(p + "/*/lib"))))' 2>/dev/null || true)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if [ -n "$small" ]; then dtypes=(f32); else dtypes=(f32 f16 bf16); fi

figure() { # figure NAME VALUE UNIT [GOAL]
  printf '{"section": "%s", "name": "%s", "value": %s, "unit": "%s", "goal": "%s"}\n' \
    "$inside" "$1" "$2" "$3" "${4:-}" >> "$OUT/figures.jsonl"
}

ratio() { awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.3f", a / b; else print "null" }'; }

seconds() { # seconds COMMAND...: runs it, its output in the section's log, and prints how long it took
  local begin=$EPOCHREALTIME
  "$@" >> "$OUT/$inside.log" 2>&1
  awk -v a="$begin" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.3f", b - a }'
}

watched() { # watched NAME COMMAND...: seconds, with the peak memory of the GPU as a figure
  local name=$1 watcher=
  shift
  if command -v nvidia-smi > /dev/null; then
    (while :; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; sleep 0.1; done) > "$work/memory" 2>&1 &
    watcher=$!
  fi
  seconds "$@"
  if [ -n "$watcher" ]; then
    kill "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    figure "$name, peak memory" "$(sort -n "$work/memory" | tail -1)" MiB
  fi
}

photo=$root/tests/data/astronaut.png

section_check() {
  "$bench" check --device "$device" > "$OUT/check.jsonl" 2>> "$OUT/check.log" || figure "a layer differs" 1 "" "see check.jsonl"
  figure "layers and types that are right" "$(grep -c '"ok":true' "$OUT/check.jsonl")" "of $(wc -l < "$OUT/check.jsonl")" all
  for which in cpu "$device"; do for dtype in "${dtypes[@]}"; do
    [ "$which $dtype" = "cpu f32" ] || [ "$which" != cpu ] || continue
    "$program" gen --quiet --device "$which" --dtype "$dtype" --prompt "a photo of a person, smiling" --steps $((10 - 8 * ${small:-0})) \
      --seed 1 --ref "$photo" --out "$work/$which-$dtype.png" --lora-out "$work/$which-$dtype.safetensors" >> "$OUT/check.log" 2>&1
  done; done
  for dtype in "${dtypes[@]}"; do
    figure "built-in model $dtype, largest difference of images" \
      "$("$python" "$root/scripts/gpu.py" apart "$work/cpu-f32.png" "$work/$device-$dtype.png")" "of 255" "f32: 2"
  done
}

section_ops() {
  local types=(float16 bfloat16) option=()
  if [ -n "$small" ]; then types=(float32) option=(--small --seconds 0.01); fi
  for dtype in "${types[@]}"; do
    "$bench" ops --device "$device" --dtype "$dtype" ${option[@]+"${option[@]}"} > "$work/ours-$dtype.json" 2>> "$OUT/ops.log"
    "$python" "$root/scripts/gpu.py" ops --device "$device" --dtype "$dtype" ${option[@]+"${option[@]}"} > "$work/theirs-$dtype.json" 2>> "$OUT/ops.log"
    "$python" "$root/scripts/gpu.py" compare "$work/ours-$dtype.json" "$work/theirs-$dtype.json" "$dtype" >> "$OUT/figures.jsonl"
  done
}

need_sdxl() { # an SDXL of random weights at true size, or the built-in one
  if [ -n "$small" ]; then base=tiny; return; fi
  base=${sdxl:-$work/sdxl}
  [ -e "$base/model_index.json" ] || "$python" "$root/scripts/bench_diffusers.py" make "$base" >> "$OUT/$inside.log" 2>&1
}

section_draw() {
  need_sdxl
  local sizes=(1024 512) types=(f16 bf16) count=12
  if [ -n "$small" ]; then sizes=(64) types=(f32) count=3; fi
  for dtype in "${types[@]}"; do for size in "${sizes[@]}"; do
    figure "$size² $dtype, $count steps, whole process" "$(watched "$size² $dtype" "$program" gen --verbose --base "$base" \
      --device "$device" --dtype "$dtype" --sampler euler --guidance 5 --width "$size" --height "$size" --steps "$count" \
      --seed 1 --prompt 'a photo of a person' --out "$work/draw.png")" s
    local step
    step=$(grep '^time:.* a step' "$OUT/draw.log" | tail -$((count - 2)) | awk '{print $2}' | sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }')
    figure "$size² $dtype, a step" "${step:-null}" s
    [ -z "$small" ] || continue
    for how in eager compiled; do
      local theirs
      theirs=$("$python" "$root/scripts/gpu.py" draw "$base" --size "$size" --dtype "$dtype" --how $how 2>> "$OUT/draw.log") || continue
      figure "$size² $dtype, a step of diffusers $how" "$theirs" s
      figure "$size² $dtype, difflora / diffusers $how" "$(ratio "${step:-0}" "$theirs")" "" "$([ $how = eager ] && echo '≤ 1.0' || echo '≤ 1.1')"
    done
  done; done
}

section_train() {
  need_sdxl
  local size=1024 many=11 images=$work/images
  if [ -n "$small" ]; then size=64 many=3; fi
  mkdir -p "$images"
  "$python" -c "
from PIL import Image
for i in range(3): Image.effect_noise(($size, $size), 40 + 10 * i).convert('RGB').save(f'$images/{i}.png')"
  train() {
    "$program" train-lora "$images" --quiet --device "$device" --base "$base" --rank 16 --batch 1 --targets attn \
      --resolution $size --dtype "$([ -n "$small" ] && echo f32 || echo bf16)" --out "$work/person.safetensors" --steps "$1"
  }
  local one all
  one=$(seconds train 1)
  all=$(watched "train-lora $size²" train "$many")
  figure "train-lora $size², a step" "$(awk -v a="$one" -v b="$all" -v n=$((many - 1)) 'BEGIN { printf "%.4f", (b - a) / n }')" s
  if [ -z "$small" ]; then
    local theirs
    theirs=$("$python" "$root/scripts/gpu.py" train "$base" --size $size 2>> "$OUT/train.log") && figure "train-lora $size², a step of diffusers and peft" "$theirs" s "≤ 1.0"
  fi
  world_configs
  figure "8 small LoRAs together" "$(seconds "$program" build-dataset --quiet --device "$device" --config "$work/configs/dataset-tiny.toml" --out "$work/loras")" s
  figure "train-lae" "$(seconds "$program" train-lae --quiet --device "$device" --dataset "$work/loras" --out "$work/lae" --config "$work/configs/hypernet-tiny.toml")" s
  figure "train-dit" "$(seconds "$program" train-dit --quiet --device "$device" --dataset "$work/loras" --lae "$work/lae" --out "$work/hypernet" --config "$work/configs/hypernet-tiny.toml")" s
}

section_photo() {
  for i in 1 2 3; do
    figure "photo → LoRA, whole process, run $i" "$(seconds "$program" gen --quiet --device "$device" --ref "$photo" --lora-out "$work/photo.safetensors")" s "≤ 0.5 warm"
  done
}

world_configs() { # few people and steps
  rm -rf "$work/configs"
  cp -r "$root/configs" "$work/configs"
  local c=$work/configs
  sed -i -E 's/^people = 6000/people = 60/' "$c/base-tiny.toml"
  sed -i -E 's/^train = .*/train = 8/; s/^held_out = .*/held_out = 2/; s/^people_per_batch = .*/people_per_batch = 8/; s/^steps = [0-9]+/steps = 2/' "$c/dataset-tiny.toml"
  sed -i -E 's/^steps = [0-9]+/steps = 5/; s/^batch = [0-9]+/batch = 4/' "$c/hypernet-tiny.toml"
  sed -i -E 's/^steps = [0-9]+/steps = 3/' "$c/encoder-tiny.toml"
}

section_world() {
  local w=$work/world c=$root/configs steps=()
  mkdir -p "$w"
  if [ -n "$small" ]; then world_configs; c=$work/configs steps=(--steps 2); fi
  stage() { local name=$1; shift; figure "$name" "$(seconds "$@" --quiet --device "$device" || echo null)" s; }
  stage VAE "$program" train-base --out "$w/base" --config "$c/base-tiny.toml" --stage vae --minutes 1 ${steps[@]+"${steps[@]}"}
  stage UNet "$program" train-base --out "$w/base" --config "$c/base-tiny.toml" --stage unet --minutes 3 ${steps[@]+"${steps[@]}"}
  stage "image encoder" "$program" train-encoder --kind image --out "$w/image" --config "$c/encoder-tiny.toml" --minutes 1 ${steps[@]+"${steps[@]}"}
  stage LoRAs "$program" build-dataset --out "$w/loras" --config "$c/dataset-tiny.toml" --base "$w/base" --image-encoder "$w/image"
  stage LAE "$program" train-lae --dataset "$w/loras" --out "$w/lae" --config "$c/hypernet-tiny.toml"
  stage DiT "$program" train-dit --dataset "$w/loras" --lae "$w/lae" --out "$w/hypernet" --config "$c/hypernet-tiny.toml"
  figure "samples a second of the UNet" "$(tail -1 "$w/base/training/unet.jsonl" 2>/dev/null | "$python" -c 'import json, sys; print(json.loads(sys.stdin.read() or "{}").get("samples_a_second", "null"))')" 1/s "≥ 0.5 × PyTorch"
}

if [ -n "$inside" ]; then
  "section_$inside"
  exit
fi

[ ${#sections[@]} -gt 0 ] || sections=(check ops draw train photo world)
: > "$OUT/figures.jsonl"
date -u
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no NVIDIA GPU here"
declare -A limits=([check]=60 [ops]=60 [draw]=240 [train]=180 [photo]=60 [world]=480)
options=(--device "$device" --program "$program" --bench "$bench" ${small:+--small} ${sdxl:+--sdxl "$sdxl"})
failed=0
for section in "${sections[@]}"; do
  begin=$SECONDS
  : > "$OUT/$section.log"
  # A CPU may take longer over tiny sizes than a GPU over true ones.
  timeout -k 5 $((limits[$section] * (1 + 4 * ${small:-0}))) bash "$0" "${options[@]}" --inside "$section" || { status=$?; failed=1; echo "$section: exit code $status ($OUT/$section.log)"; tail -3 "$OUT/$section.log"; }
  echo "$section: $((SECONDS - begin)) s"
done
"$python" "$root/scripts/gpu.py" table "$OUT/figures.jsonl"
exit $failed
