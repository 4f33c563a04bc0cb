"""Times difflora's face encoders beside onnxruntime, in turn and on two threads each; prints medians and ratios.

    python scripts/bench_onnxruntime.py [--folder 400] [--rounds 5] [--runs 20]

1. The networks alone, on pixels that are ready: YuNet at 640x640, MobileFaceNet, SFace, and graphs with the structure,
   depth and width of InsightFace's SCRFD-10GF and iresnet50 with random weights (`difflora face bench`).
2. One photo of 1024x1024 pixels from file to vector: the whole process, `difflora face embed` and Python with
   onnxruntime and Pillow. Python's start and imports are in its time, and are printed beside it.
3. A folder, half of it photos (crops of the photos in tests/data, 600 to 1400 pixels, JPEG), half painted portraits
   (512 pixels, PNG): whole processes again. Python works on two files at once with one thread each, which is quicker
   than one file with two threads.

Needs Python with the packages of scripts/requirements.txt and a release build (`cargo build --release --locked`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2


def session(path, threads=THREADS):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Idle threads that spin would slow down whichever program is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def embed(files):
    """The reference: detects at 640, aligns and embeds the best face of each file; gives the number of vectors."""
    import numpy as np
    from golden_face import TEMPLATE, detect
    from PIL import Image
    from skimage.transform import SimilarityTransform

    assets = ROOT / "src/assets/face"
    threads = THREADS if len(files) == 1 else 1
    yunet, recogniser = session(assets / "yunet.onnx", threads), session(assets / "mobilefacenet512.onnx", threads)

    def one(file):
        image = Image.open(file).convert("RGB")
        _, points, score = detect(yunet, image, 640, 640)
        back = np.linalg.inv(SimilarityTransform.from_estimate(points, TEMPLATE).params)[:2].ravel()
        face = image.transform((112, 112), Image.AFFINE, back, Image.BILINEAR)
        pixels = (np.asarray(face, np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5
        vector = recogniser.run(None, {"input": np.ascontiguousarray(pixels)})[0][0]
        return vector / np.linalg.norm(vector) if score > 0.6 else None

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(vector is not None for vector in pool.map(one, files))


def networks(difflora, rounds, runs, folder):
    import numpy as np
    from golden_insightface import full_size

    full_size(folder)
    assets = ROOT / "src/assets/face"
    pairs = {
        "mobilefacenet": (assets / "yunet.onnx", assets / "mobilefacenet512.onnx"),
        "sface": (assets / "yunet.onnx", assets / "sface.onnx"),
        str(folder): (folder / "det_10g.onnx", folder / "w600k_r50.onnx"),
    }
    names = {"yunet": "YuNet 640", "mobilefacenet512": "MobileFaceNet", "sface": "SFace", "det_10g": "SCRFD-10GF 640", "w600k_r50": "iresnet50"}
    times = {}
    for _ in range(rounds):
        for encoder, files in pairs.items():
            for file, side in zip(files, (640, 112)):
                network = session(file)
                feed = {network.get_inputs()[0].name: np.full((1, 3, side, side), 0.5, np.float32)}
                network.run(None, feed)
                each = []
                for _ in range(runs):
                    start = time.perf_counter()
                    network.run(None, feed)
                    each.append((time.perf_counter() - start) * 1e3)
                times.setdefault((file.stem, "theirs"), []).append(statistics.median(each))
                del network
            answer = subprocess.run([difflora, "face", "bench", "--face-encoder", encoder, "--runs", str(runs), "--json"], capture_output=True, check=True)
            answer = json.loads(answer.stdout)
            for file, kind in zip(files, ("detector", "recogniser")):
                times.setdefault((file.stem, "ours"), []).append(answer[kind]["milliseconds"])
    for file, name in names.items():
        row(name, *[statistics.median(times[file, whose]) for whose in ("theirs", "ours")], "ms")


def processes(name, rounds, ours, theirs):
    times = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for whose, command in (("theirs", theirs), ("ours", ours)):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "RAYON_NUM_THREADS": str(THREADS)})
            times[whose].append(time.perf_counter() - start)
    row(name, statistics.median(times["theirs"]), statistics.median(times["ours"]), "s")


def row(name, theirs, ours, unit):
    print(f"| {name} | {theirs:.3f} {unit} | {ours:.3f} {unit} | {ours / theirs:.2f} |", flush=True)


def images(difflora, folder, count):
    """Half photos, half paintings; the same ones each time."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir()
    photos = [Image.open(ROOT / "tests/data" / name).convert("RGB") for name in ("astronaut.png", "obama_senate_public_domain.jpg")]
    for number in range(count // 2):
        photo = photos[number % len(photos)]
        side = min(photo.size)
        left, top, side = *rng.integers(0, side // 20, 2), side - side // 20
        size = int(rng.integers(600, 1401))
        photo.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC).save(folder / f"photo-{number:04}.jpg", quality=92)
    paint = [difflora, "portraits", "--people", str(count - count // 2), "--images", "1", "--seed", "1", "--size", "512", "--out", str(folder / "painted")]
    subprocess.run(paint, check=True, capture_output=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--difflora", default=str(ROOT / "target/release/difflora"))
    arguments.add_argument("--folder", type=int, default=400, help="pictures in the folder")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--runs", type=int, default=20, help="of each network a round")
    arguments.add_argument("--only", choices=("networks", "photo", "folder"), help="one of the three")
    arguments.add_argument("--embed", nargs="*", metavar="FILE", help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    if arguments.embed is not None:
        print(embed([file for path in map(Path, arguments.embed) for file in ([path] if path.is_file() else sorted(path.rglob("*.[jp][pn]g")))]))
        return
    from PIL import Image

    difflora, rounds = arguments.difflora, arguments.rounds
    print("| | onnxruntime | difflora | ratio |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        reference = [sys.executable, __file__, "--embed"]
        ours = [difflora, "face", "embed", "--out", str(work / "faces.safetensors")]
        if arguments.only in (None, "networks"):
            (work / "insightface").mkdir()
            networks(difflora, rounds, arguments.runs, work / "insightface")
        if arguments.only in (None, "photo"):
            photo = work / "photo.jpg"
            image = Image.open(ROOT / "tests/data/obama_senate_public_domain.jpg").convert("RGB")
            side = min(image.size)
            image.crop((0, 0, side, side)).resize((1024, 1024), Image.BICUBIC).save(photo, quality=92)
            processes("one 1024² photo, whole process", 2 * rounds, [*ours, str(photo)], [*reference, str(photo)])
            processes("start alone (`--version`; Python with imports)", 2 * rounds, [difflora, "--version"], reference)
        if arguments.only in (None, "folder"):
            images(difflora, work / "folder", arguments.folder)
            processes(f"folder of {arguments.folder}, whole process", max(1, rounds // 2), [*ours, str(work / "folder")], [*reference, str(work / "folder")])


if __name__ == "__main__":
    main()
