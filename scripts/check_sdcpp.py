"""Runs the names in LoRA files through stable-diffusion.cpp's own conversion, and tells which find a layer of SDXL.

    python scripts/bench_diffusers.py make FOLDER
    pip download --no-deps --no-binary stable-diffusion-cpp-python stable-diffusion-cpp-python==0.4.7
    tar xzf stable_diffusion_cpp_python-0.4.7.tar.gz && pip install ./stable_diffusion_cpp_python-0.4.7   # needs cmake
    python scripts/check_sdcpp.py FOLDER stable_diffusion_cpp_python-0.4.7 LORA.safetensors ...

stable-diffusion.cpp calls every layer of a model by one name, whichever file it came from, and looks for the tensors
`lora.NAME.lora_down`, `.lora_up` and `.alpha` (`src/name_conversion.cpp`, `src/lora.hpp`). A small program that is
linked to the built library does the conversion here. Exit code 1 when a tensor finds no layer.
"""

import json
import pathlib
import struct
import subprocess
import sys
import tempfile

from bench_lora import ldm_name

PROGRAM = """
#include <iostream>
#include <string>
#include "name_conversion.h"
int main() {
    std::string name;
    while (std::getline(std::cin, name)) std::cout << convert_tensor_name(name, VERSION_SDXL) << "\\n";
}
"""


def keys(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return header


def build(source, scratch):
    import stable_diffusion_cpp

    library = pathlib.Path(stable_diffusion_cpp.__file__).parent / "lib/libstable-diffusion.so"
    source = source / "vendor/stable-diffusion.cpp"
    folders = [f"-I{source / folder}" for folder in ("", "src", "include", "thirdparty", "ggml/include")]
    (scratch / "names.cpp").write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++17", scratch / "names.cpp", *folders, "-o", scratch / "names", library,
                    f"-Wl,-rpath,{library.parent}"], check=True)
    return scratch / "names"


def main():
    folder, source, files = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
    with tempfile.TemporaryDirectory() as scratch:
        program = build(source, pathlib.Path(scratch))

        def convert(names):
            said = subprocess.run([program], input="\n".join(names) + "\n", capture_output=True, text=True, check=True)
            return said.stdout.splitlines()

        unet = keys(folder / "unet/diffusion_pytorch_model.safetensors")
        layers = [name for name, entry in unet.items()
                  if ".attentions." in name and name.endswith(".weight") and len(entry["shape"]) == 2]
        named = set(convert([f"model.diffusion_model.{ldm_name(name)}" for name in layers]))
        for part, prefix in (("text_encoder", "conditioner.embedders.0.transformer."), ("text_encoder_2", "cond_stage_model.1.transformer.")):
            names = [name if name.startswith("text_model.") else f"text_model.{name}" for name in keys(folder / part / "model.safetensors")]
            named |= set(convert([prefix + name for name in names if name.endswith(".weight")]))
        fine = True
        for file in files:
            theirs = list(keys(file))
            ours = convert([f"lora.{name}" for name in theirs])
            wanted = [tuple(f"lora.{name}.{part}" for name in named) for part in ("lora_down", "lora_up", "alpha")]
            known = set().union(*wanted)
            lost = [name for name, own in zip(theirs, ours) if own not in known]
            print(f"{pathlib.Path(file).name}: {len(theirs) - len(lost)} of {len(theirs)} tensors find a layer", *lost[:10])
            fine &= not lost
    sys.exit(not fine)


if __name__ == "__main__":
    main()
