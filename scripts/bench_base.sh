#!/usr/bin/env bash
# Which recipe of the base's UNet learns fastest: variants of configs/base-tiny.toml on the same latents, with the same
# seeds and steps, measured by the attribute classifier along the way (OUT/NAME/training/unet-quality.jsonl).
#
#     scripts/bench_base.sh OUT [STEPS]    1,500 steps of 32; each variant resumes, a finished one is skipped
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: scripts/bench_base.sh OUT [STEPS]}
steps=${2:-1500}
difflora=${DIFFLORA:-$root/target/release/difflora}
mkdir -p "$out"
plain=$out/x0.toml
# 4,000 people, a small UNet, a linear rate, AdamW.
sed -E "s/^people = .*/people = 4000/; s/^steps = 3167/steps = $steps/; s/^steps = 3200/steps = 1200/; s/^batch = 64/batch = 32/
  s/^batch = 8\$/batch = 4/; s/decay = \"constant\"/decay = \"linear\"/; s/^ema = 0.999/ema = 0.998/
  s/^sheet_every = 2000/sheet_every = 500/; /^muon/d" "$root/configs/base-tiny.toml" > "$plain"
sed -E 's/^prediction_type = .*/prediction_type = "v_prediction"/; s/^velocity_floor = .*/velocity_floor = 0/' "$plain" > "$out/v.toml"
sed -E 's/^weight_decay = 1e-2$/&\nmuon = { momentum = 0.95, rate = 1.0 }/' "$plain" > "$out/x0-muon.toml"
sed -E '/^\[unet\]/,/^\[unet.plan\]/ s/^(head|features) = .*/\1 = 0/' "$plain" > "$out/x0-plain.toml"
sed -E 's/^noise_candidates = .*/noise_candidates = 4/' "$plain" > "$out/x0-near.toml"
resume() { # --resume where the folder holds a checkpoint of this training
  if [ -e "$1/training/$2.checkpoint.safetensors" ]; then echo --resume; fi
}
"$difflora" train-encoder --kind judge --out "$out/judge" --config "$root/configs/encoder-tiny.toml" $(resume "$out/judge" judge)
for name in x0 v x0-muon x0-plain x0-near; do
  if [ "$name" != x0 ] && [ ! -d "$out/$name" ]; then
    mkdir -p "$out/$name/training"
    cp -r "$out/x0/vae" "$out/$name/"
    cp "$out/x0/training/latents.safetensors" "$out/$name/training/"
  fi
  stage=unet
  [ "$name" = x0 ] && stage=all
  "$difflora" train-base --out "$out/$name" --config "$out/$name.toml" --stage $stage $(resume "$out/$name" unet) --judge "$out/judge"
done
