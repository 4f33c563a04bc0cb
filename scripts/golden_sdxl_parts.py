r"""Golden numbers for tests/parity/sdxl_parts.rs: VAE, text encoders, image encoder and tokenizer.

    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python scripts/golden_sdxl_parts.py tests/data/golden

Small random models of diffusers and transformers, all parameters random (norms and biases too, which start at ones
and zeros and would hide mistakes). Each file holds `weights.*`, inputs, outputs and the gradients `grad.*` of a random
weighting of the outputs; the config is in the metadata.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)


def randomised(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        fan = value[0].numel() if value.ndim > 1 else 1
        norm = "norm" in name and name.endswith("weight")
        value.data = 1 + 0.2 * noise if norm else noise * (0.3 if value.ndim == 1 else fan**-0.5)
    return model.eval()


def loss(outputs, seed):
    """Σ output · random, and the randoms."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(value.shape, generator=generator) for name, value in outputs.items()}
    return sum((outputs[name] * weights[name]).sum() for name in outputs), weights


def save(path, config, model, tensors, names=lambda name: name):
    for name, value in model.named_parameters():
        tensors[f"weights.{names(name)}"] = value.data
        if value.grad is not None:
            tensors[f"grad.{names(name)}"] = value.grad
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    print(path, path.stat().st_size)


def vae(folder):
    for name, extra in {"vae": {}, "vae_plain": {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}}.items():
        levels = 2 if extra else 3
        model = AutoencoderKL(
            block_out_channels=(4, 6, 8)[:levels],
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            **extra,
        )
        randomised(model, 1)
        x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
        distribution = model.encode(x).latent_dist
        outputs = {"mean": distribution.mean, "logvar": distribution.logvar}
        outputs["decoded"] = model.decode(distribution.mean).sample
        total, weighting = loss(outputs, 3)
        total.backward()
        tensors = {"x": x, "grad_x": x.grad} | outputs | {f"weighting.{k}": v for k, v in weighting.items()}
        save(folder / f"{name}.safetensors", dict(model.config), model, tensors)


def text(folder):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=12)
    ids = torch.randint(1, 62, (3, 12), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 62
    ids[0, 7:] = 63
    ids[1, 4], ids[1, 5:] = 63, 0
    ids[2, 11] = 63
    for name, kind, extra in [
        ("clip_text", CLIPTextModel, dict(hidden_act="quick_gelu", eos_token_id=2)),
        ("clip_text_projected", CLIPTextModelWithProjection, dict(hidden_act="gelu", eos_token_id=63, projection_dim=10)),
    ]:
        model = randomised(kind(CLIPTextConfig(**sizes, **extra)), 5)
        out = model(ids, output_hidden_states=True)
        pooled = out.text_embeds if kind is CLIPTextModelWithProjection else out.pooler_output
        outputs = {"penultimate": out.hidden_states[-2], "last": out.last_hidden_state, "pooled": pooled}
        total, weighting = loss(outputs, 6)
        total.backward()
        config = model.config.to_dict() | {"architectures": [kind.__name__]}
        tensors = {"ids": ids.to(torch.uint32)} | outputs | {f"weighting.{k}": v for k, v in weighting.items()}
        save(folder / f"{name}.safetensors", config, model, tensors)


def vision(folder):
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8, projection_dim=10)
    model = randomised(CLIPVisionModelWithProjection(config), 7)
    sizes = dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    # Odd sizes on purpose; the image is stored, so that no decoder comes between.
    photo = Image.open("tests/data/astronaut.png").convert("RGB").crop((130, 10, 321, 140)).resize((95, 67))
    # Pillow's resizing, by which CLIP was trained; torchvision's differs by a grey level in some pixels.
    pixels = CLIPImageProcessorPil(**sizes)(images=photo, return_tensors="pt")["pixel_values"]
    other = CLIPImageProcessor(**sizes)(images=photo, return_tensors="pt")["pixel_values"]
    print("torchvision differs from Pillow by grey levels:", ((pixels - other) * 255 * 0.27).abs().max().item())
    x = torch.cat([pixels, torch.randn(pixels.shape, generator=torch.Generator().manual_seed(8))]).requires_grad_()
    outputs = {"embedding": model(x).image_embeds}
    total, weighting = loss(outputs, 9)
    total.backward()
    tensors = {"picture": torch.from_numpy(np.asarray(photo).copy()), "pixels": pixels, "x": x, "grad_x": x.grad} | outputs
    tensors |= {f"weighting.{k}": v for k, v in weighting.items()}
    save(folder / "clip_vision.safetensors", model.config.to_dict(), model, tensors)


