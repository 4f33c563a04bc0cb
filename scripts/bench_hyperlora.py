"""From a photo to a LoRA by HyperLoRA at the released sizes: time and peak memory of `difflora gen`, with random weights.

    python scripts/bench_hyperlora.py FOLDER PROGRAM [--runs 3]

Makes HyperLoRA's four files (3.1 GB, f16), a CLIP ViT-L/14 (1.2 GB, f32), an ArcFace ResNet-100 and the configs of SDXL in
FOLDER, kept for the next time. The detector and the landmark network are the small ones of the tests, because random ones
of full size find no face. PROGRAM is difflora. Linux: peak memory is VmHWM by `wait4`.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SDXL = {
    "unet": {
        "in_channels": 4, "out_channels": 4, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10], "sample_size": 128, "layers_per_block": 2, "norm_num_groups": 32,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "vae": {
        "latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
    "text_encoder_2": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
}


def make(folder):
    from golden_hyperlora import full
    from golden_insightface import iresnet
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    full(folder / "weights")
    for name in ("clip", "faces"):
        (folder / name).mkdir(exist_ok=True)
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, projection_dim=768)
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, hidden_act="quick_gelu"))
    tensors = {name: value.contiguous() for name, value in clip.state_dict().items() if "position_ids" not in name}
    save_file(tensors, folder / "clip/model.safetensors", {"format": "pt"})
    (folder / "clip/config.json").write_text(json.dumps({"vision_config": clip.config.to_dict(), "projection_dim": 768}))
    (folder / "clip/preprocessor_config.json").write_text("{}")
    for source, target in {"scrfd": "scrfd_10g_bnkps", "landmarks": "2d106det"}.items():
        shutil.copy(ROOT / f"tests/data/golden/{source}.onnx", folder / f"faces/{target}.onnx")
    iresnet(str(folder / "faces/glintr100.onnx"), 0, (3, 13, 30, 3), (64, 128, 256, 512), 512)
    # Without a prompt no weight of the base is read but for its hash.
    shutil.copytree(ROOT / "src/assets/tiny/base", folder / "base", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    for part, settings in SDXL.items():
        path = folder / "base" / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (folder / "base/unet/diffusion_pytorch_model.safetensors").write_bytes(b"no weights")


def run(folder, program):
    options = {"hypernet": "weights", "image-encoder": "clip", "face-encoder": "faces", "base": "base", "lora-out": "me.safetensors"}
    command = [program, "gen", "--verbose", "--overwrite", "--ref", ROOT / "tests/data/astronaut.png"]
    for option, name in options.items():
        command += [f"--{option}", folder / name]
    start = time.time()
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"difflora failed: {status}")
    return time.time() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "base/unet/diffusion_pytorch_model.safetensors").exists():
        # In a process of its own: on Linux a child begins with its parent's peak memory.
        maker = multiprocessing.Process(target=make, args=(args.folder,))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("the weights could not be made")
    for _ in range(args.runs):
        wall, processor, memory = run(args.folder, args.program)
        print(f"{wall:.1f} s wall, {processor:.1f} s of processor time, {memory:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
