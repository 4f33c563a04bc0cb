r"""HyperLoRA's networks and face preparation, written with PyTorch, Pillow and onnxruntime from a description of them.

    python scripts/golden_hyperlora.py tests/data/golden        # golden files of the unit and parity tests
    python scripts/golden_hyperlora.py --full DIR               # random weights of the released sizes, 3.1 GB

`hyperlora/` is a folder as released, with random weights and small sizes of which no two are equal; `hyperlora.safetensors`
holds conditions of two photos and what the networks make of them in float64, every layer apart. `face_crops.json` holds
random outlines and the hashes of Pillow's crops of them. `landmarks.onnx` has the blocks of 2d106det (normalisation, convolutions,
depthwise convolutions, one matrix) and few channels.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from golden_insightface import Graph
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file

EPS = 1e-5
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], EPS)


def attention(q, kv, w, name, heads):
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-3, -2)
    q, k, v = split(q @ w[f"{name}.to_q.weight"].T), split(kv @ w[f"{name}.to_k.weight"].T), split(kv @ w[f"{name}.to_v.weight"].T)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2) @ w[f"{name}.to_out.0.weight"].T


def id_projector(e, w):
    width = w["2.weight"].shape[0]
    return norm(F.linear(e, w["0.weight"], w["0.bias"]).unflatten(-1, (-1, width)), w, "2")


def resampler(x, y, w, heads):
    """What each layer makes of the queries, and the output: lists of (B, N, D), and (B, N, K)."""
    x = F.linear(x, w["proj_in.weight"], w["proj_in.bias"])
    y = F.linear(y, w["proj_in_2.weight"], w["proj_in_2.bias"])
    z, states = w["latents"].expand(len(x), -1, -1), []
    while f"layers.{len(states)}.norm_ff.weight" in w:
        at = f"layers.{len(states)}."
        t = norm(z, w, at + "norm_attn1")
        z = z + attention(t, t, w, at + "attn1", heads)
        z = z + attention(norm(z, w, at + "norm_attn2_l"), norm(x, w, at + "norm_attn2_x"), w, at + "attn2", heads)
        z = z + attention(norm(z, w, at + "norm_attn3_l"), norm(y, w, at + "norm_attn3_y"), w, at + "attn3", heads)
        h = F.gelu(F.linear(norm(z, w, at + "norm_ff"), w[at + "ff.net.0.proj.weight"], w[at + "ff.net.0.proj.bias"]))
        z = z + F.linear(h, w[at + "ff.net.2.weight"], w[at + "ff.net.2.bias"])
        states.append(z)
    return states, F.linear(z, w["proj_out.weight"], w["proj_out.bias"])


def unit(z):
    return z / (z.square().sum(-1, keepdim=True) + 1e-8).sqrt()


def factors(coefficients, bases, module):
    """down (R, in) and up (out, R) of the four projections."""
    mixed = lambda row, name: torch.einsum("k,kij->ij", coefficients[row], bases[name]).T
    for number, projection in enumerate(PROJECTIONS):
        row = 8 * module + 2 * number
        yield projection, mixed(row, f"{module}.{projection}.id_down_basis"), mixed(row + 1, f"{module}.{projection}.id_up_basis")


def weights(s, modules, random):
    """The three files; `random(*shape)` gives their numbers."""
    d, inner = s["width"], s["inner"]
    projector = {"0.weight": random(s["tokens"] * s["face_width"], s["face"]), "0.bias": random(s["tokens"] * s["face_width"])}
    projector |= {"2.weight": random(s["face_width"]), "2.bias": random(s["face_width"])}
    r = {"latents": random(1, 8 * len(modules), d)}
    for name, shape in {"proj_in": (d, s["face_width"]), "proj_in_2": (d, s["clip_width"]), "proj_out": (s["outputs"], d)}.items():
        r |= {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0])}
    for i in range(s["depth"]):
        for name in ("norm_attn1", "norm_attn2_l", "norm_attn2_x", "norm_attn3_l", "norm_attn3_y", "norm_ff"):
            r |= {f"layers.{i}.{name}.weight": random(d), f"layers.{i}.{name}.bias": random(d)}
        for attn in ("attn1", "attn2", "attn3"):
            r |= {f"layers.{i}.{attn}.{name}.weight": random(inner, d) for name in ("to_q", "to_k", "to_v")}
            r[f"layers.{i}.{attn}.to_out.0.weight"] = random(d, inner)
        for name, shape in {"ff.net.0.proj": (s["hidden"], d), "ff.net.2": (d, s["hidden"])}.items():
            r |= {f"layers.{i}.{name}.weight": random(*shape), f"layers.{i}.{name}.bias": random(shape[0])}
    bases, k, rank = {}, s["outputs"], s["rank"]
    for i, (hidden, context) in enumerate(modules.values()):
        for projection in PROJECTIONS:
            inputs = context or hidden
            inputs = inputs if projection in ("to_k", "to_v") else hidden
            bases[f"{i}.{projection}.id_down_basis"] = random(k, inputs, rank)
            bases[f"{i}.{projection}.id_up_basis"] = random(k, rank, hidden)
    return projector, r, bases


def save_folder(folder, modules, files):
    folder.mkdir(parents=True, exist_ok=True)
    listed = {name: {"hidden_size": hidden, "cross_attention_dim": context} for name, (hidden, context) in modules.items()}
    (folder / "hyper_lora_modules.json").write_text(json.dumps(listed, indent=2))
    for name, tensors in zip(("id_projector", "resampler", "hyper_lora_modules"), files):
        save_file(tensors, folder / f"{name}.safetensors")
        os.chmod(folder / f"{name}.safetensors", 0o644)


def sdxl_modules():
    """All attention modules of SDXL's UNet: down, up, mid, as diffusers lists them."""
    places = [("down_blocks_1", 2, 2, 640), ("down_blocks_2", 2, 10, 1280), ("up_blocks_0", 3, 10, 1280), ("up_blocks_1", 3, 2, 640), ("mid_block", 1, 10, 1280)]
    modules = {}
    for block, attentions, depth, width in places:
        for a in range(attentions):
            for t in range(depth):
                stem = f"lora_unet_{block}_attentions_{a}_transformer_blocks_{t}_attn"
                modules |= {f"{stem}1": (width, None), f"{stem}2": (width, 2048)}
    assert len(modules) == 140
    return modules