def vision_tokens(folder):
    """Like ViT-H/14: GELU, patches of 14 pixels; `hidden_states[-2]` beside the projected embedding."""
    config = CLIPVisionConfig(hidden_size=20, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=42, patch_size=14, projection_dim=12, hidden_act="gelu")
    model = randomised(CLIPVisionModelWithProjection(config), 11)
    x = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(12))
    output = model(x, output_hidden_states=True)
    tensors = {"x": x, "embedding": output.image_embeds, "penultimate": output.hidden_states[-2]}
    save(folder / "clip_vision_tokens.safetensors", model.config.to_dict(), model, tensors)


WORDS = "a an photo of person , smiling red background wearing glasses don't high-key 2 naïve café lower low xlow".split()
PROMPTS = [
    "",
    " ",
    "a photo of a person, smiling, red background",
    "A PHOTO\tof   a\n\nPerson!!",
    "naïve café — naïve café ÀÉÎ",
    "日本語 한국어 🙂🙃 e\u0301\u200d",
    "don't it's we'll I'd 12345 _x_ a-b (c:1.2) [d]",
    "lower xlower lowxlow low",
    "<|startoftext|> inside <|endoftext|>",
    "hello! hi !!",
    "ǅ İstanbul ẞ \u00a0\u3000 wide",
    "word " * 60,
]


def byte_symbols():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable + list(range(256, 512 - len(printable)))]


def vocabulary(folder):
    """A CLIP vocabulary in which each of WORDS is one token; the same as the Rust builder's."""
    symbols = byte_symbols()
    code = dict(zip([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)], symbols))
    rest = iter(symbols[len(code):])
    code |= {byte: next(rest) for byte in range(256) if byte not in code}
    vocab, merges = symbols + [symbol + "</w>" for symbol in symbols], []

    def merge(parts):
        while True:
            found = [(merges.index(pair), i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in merges]
            if not found:
                return parts
            i = min(found)[1]
            parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2 :]

    pieces = {"don't": ["don", "'t"], "high-key": ["high", "-", "key"]}
    for word in WORDS:
        for piece in pieces.get(word, [word]):
            letters = [code[byte] for byte in piece.encode()]
            letters[-1] += "</w>"
            while len(parts := merge(letters)) > 1:
                merges.append((parts[0], parts[1]))
                if parts[0] + parts[1] not in vocab:
                    vocab.append(parts[0] + parts[1])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")


def flags(content):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


# As in text encoder 1 and 2 of SDXL.
TOKENIZER_CONFIGS = {
    "first": {"model_max_length": 32, "bos_token": flags("<|startoftext|>"), "eos_token": flags("<|endoftext|>"), "unk_token": flags("<|endoftext|>"), "pad_token": "<|endoftext|>"},
    "second": {
        "model_max_length": 24,
        "added_tokens_decoder": {"0": flags("!") | {"normalized": False, "special": True}},
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "!",
    },
}


def tokenizer(folder):
    golden = {"words": WORDS, "prompts": PROMPTS, "configs": {}, "ids": {}}
    for name, config in TOKENIZER_CONFIGS.items():
        with tempfile.TemporaryDirectory() as place:
            place = Path(place)
            vocabulary(place)
            config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace", "add_prefix_space": False} | config
            for token in config.get("added_tokens_decoder", {}).values():
                token.pop("__type", None)
            (place / "tokenizer_config.json").write_text(json.dumps(config))
            tokens = CLIPTokenizer.from_pretrained(place)
            encoded = tokens(PROMPTS, padding="max_length", max_length=tokens.model_max_length, truncation=True)
            golden["vocab"] = (place / "vocab.json").read_text("utf-8")
            golden["merges"] = (place / "merges.txt").read_text("utf-8")
            golden["configs"][name], golden["ids"][name] = config, encoded["input_ids"]
    path = folder / "clip_tokenizer.json"
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=1), "utf-8")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for make in (vae, text, vision, vision_tokens, tokenizer):
        make(target)
