#!/usr/bin/env bash
# The built-in bundle `tiny`, from nothing, by this program alone, on the CPU.
#
#     scripts/make-tiny.sh OUT            the recipe of configs/, see tests/bench/RESULTS.md for times
#     scripts/make-tiny.sh OUT --quick    a few steps of everything, to see that it runs
#     scripts/make-tiny.sh OUT --install  afterwards put the bundle into src/assets/tiny
#     scripts/make-tiny.sh OUT --device cuda   everything on a GPU; never run
#
# Every stage goes on where it was stopped; a stage that is finished is skipped. Delete its folder to train it again.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: scripts/make-tiny.sh OUT [--quick] [--install]}
shift
quick= install= features=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --install) install=1 ;;
    --device)
      export DIFFLORA_DEVICE=${2:?--device needs a value: cpu, cuda or cuda:N}
      case $DIFFLORA_DEVICE in cuda*) features=(--features cuda) ;; esac
      shift
      ;;
    *) echo "unknown flag $1" >&2; exit 2 ;;
  esac
  shift
done

cargo build --release --locked ${features[@]+"${features[@]}"} --manifest-path "$root/Cargo.toml"
difflora=$root/target/release/difflora
mkdir -p "$out"
out=$(cd "$out" && pwd)
configs=$out/configs
if [ ! -d "$configs" ]; then
  cp -r "$root/configs" "$configs"
  if [ -n "$quick" ]; then
    # Few people and few steps; the networks keep their sizes.
    sed -i -E 's/^people = 15000/people = 300/; s/^steps = [0-9]+/steps = 40/' "$configs"/base-tiny*.toml
    sed -i -E 's/^steps = [0-9]+/steps = 20/' "$configs/encoder-tiny.toml" "$configs/hypernet-tiny.toml"
    sed -i -E 's/^batch = 64/batch = 32/' "$configs/hypernet-tiny.toml" # at most half the people
    sed -i -E 's/^train = .*/train = 80/; s/^held_out = .*/held_out = 4/; s/^steps = [0-9]+/steps = 3/' "$configs/dataset-tiny.toml"
  fi
fi

stage() { # stage NAME COMMAND...: runs it once, and says how long it took
  local name=$1 start=$SECONDS
  shift
  if [ -e "$out/$name.done" ]; then
    echo "$name: done before"
    return
  fi
  "$@"
  touch "$out/$name.done"
  echo "$name: $((SECONDS - start)) s" | tee -a "$out/times.txt"
}

resume() { # --resume where OUT holds a checkpoint of the training NAME
  if [ -e "$1/training/$2.checkpoint.safetensors" ]; then echo --resume; fi
}

start=$out/base-start base=$out/base image=$out/image_encoder judge=$out/judge data=$out/dataset lae=$out/lae hypernet=$out/hypernet
stage vae "$difflora" train-base --out "$start" --config "$configs/base-tiny.toml" --stage vae $(resume "$start" vae)
stage unet "$difflora" train-base --out "$start" --config "$configs/base-tiny.toml" --stage unet $(resume "$start" unet)
if [ ! -d "$base/training" ]; then
  # The same latents, which take a while to encode.
  mkdir -p "$base/training"
  cp -r "$start/vae" "$base/vae"
  cp "$start/training/latents.safetensors" "$base/training/"
fi
stage unet-decay "$difflora" train-base --out "$base" --config "$configs/base-tiny-decay.toml" --stage unet --from "$start" \
  $(resume "$base" unet)
stage image-encoder "$difflora" train-encoder --kind image --out "$image" --config "$configs/encoder-tiny.toml" $(resume "$image" image)
stage judge "$difflora" train-encoder --kind judge --out "$judge" --config "$configs/encoder-tiny.toml" $(resume "$judge" judge)
stage dataset "$difflora" build-dataset --out "$data" --config "$configs/dataset-tiny.toml" --base "$base" \
  --image-encoder "$image" --repeatability 16
stage lae "$difflora" train-lae --dataset "$data" --out "$lae" --config "$configs/hypernet-tiny.toml" $(resume "$lae" lae)
stage dit "$difflora" train-dit --dataset "$data" --lae "$lae" --out "$hypernet" --config "$configs/hypernet-tiny.toml" \
  $(resume "$hypernet" dit)
stage eval "$difflora" eval --dataset "$data" --hypernet "$hypernet" --base "$base" --image-encoder "$image" \
  --judge "$judge" --out "$out/eval" --images 8

if [ -n "$install" ]; then
  bundle=$root/src/assets/tiny
  mkdir -p "$bundle"
  for part in base hypernet image_encoder judge; do
    rm -rf "${bundle:?}/$part"
    cp -r "$out/$part" "$bundle/$part"
    rm -rf "$bundle/$part/training"
  done
  # Inside the program these models have the name of the bundle.
  sed -i -E 's#"name": "(base|image_encoder)"#"name": "tiny"#' "$bundle/hypernet/config.json"
  du -sh "$bundle"
fi