def full(folder):
    torch.manual_seed(0)
    sizes = dict(width=1024, inner=768, tokens=16, face=512, face_width=1024, clip_width=1024, outputs=128, depth=4, hidden=4096, rank=8)
    save_folder(Path(folder), sdxl_modules(), weights(sizes, sdxl_modules(), lambda *shape: (torch.randn(shape) * 0.03).half()))


def network(folder):
    rng = torch.Generator().manual_seed(20)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_{}_attn{}".format
    modules = {stem(0, 2): (12, 16), stem(0, 1): (12, None), stem(1, 1): (14, None), stem(1, 2): (14, 16)}
    sizes = dict(width=20, inner=24, tokens=3, face=10, face_width=13, clip_width=18, outputs=5, depth=2, hidden=36, rank=4)
    random = lambda *shape: torch.randn(shape, generator=rng) * 0.5
    files = weights(sizes, modules, random)
    save_folder(folder / "hyperlora", modules, files)
    projector, r, bases = ({name: tensor.double() for name, tensor in file.items()} for file in files)
    face, clip = F.normalize(random(2, 10), dim=-1), random(2, 7, 18)
    x = id_projector(face.double(), projector)
    states, out = resampler(x, clip.double(), r, heads=3)
    golden = {"face": face, "clip": clip, "x": x, "out": out, "mean": unit(out.mean(0)), "mixed": unit(0.3 * out[0] + 0.7 * out[1])}
    golden |= {f"z{i}": z for i, z in enumerate(states)}
    for module in range(len(modules)):
        for projection, down, up in factors(golden["mean"], bases, module):
            name = f"{list(modules)[module]}.{projection}"
            golden |= {f"{name}.down": down, f"{name}.up": up, f"{name}.delta": 0.5 * up @ down}
    save_file({name: value.float().contiguous() for name, value in golden.items()}, folder / "hyperlora.safetensors")
    os.chmod(folder / "hyperlora.safetensors", 0o644)


OUTLINE = [1, *range(9, 17), *range(2, 9), 0, *range(24, 17, -1), *range(32, 24, -1), 17, 101, 105, 104, 103, 102, 50, 51, 49, 48, 43]


def crops(photo, points):
    """The crops that CLIP and ArcFace are shown."""
    box = lambda cx, cy, half: tuple(int(np.rint(edge)) for edge in (cx - half, cy - half, cx + half, cy + half))
    span = lambda p: np.float32(max(np.ptp(p[:, 0]), np.ptp(p[:, 1])))
    outline = points[OUTLINE]
    (cx, cy), half = outline.mean(0, dtype=np.float32), np.float32(0.8) * span(outline)
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).polygon([tuple(map(float, point)) for point in outline], fill=255)
    where = box(cx, cy, half)
    part, mask = photo.crop(where), mask.crop(where)
    mask = mask.resize((512, 512), Image.BICUBIC).filter(ImageFilter.GaussianBlur(15)).resize(part.size, Image.BICUBIC)
    canvas = Image.new("RGB", photo.size, (127, 127, 127))
    canvas.paste(part, (int(cx - half), int(cy - half)), mask)
    low, high = points.min(0), points.max(0)
    (cx, cy), half = (low + high) / np.float32(2), np.float32(0.75) * span(points)
    cy = cy - np.float32(0.125) * half
    return canvas.crop(box(cx, cy, half)), photo.crop(box(cx, cy, 2 * half))


