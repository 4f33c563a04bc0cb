"""Golden values for tests/parity/prompts.rs: prompts in A1111's and ComfyUI's syntax, encoded by their own code.

    pip install --no-deps auto1111sdk==0.0.95 && pip install lark     # A1111's modules
    python scripts/golden_prompts.py path/to/ComfyUI/comfy/sd1_clip.py

Runs `parse_prompt_attention` and `FrozenCLIPEmbedderForSDXLWithCustomWords` of A1111, and `SDTokenizer` and
`ClipTokenWeightEncoder` of ComfyUI (commit 00728eb20fce05955f89ef1ccf5f6167416e94cf), over transformers 5.23.0 and the text
encoders of tests/data/golden/pipeline/two. Writes tests/data/golden/prompts.safetensors: for each prompt the parsed pieces
(in the metadata), the context and the pooled output. `--embeddings` instead of a path writes
tests/data/golden/embeddings.safetensors: random textual inversions, and prompts that call them, by A1111's
`EmbeddingDatabase` and `EmbeddingsWithFixes`, and by transformers with the vectors as added tokens, as diffusers'
`load_textual_inversion` adds them.
"""

import ast
import copy
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

GOLDEN = Path(__file__).parent.parent / "tests/data/golden"
FOLDER = GOLDEN / "pipeline/two"
LONG = "a photo of a person wearing glasses, (red hat:1.3), " * 3
PROMPTS = [
    "a photo of a person, smiling",
    "a photo of a person, (smiling:1.3), red background",
    "((smiling)) person [red] hat",
    "a (person (wearing (glasses:0.5) and:1.2) a [[red]] hat",
    "a \\(photo\\) of (a \\(person\\):1.4), 50\\% \\\\ (unbalanced",
    "(a person:-0.5), (red:0), blue) at 10:30",
    LONG,
    "a photo of a person without any comma in it " * 4,
    "(" + "glasses" * 20 + ":1.2) hat",
    "",
    "()",
]
A1111_ONLY = ["a person BREAK red (hat:1.2) BREAK", "BREAK", "red BREAKFAST, BREAK_ and aBREAK BREAK BREAK hat"]


