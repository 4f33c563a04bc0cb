"""Golden values for src/lora: a PEFT LoRA saved by diffusers, and the weights it merges into.

    python scripts/golden_lora.py            # writes tests/data/golden/lora_peft.safetensors and lora_delta.safetensors
    python scripts/golden_lora.py --kinds    # writes tests/data/golden/lora_kinds/, a file of every kind of adapter
    python scripts/golden_lora.py --replaced # writes tests/data/golden/peft_replaced/, PEFT folders that replace weights and biases
    python scripts/golden_lora.py --check    # the kohya files that the Rust tests hold load in diffusers and give the same

Needs torch, diffusers 0.42.1, peft 0.21.2; --kinds also lycoris-lora 4.1.3. The UNet is a small SDXL: two levels of two layers, attention on the
lower one, `text_time` conditioning. The LoRA has rank 3 and alpha 5 on the linear layers of the transformers and on
the time projections, but rank 2 on `to_k`. Alpha is the same everywhere: diffusers 0.42.1
takes one alpha for the whole of a kohya file (it looks the others up under names that no module has).
"""

import argparse
import pathlib
import tempfile

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).parent.parent / "tests/data/golden"


def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        cross_attention_dim=12,
        transformer_layers_per_block=1,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
        norm_num_groups=4,
    )


def weights(unet):
    return {name: value.detach().clone() for name, value in unet.state_dict().items()}


def fused(path):
    """ΔW of every weight that the file at `path` changes when diffusers loads and fuses it."""
    unet = small_unet()
    before = weights(unet)
    pipe = StableDiffusionXLPipeline.__new__(StableDiffusionXLPipeline)
    state, alphas, metadata = pipe.lora_state_dict(str(path), unet_config=unet.config, return_lora_metadata=True)
    StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
    after = weights(unet)
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


def make():
    unet = small_unet()
    linear = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=linear, rank_pattern={"to_k": 2})
    unet.add_adapter(config)
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    state = get_peft_model_state_dict(unet)
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionXLPipeline.save_lora_weights(
            folder, unet_lora_layers=state, unet_lora_adapter_metadata=unet.peft_config["default"].to_dict()
        )
        written = pathlib.Path(folder) / "pytorch_lora_weights.safetensors"
        (GOLDEN / "lora_peft.safetensors").write_bytes(written.read_bytes())
    delta = fused(GOLDEN / "lora_peft.safetensors")
    save_file(delta, GOLDEN / "lora_delta.safetensors")
    print(f"{len(delta)} weights change")


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = [
    "down_blocks.1.resnets.0.conv1",
    "down_blocks.1.resnets.0.conv_shortcut",
    f"{ATTENTION}.attn2.to_k",
    f"{ATTENTION}.ff.net.2",
]
NORMS = ["down_blocks.1.resnets.0.norm2", f"{ATTENTION}.norm1"]


def lycoris_kinds():
    """Kind -> (LyCORIS class, layers, options)."""
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.full import FullModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

    low = {"lora_dim": 3, "alpha": 2}
    return {
        "locon": (LoConModule, LAYERS, low),
        "locon_tucker": (LoConModule, LAYERS, low | {"use_tucker": True}),
        "dora_out": (LoConModule, LAYERS, low | {"weight_decompose": True, "wd_on_out": True}),
        "dora_in": (LoConModule, LAYERS, low | {"weight_decompose": True, "wd_on_out": False}),
        "loha": (LohaModule, LAYERS, low),
        "loha_tucker": (LohaModule, LAYERS, low | {"use_tucker": True}),
        "loha_dora": (LohaModule, LAYERS, low | {"weight_decompose": True}),
        "lokr": (LokrModule, LAYERS, {"lora_dim": 1, "alpha": 2, "factor": 4}),
        "lokr_both": (LokrModule, LAYERS, {"lora_dim": 1, "alpha": 2, "factor": 4, "decompose_both": True}),
        "lokr_tucker": (LokrModule, LAYERS, {"lora_dim": 1, "alpha": 2, "factor": 2, "use_tucker": True}),
        "lokr_full": (LokrModule, LAYERS, {"lora_dim": 3, "alpha": 2, "factor": 4, "full_matrix": True}),
        "full": (FullModule, LAYERS, {}),
        "norm": (NormModule, NORMS, {}),
        "ia3_out": (IA3Module, LAYERS, {"train_on_input": False}),
        "ia3_in": (IA3Module, LAYERS, {"train_on_input": True}),
        "oft": (DiagOFTModule, LAYERS, {"lora_dim": 4, "rescaled": True}),
        "oft_bound": (DiagOFTModule, LAYERS, {"lora_dim": 4, "constraint": 0.05}),
        "boft": (ButterflyOFTModule, LAYERS, {"lora_dim": 4, "rescaled": True}),
        "glora": (GLoRAModule, LAYERS, low),
    }


def delta_of(module, layer):
    """What LyCORIS' own forward pass adds to weight and bias (its `get_diff_weight` is wrong for LoHa and LoKr)."""
    seen = {}

    def capture(x, weight=None, bias=None, **_):
        seen.update(weight=weight, bias=bias)
        return 0

    module.org_forward = layer.forward
    module.op = capture
    inputs = {"Linear": (1, getattr(layer, "in_features", 0)), "LayerNorm": (1, layer.weight.shape[0])}
    shape = inputs.get(type(layer).__name__, (1, layer.weight.shape[1 if layer.weight.dim() > 1 else 0], 4, 4))
    module.forward(torch.randn(shape))
    return seen