def faces(folder):
    """Outlines of faces, of stars and of noise, inside the photo and across its edges."""
    rng, cases = np.random.default_rng(5), []
    y, x = np.mgrid[:120, :160]
    photo = Image.fromarray(np.stack([(7 * x + 13 * y + 29 * c) % 256 for c in range(3)], -1).astype(np.uint8))
    for case in range(24):
        centre, size = rng.uniform((30, 20), (130, 100)), rng.uniform(12, 45)
        angle = np.linspace(0, 2 * np.pi, 43, endpoint=False) + rng.uniform(0, 6)
        radius = size * (1 + rng.uniform(-0.05, 0.05, 43) * (1 + 6 * (case % 3)))
        points = centre + rng.uniform(-0.6, 0.6, (106, 2)) * size
        points[OUTLINE] = centre + np.stack([np.cos(angle), 1.2 * np.sin(angle)], 1) * radius[:, None]
        if case % 4 == 3:
            points = np.rint(points)
        points = points.astype(np.float32)
        known = lambda crop: {"size": crop.size, "sha256": hashlib.sha256(crop.tobytes()).hexdigest()}
        clip, arcface = map(known, crops(photo, points))
        cases.append({"points": points.tolist(), "clip": clip, "arcface": arcface})
    (folder / "face_crops.json").write_text(json.dumps(cases) + "\n")


def landmarks(folder):
    """A graph like 2d106det's, and its points of a face whose box is known, by onnxruntime."""
    g = Graph(106)
    x = g.node("Mul", g.node("Sub", "input.1", g.weight(127.5), name="_minusscalar0"), g.weight(1 / 128), name="_mulscalar0")
    channels = 3
    for width, stride in ((6, 2), (8, 2), (8, 2), (10, 2), (10, 2)):
        if channels > 3:
            kernel = g.weight(g.rng.normal(size=(channels, 1, 3, 3)) * 0.4)
            x = g.node("Conv", x, kernel, group=channels, kernel_shape=[3, 3], strides=[stride] * 2, pads=[1] * 4)
            x = g.prelu(g.norm(x, channels), channels)
            stride = 1
        x = g.prelu(g.norm(g.conv(x, channels, width, 1 if channels > 3 else 3, stride), width), width)
        channels = width
    x = g.node("Flatten", x, axis=1)
    numbers = channels * 36
    # The points lie around an oval within the crop, as far as a face's do.
    angle = np.linspace(0, 2 * np.pi, 43, endpoint=False) + np.pi
    mean = g.rng.uniform(-0.3, 0.3, (106, 2))
    mean[OUTLINE] = np.stack([0.55 * np.cos(angle), -0.6 * np.sin(angle)], 1)
    weight = g.rng.normal(size=(212, numbers)) * 0.04 / np.sqrt(numbers)
    g.node("Gemm", x, g.weight(weight), g.weight(mean.ravel()), transB=1, output="fc1")
    session = g.save(str(folder / "landmarks.onnx"), 192, [("fc1", [1, 212])])
    os.chmod(folder / "landmarks.onnx", 0o644)

    photo = Image.open("tests/data/astronaut.png").convert("RGB")
    box = np.float32([178.6, 63.6, 269.1, 173.8])
    scale = 192 / (1.5 * float(max(box[2] - box[0], box[3] - box[1])))
    shift = 96 - scale * (box[:2].astype(float) + box[2:]) / 2
    shown = bilinear(np.asarray(photo, float), scale, shift, 192)
    values = session.run(None, {"input.1": shown.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
    points = ((values.reshape(106, 2) + 1) * 96 - shift) / scale
    save_file({"box": torch.from_numpy(box), "points": torch.from_numpy(points).float()}, folder / "landmarks.safetensors")
    os.chmod(folder / "landmarks.safetensors", 0o644)


def bilinear(image, scale, shift, side):
    """What x -> scale x + shift brings the image to, black beyond its edge, rounded to bytes."""
    v, u = np.mgrid[:side, :side]
    x, y = (u - shift[0]) / scale, (v - shift[1]) / scale
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    left, top, shown = np.floor(x), np.floor(y), 0
    for dy, wy in ((0, 1 - (y - top)), (1, y - top)):
        for dx, wx in ((0, 1 - (x - left)), (1, x - left)):
            columns = np.clip(left + dx + 1, 0, padded.shape[1] - 1).astype(int)
            rows = np.clip(top + dy + 1, 0, padded.shape[0] - 1).astype(int)
            shown = shown + (wx * wy)[..., None] * padded[rows, columns]
    return np.rint(shown)


if __name__ == "__main__":
    if sys.argv[1] == "--full":
        full(sys.argv[2])
    else:
        network(Path(sys.argv[1]))
        faces(Path(sys.argv[1]))
        landmarks(Path(sys.argv[1]))