def a1111():
    """The two modules, in a package whose other modules are stand-ins."""
    folder = Path(importlib.util.find_spec("auto1111sdk").origin).parent / "modules"
    package = types.ModuleType("webui")
    package.__path__ = []
    sys.modules["webui"] = package
    stand_ins = {
        "devices": {"device": torch.device("cpu")},
        "sd_hijack": {"StableDiffusionModelHijack": object},
        "shared": {
            "opts": types.SimpleNamespace(
                enable_emphasis=True, comma_padding_backtrack=20, CLIP_stop_at_last_layers=1,
                use_old_emphasis_implementation=False, textual_inversion_add_hashes_to_infotext=False,
            )
        },
    }
    for name, values in stand_ins.items():
        module = types.ModuleType(f"webui.{name}")
        module.__dict__.update(values)
        sys.modules[module.__name__] = module
        setattr(package, name, module)
    for name in ["prompt_parser", "sd_hijack_clip"]:
        spec = importlib.util.spec_from_file_location(f"webui.{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        setattr(package, name, module)
    return package.prompt_parser, package.sd_hijack_clip


def comfyui(path):
    """The parts of `sd1_clip.py` that read prompts and apply their weights."""
    wanted = {
        "gen_empty_tokens", "ClipTokenWeightEncoder", "parse_parentheses", "token_weights", "escape_important",
        "unescape_important", "SDTokenizer",
    }
    tree = ast.parse(Path(path).read_text("utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
    management = types.SimpleNamespace(intermediate_device=lambda: "cpu")
    module = {"torch": torch, "model_management": management, "CLIPTokenizer": CLIPTokenizer}
    exec(compile(tree, str(path), "exec"), module)
    return types.SimpleNamespace(**module)


def encoder(number):
    kind = CLIPTextModelWithProjection if number == 2 else CLIPTextModel
    suffix = "_2" if number == 2 else ""
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / f"tokenizer{suffix}")
    return tokenizer, kind.from_pretrained(FOLDER / f"text_encoder{suffix}", dtype=torch.float32).eval()


def a1111_encoder(module, tokenizer, transformer):
    class Encoder(module.FrozenCLIPEmbedderForSDXLWithCustomWords):
        def encode_with_transformers(self, tokens):
            outputs = self.wrapped.transformer(input_ids=tokens, output_hidden_states=True)
            z = outputs.hidden_states[self.wrapped.layer_idx]
            if self.wrapped.return_pooled:
                z.pooled = outputs.text_embeds
            return z

    wrapped = torch.nn.Module()
    wrapped.tokenizer, wrapped.transformer = tokenizer, transformer
    wrapped.layer, wrapped.layer_idx = "hidden", -2
    wrapped.return_pooled = isinstance(transformer, CLIPTextModelWithProjection)
    database = types.SimpleNamespace(find_embedding_at_position=lambda tokens, position: (None, None))
    embedder = Encoder(wrapped, types.SimpleNamespace(embedding_db=database, fixes=None, extra_generation_params={}))
    embedder.id_pad = tokenizer.pad_token_id
    return embedder


def comfyui_encoder(module, tokenizer, transformer):
    pooled = isinstance(transformer, CLIPTextModelWithProjection)

    class Encoder(module.ClipTokenWeightEncoder):
        special_tokens = {
            "start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id,
        }

        def encode(self, tokens):
            outputs = transformer(input_ids=torch.tensor(tokens), output_hidden_states=True)
            return outputs.hidden_states[-2].clone(), outputs.text_embeds if pooled else None

    reader = module.SDTokenizer.__new__(module.SDTokenizer)
    reader.tokenizer, reader.max_length, reader.max_word_length, reader.tokens_start = tokenizer, 77, 8, 1
    reader.start_token, reader.end_token = tokenizer.bos_token_id, tokenizer.eos_token_id
    # ComfyUI pads clip_g with the number 0, which is `!` in CLIP's vocabulary, as in this one.
    reader.pad_with_end, reader.pad_to_max_length, reader.min_length = not pooled, True, None
    reader.embedding_identifier, reader.embedding_directory = "embedding:", None
    assert tokenizer.pad_token_id == (0 if pooled else tokenizer.eos_token_id)
    return lambda prompt: Encoder().encode_token_weights(reader.tokenize_with_weights(prompt))


# Names of textual inversions, and how many vectors each has.
VECTORS = {"sks person": 2, "sks": 1, "wide-style": 30}
CALLS = [
    "a photo of sks person, (smiling:1.2)",
    "a photo of (SKS  Person:1.3) and sks, wide-style",
    "wide-style, red hat, (wide-style), blue hat, wide-style, sks person",
    "nothing of the kind",
]


def a1111_embeddings(encoders, vectors):
    """A1111's own database and the module that puts vectors in the place of tokens, around both encoders."""
    _, clip = a1111()
    folder = Path(importlib.util.find_spec("auto1111sdk").origin).parent / "modules"

    def classes(file, *names):
        tree = ast.parse((folder / file).read_text("utf-8"))
        tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
        module = {"torch": torch, "devices": types.SimpleNamespace(cond_cast_unet=lambda x: x)}
        exec(compile(tree, file, "exec"), module)
        return [module[name] for name in names]

    (database,) = classes("textual_inversion/textual_inversion.py", "EmbeddingDatabase")
    (fixes,) = classes("sd_hijack.py", "EmbeddingsWithFixes")
    database = database()
    hijack = types.SimpleNamespace(embedding_db=database, fixes=None, extra_generation_params={})
    embedders = []
    for key, (tokenizer, transformer) in zip(["clip_l", "clip_g"], encoders):
        embedder = a1111_encoder(clip, tokenizer, transformer)
        embedder.hijack = hijack
        embeddings = transformer.text_model.embeddings if hasattr(transformer, "text_model") else transformer.embeddings
        embeddings.token_embedding = fixes(embeddings.token_embedding, hijack, key)
        embedders.append(embedder)
    model = types.SimpleNamespace(cond_stage_model=embedders[0])
    for name, count in VECTORS.items():
        pair = {key: vectors[f"{name}.{key}"] for key in ["clip_l", "clip_g"]}
        embedding = types.SimpleNamespace(name=name, vec=pair, vectors=count, shorthash="")
        database.register_embedding_by_name(embedding, model, name)
    return embedders


def added_tokens(encoders, vectors, prompt):
    """Context and pooled output where each vector is a token of its own."""
    out = []
    for key, (tokenizer, transformer) in zip(["clip_l", "clip_g"], encoders):
        tokenizer, transformer = copy.deepcopy(tokenizer), copy.deepcopy(transformer)
        text = prompt
        for place, (name, count) in enumerate(sorted(VECTORS.items(), key=lambda item: -len(item[0]))):
            # A word that no name is part of.
            word = f"zq{place}"
            tokens = [word] + [f"{word}_{i}" for i in range(1, count)]
            tokenizer.add_tokens(tokens)
            transformer.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            for token, row in zip(tokens, vectors[f"{name}.{key}"]):
                transformer.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = row
            text = text.replace(name, " ".join(tokens))
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        outputs = transformer(ids, output_hidden_states=True)
        out.append((outputs.hidden_states[-2], getattr(outputs, "text_embeds", None)))
    return torch.cat([out[0][0], out[1][0]], dim=-1), out[1][1]


@torch.no_grad()
def embeddings():
    torch.manual_seed(3)
    encoders = [encoder(1), encoder(2)]
    tensors, cases = {}, []
    for name, count in VECTORS.items():
        for key, (_, transformer) in zip(["clip_l", "clip_g"], encoders):
            tensors[f"{name}.{key}"] = torch.randn(count, transformer.config.hidden_size) * 0.5
    plain = "a photo of sks person and sks, in wide-style and wide-style"
    context, pooled = added_tokens(encoders, tensors, plain)
    results = [("plain", plain, context, pooled)]
    embedders = a1111_embeddings(encoders, tensors)
    for prompt in CALLS:
        first, (second, pooled) = embedders[0]([prompt]), embedders[1]([prompt])
        results.append(("a1111", prompt, torch.cat([first, second], dim=-1), pooled))
    for syntax, prompt, context, pooled in results:
        tensors[f"{len(cases)}.context"] = context.as_subclass(torch.Tensor).contiguous()
        tensors[f"{len(cases)}.pooled"] = pooled.contiguous()
        cases.append({"syntax": syntax, "prompt": prompt})
    save_file(tensors, GOLDEN / "embeddings.safetensors", {"cases": json.dumps(cases), "names": json.dumps(list(VECTORS))})
    print(len(cases), "prompts with textual inversions")


@torch.no_grad()
def main():
    parser, clip = a1111()
    comfy = comfyui(sys.argv[1])
    encoders = [encoder(1), encoder(2)]
    theirs = [a1111_encoder(clip, *pair) for pair in encoders]
    comfys = [comfyui_encoder(comfy, *pair) for pair in encoders]
    tensors, cases = {}, []
    for syntax, prompts in [("a1111", PROMPTS + A1111_ONLY), ("comfyui", PROMPTS)]:
        for prompt in prompts:
            if syntax == "a1111":
                first, (second, pooled) = theirs[0]([prompt]), theirs[1]([prompt])
                pieces = parser.parse_prompt_attention(prompt)
            else:
                (first, _), (second, pooled) = comfys[0](prompt), comfys[1](prompt)
                parsed = comfy.token_weights(comfy.escape_important(prompt), 1.0)
                pieces = [[comfy.unescape_important(text), weight] for text, weight in parsed]
            number = len(cases)
            cases.append({"syntax": syntax, "prompt": prompt, "pieces": pieces})
            tensors[f"{number}.context"] = torch.cat([first, second], dim=-1).as_subclass(torch.Tensor).contiguous()
            tensors[f"{number}.pooled"] = pooled.contiguous()
    save_file(tensors, GOLDEN / "prompts.safetensors", {"cases": json.dumps(cases)})
    print(len(cases), "prompts,", max(t.shape[1] for n, t in tensors.items() if n.endswith("context")) // 77, "chunks at most")


if __name__ == "__main__":
    embeddings() if sys.argv[1:] == ["--embeddings"] else main()
