r"""Golden numbers for tests/parity/face.rs: YuNet, alignment and both recognisers in onnxruntime.

    python scripts/golden_face.py src/assets/face/yunet.onnx mobilefacenet512_fp32.onnx sface_fp32.onnx \\
        tests/data/golden/face.safetensors

Pre-processing by Pillow, decoding after OpenCV's face_detect.cpp, alignment by scikit-image (Umeyama). Pictures:
the astronaut (NASA, from scikit-image), a photo in JPEG, the astronaut's head at 64x64 pixels, and those of
tests/data/faces: parts of two photos as Pillow decodes them, and two portraits that `difflora portraits` painted.
"""

import os
import sys

import numpy as np
import onnxruntime
from PIL import Image
from safetensors.numpy import save_file
from skimage.transform import SimilarityTransform

TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def detect(yunet, image, size, frame):
    """The best face: box, points, score in pixels of the image."""
    longer = max(image.size)
    width, height = ((side * size + longer // 2) // longer for side in image.size)
    left, top = (frame - width) // 2, (frame - height) // 2
    framed = Image.new("RGB", (frame, frame), (127, 127, 127))
    framed.paste(image.resize((width, height), Image.BILINEAR), (left, top))
    blob = np.asarray(framed, np.float32)[:, :, ::-1].transpose(2, 0, 1)[None]
    names = [f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in (8, 16, 32)]
    outputs = dict(zip(names, yunet.run(names, {"input": np.ascontiguousarray(blob)})))
    best = (-1.0, None, None)
    for stride in (8, 16, 32):
        cls, obj, box, kps = (outputs[f"{kind}_{stride}"][0] for kind in ("cls", "obj", "bbox", "kps"))
        score = np.sqrt(np.clip(cls[:, 0], 0, 1) * np.clip(obj[:, 0], 0, 1))
        i = int(score.argmax())
        if score[i] > best[0]:
            c, r = i % (frame // stride), i // (frame // stride)
            centre = (np.array([c, r]) + box[i, :2]) * stride
            half = np.exp(box[i, 2:]) * stride / 2
            points = (kps[i].reshape(5, 2) + [c, r]) * stride
            best = (float(score[i]), np.stack([centre - half, centre + half]), points)
    score, box, points = best
    scale = np.array([image.width / width, image.height / height])
    return (box - [left, top]) * scale, (points - [left, top]) * scale, score


def align(image, points):
    warp = SimilarityTransform.from_estimate(points, TEMPLATE)
    v, u = np.mgrid[:112, :112]
    x, y = warp.inverse(np.stack([u.ravel(), v.ravel()], 1).astype(float)).T
    image = np.pad(np.asarray(image, np.float64), ((1, 1), (1, 1), (0, 0)))
    left, top = np.floor(x), np.floor(y)
    face = np.zeros((112 * 112, 3))
    for dy, wy in ((0, 1 - (y - top)), (1, y - top)):
        for dx, wx in ((0, 1 - (x - left)), (1, x - left)):
            columns = np.clip(left + dx + 1, 0, image.shape[1] - 1).astype(int)
            rows = np.clip(top + dy + 1, 0, image.shape[0] - 1).astype(int)
            face += (wx * wy)[:, None] * image[rows, columns]
    return np.rint(face).reshape(112, 112, 3)


def main(yunet, mobilefacenet, sface, target):
    yunet, mobilefacenet, sface = session(yunet), session(mobilefacenet), session(sface)
    astronaut = Image.open("tests/data/astronaut.png").convert("RGB")
    images = {
        "astronaut": (astronaut, 640, 640),
        "photo": (Image.open("tests/data/obama_senate_public_domain.jpg").convert("RGB"), 640, 640),
        "small": (astronaut.crop((130, 10, 314, 194)).resize((64, 64), Image.BICUBIC), 256, 320),
    }
    # The sizes that the program chooses: 640, and for images of at most 256 pixels 256 in a frame, or, where no face
    # is sure, that of its three with the best score.
    for name, size, frame in (("senator", 640, 640), ("minister", 640, 640), ("painted", 160, 160), ("painted-small", 256, 320)):
        images[name] = (Image.open(f"tests/data/faces/{name}.png").convert("RGB"), size, frame)
    golden = {}
    for name, (image, size, frame) in images.items():
        box, points, score = detect(yunet, image, size, frame)
        face = align(image, points).transpose(2, 0, 1)[None].astype(np.float32)
        golden[f"{name}.box"] = box.reshape(4).astype(np.float32)
        golden[f"{name}.points"] = points.astype(np.float32)
        golden[f"{name}.score"] = np.array([score], np.float32)
        golden[f"{name}.mobilefacenet"] = mobilefacenet.run(None, {"input": (face - 127.5) / 127.5})[0][0]
        golden[f"{name}.sface"] = sface.run(None, {"data": face})[0][0]
        print(name, image.size, box.round(1).tolist(), round(score, 3))
    head = astronaut.crop((130, 10, 314, 194))
    for filter in ("bilinear", "bicubic"):
        for width, height in ((37, 51), (97, 120)):
            resized = head.resize((width, height), getattr(Image, filter.upper()))
            golden[f"resize.{filter}.{width}x{height}"] = np.asarray(resized)
    save_file(golden, target)
    os.chmod(target, 0o644)


if __name__ == "__main__":
    main(*sys.argv[1:])