@torch.no_grad()
def make_kinds():
    folder = GOLDEN / "lora_kinds"
    folder.mkdir(exist_ok=True)
    unet = small_unet()
    layers = dict(unet.named_modules())
    expected = {f"original.{path}": layers[path].weight.clone() for path in LAYERS + NORMS}
    for kind, (cls, paths, options) in lycoris_kinds().items():
        torch.manual_seed(7)
        state = {}
        for path in paths:
            stem = "lycoris_" + path.replace(".", "_")
            module = cls(stem, layers[path], 1.0, **options).eval()
            for name, parameter in module.named_parameters():
                # Magnitudes and rescalings stay near what they start from.
                small = 0.1 if name in ("dora_scale", "rescale") else 0.3
                parameter.data.add_(torch.randn_like(parameter) * small)
            for times in [1.0, 0.6] if kind in ("boft", "oft", "ia3_in", "locon", "lokr") else [1.0]:
                module.multiplier = times
                delta = delta_of(module, layers[path])
                if kind == "loha" or kind == "lokr":
                    # Independent of the forward pass: the functional form, alpha / rank once.
                    torch.testing.assert_close(delta["weight"], module.get_weight(module.shape) * times)
                expected |= {
                    f"{kind}.{times}.{part}.{path}": value.contiguous()
                    for part, value in delta.items()
                    if value is not None
                }
            if kind == "full":
                module.apply_to()  # it saves the difference only of what it was applied to
            state |= {f"{stem}.{name}": value.contiguous() for name, value in module.state_dict().items()}
            if kind == "full":
                module.restore()
        save_file(state, folder / f"{kind}.safetensors")
    make_peft_kinds(folder, expected)
    save_file(expected, folder / "expected.safetensors")
    print(f"{len(expected)} tensors expected")


def make_peft_kinds(folder, expected):
    layers = [path for path in LAYERS]
    kinds = {
        "peft_conv": LoraConfig(r=3, lora_alpha=5, target_modules=layers),
        "peft_patterns": LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=layers,
            rank_pattern={"conv1": 2},
            alpha_pattern={"attn2.to_k": 7},
            use_rslora=True,
        ),
        "peft_dora": LoraConfig(r=3, lora_alpha=5, target_modules=layers, use_dora=True),
    }
    for kind, config in kinds.items():
        unet = small_unet()
        before = weights(unet)
        unet.add_adapter(config)
        torch.manual_seed(3)
        for name, parameter in unet.named_parameters():
            if "lora_magnitude" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            elif "lora_" in name:
                parameter.data.normal_(std=0.2)
        with tempfile.TemporaryDirectory() as temporary:
            StableDiffusionXLPipeline.save_lora_weights(
                temporary,
                unet_lora_layers=get_peft_model_state_dict(unet),
                unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
            )
            written = pathlib.Path(temporary) / "pytorch_lora_weights.safetensors"
            (folder / f"{kind}.safetensors").write_bytes(written.read_bytes())
        unet.fuse_lora()
        unet.unload_lora()
        after = weights(unet)
        for path in layers:
            expected[f"{kind}.1.0.weight.{path}"] = after[f"{path}.weight"] - before[f"{path}.weight"]


@torch.no_grad()
def make_replaced():
    """`modules_to_save` and `bias`: the base's weights and biases beside those of the merged model, by difference."""
    folder = GOLDEN / "peft_replaced"
    folder.mkdir(exist_ok=True)
    biased = [path for path in LAYERS if not path.endswith("to_k")]  # PEFT adds no bias to a layer without one
    common = {"r": 3, "lora_alpha": 5, "target_modules": biased, "modules_to_save": ["conv_in", "norm1"]}
    expected = {}
    for kind, options in {
        "all": {"bias": "all"},
        "lora_only": {"bias": "lora_only", "lora_bias": True},
        "none": {"modules_to_save": ["conv_in", f"{ATTENTION}.attn2.to_v"], "lora_bias": True, "use_rslora": True},
    }.items():
        unet = small_unet()
        before = weights(unet)
        model = get_peft_model(unet, LoraConfig(**(common | options)))
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder / kind)
        (folder / kind / "README.md").unlink()
        after = weights(model.merge_and_unload())
        assert before.keys() == after.keys()
        for name in before:
            if torch.equal(before[name], after[name]):
                continue
            expected[f"{kind}.after.{name}"] = after[name]
            expected[f"before.{name}"] = before[name]
    save_file(expected, folder / "expected.safetensors")
    print(f"{len(expected)} tensors expected")


def check():
    import logging
    import warnings

    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    for library in ["diffusers", "peft", "transformers"]:
        logging.getLogger(library).addHandler(handler)
    wanted = load_file(GOLDEN / "lora_delta.safetensors")
    for name in ["lora_kohya.safetensors", "lora_kohya_diffusers.safetensors", "lora_peft_written.safetensors"]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            delta = fused(GOLDEN / name)
        assert delta.keys() == wanted.keys(), delta.keys() ^ wanted.keys()
        worst = max((delta[key] - wanted[key]).abs().max().item() for key in wanted)
        said += [str(warning.message) for warning in caught]
        print(f"{name}: {len(delta)} weights, largest difference {worst:.2e}, {len(said)} warnings")
        assert worst < 1e-5 and not said, said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="load the files that the Rust tests hold")
    parser.add_argument("--kinds", action="store_true", help="write a file of every kind of adapter")
    parser.add_argument("--replaced", action="store_true", help="write PEFT folders that replace weights and biases")
    arguments = parser.parse_args()
    if arguments.replaced:
        make_replaced()
    else:
        check() if arguments.check else make_kinds() if arguments.kinds else make()
