r"""What the insightface package itself gives on the graphs of golden_insightface.py: boxes, points, aligned faces and
embeddings, for tests/parity/insightface.rs.

    python -m venv INSIGHT && INSIGHT/bin/pip install insightface==2.1 onnxruntime==1.31.1 opencv-python==5.0.0.93
    INSIGHT/bin/python scripts/golden_insightface_package.py tests/data/golden

The package is kept out of scripts/requirements.txt because it brings OpenCV; its source distribution builds without a
compiler. `SCRFD.detect` runs at 640x640, the size at which the program begins too (version 2 of the package unites
128 and 640 by default). Pictures are given to it in BGR, as `cv2.imread` gives them.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.model_zoo.scrfd import SCRFD
from insightface.utils.face_align import norm_crop
from PIL import Image
from safetensors.numpy import load_file, save_file

PINNED = {"insightface": "2.1", "onnxruntime": "1.31.1", "opencv-python": "5.0.0.93"}


def main(folder):
    folder = Path(folder)
    for package, wanted in PINNED.items():
        if version(package) != wanted:
            sys.exit(f"{package} is {version(package)}, wanted {wanted}")
    astronaut = np.asarray(Image.open("tests/data/astronaut.png").convert("RGB"))[:, :, ::-1]
    images = {"tall": astronaut[10:500, 130:350], "wide": astronaut[0:301, 0:512]}
    detector = SCRFD(str(folder / "scrfd.onnx"))
    detector.prepare(-1, det_thresh=0.5, input_size=(640, 640))
    golden = {}
    for name, image in images.items():
        faces, points = detector.detect(np.ascontiguousarray(image))
        print(name, len(faces), "faces, the best", faces[0].round(2).tolist())
        golden |= {f"{name}.scores": faces[:, 4], f"{name}.boxes": faces[:, :4], f"{name}.points": points}

    known = load_file("tests/data/golden/face.safetensors")["astronaut.points"]
    for side in (112, 128):
        golden[f"crop{side}"] = norm_crop(astronaut, known, side)[:, :, ::-1]
    for name in ("iresnet50", "mxnet"):
        recogniser = ArcFaceONNX(str(folder / f"{name}.onnx"))
        recogniser.prepare(-1)
        golden[name] = recogniser.get(astronaut, SimpleNamespace(kps=known))
    target = folder / "insightface_package.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in golden.items()}, target)
    os.chmod(target, 0o644)
    print(target, target.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
