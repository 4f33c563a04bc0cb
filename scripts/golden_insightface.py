r"""Graphs with the structure and names of InsightFace's files and random weights, and what they give in onnxruntime.

    python scripts/golden_insightface.py tests/data/golden

scrfd.onnx is built like scrfd_10g_bnkps.onnx (stem, four stages of basic blocks, PAFPN, a head a stride, nine outputs
448 … 500, two anchors), iresnet50.onnx like w600k_r50.onnx (3, 4, 14 and 3 blocks, output 683), mxnet.onnx like older
files that normalise pixels themselves; all have a few channels only. The decoding is written in numpy from
`model_zoo/scrfd.py` as the facts describe it, apart from the program's. Seeds are tried until no score lies near the
threshold and no overlap near that of the suppression, so that rounding cannot change the list of faces.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from golden_face import align
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file

STRIDES, ANCHORS, SIDE = (8, 16, 32), 2, 640


class Graph:
    """Nodes are named as PyTorch's exporter does, `Conv_0`, `Relu_1`, …"""

    def __init__(self, seed):
        self.rng, self.nodes, self.weights = np.random.default_rng(seed), [], []

    def weight(self, array, dtype=np.float32):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, kind, *inputs, name=None, output=None, **attributes):
        name = name or f"{kind}_{len(self.nodes)}"
        output = output or f"{name}_output"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def conv(self, x, cin, cout, kernel=3, stride=1, gain=2.0, bias=0.1):
        weight = self.rng.normal(size=(cout, cin, kernel, kernel)) * np.sqrt(gain / (cin * kernel**2))
        pad = kernel // 2
        bias = self.rng.normal(size=cout) * bias
        return self.node("Conv", x, self.weight(weight), self.weight(bias), kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)

    def norm(self, x, channels):
        draw = self.rng.uniform
        parts = draw(0.8, 1.2, channels), draw(-0.1, 0.1, channels), draw(-0.1, 0.1, channels), draw(0.8, 1.2, channels)
        return self.node("BatchNormalization", x, *map(self.weight, parts), epsilon=1e-5)

    def prelu(self, x, channels):
        return self.node("PRelu", x, self.weight(self.rng.uniform(0.1, 0.3, (channels, 1, 1))))

    def save(self, path, size, outputs):
        shape = [1, 3, size, size] if size else ["batch", 3, "height", "width"]
        inputs = [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs]
        graph = helper.make_graph(self.nodes, "torch-jit-export", inputs, outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def scrfd(path, seed, heads, widths=(6, 6, 6, 6), depths=(1, 1, 1, 1), stem=(6,), neck=6, head=(6,)):
    """`heads` are factor and shift of each stride's score logits."""
    g = Graph(seed)
    relu = lambda x: g.node("Relu", x)
    x, channels = "input.1", 3
    for number, width in enumerate(stem):
        x, channels = relu(g.conv(x, channels, width, stride=1 if number else 2)), width
    x = g.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    levels = []
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        for block in range(depth):
            down = stage > 0 and block == 0
            short = x
            if down:
                short = g.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
                short = g.conv(short, channels, width, 1)
            x = relu(g.conv(x, channels, width, stride=1 + down))
            x = relu(g.node("Add", g.conv(x, width, width, gain=0.5), short))
            channels = width
        levels.append(x)
    width = neck
    laterals = [g.conv(x, cin, width, 1) for x, cin in zip(levels[1:], widths[1:])]
    for low in (1, 0):
        shape = g.node("Shape", laterals[low])
        size = g.node("Slice", shape, g.weight([2], np.int64), g.weight([4], np.int64), g.weight([0], np.int64))
        front = g.node("Slice", g.node("Shape", laterals[low + 1]), g.weight([0], np.int64), g.weight([2], np.int64), g.weight([0], np.int64))
        sizes = g.node("Concat", front, size, axis=0)
        up = g.node("Resize", laterals[low + 1], g.weight([]), g.weight([]), sizes, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        laterals[low] = g.node("Add", laterals[low], up)
    feats = [g.conv(x, width, width, gain=1.0) for x in laterals]
    for low in (0, 1):
        feats[low + 1] = g.node("Add", feats[low + 1], g.conv(feats[low], width, width, stride=2, gain=1.0))
    feats[1:] = [g.conv(x, width, width, gain=1.0) for x in feats[1:]]
    names = {8: ("448", "451", "454"), 16: ("471", "474", "477"), 32: ("494", "497", "500")}
    for stride, x, (factor, shift) in zip(STRIDES, feats, heads):
        width = neck
        for cout in head:
            x, width = relu(g.conv(x, width, cout)), cout
        flat = lambda x, numbers, output=None: g.node("Reshape", g.node("Transpose", x, perm=[2, 3, 0, 1]), g.weight([-1, numbers], np.int64), output=output)
        score = g.node("Add", g.node("Mul", g.conv(x, width, ANCHORS), g.weight(factor)), g.weight(shift))
        g.node("Sigmoid", flat(score, 1), output=names[stride][0])
        bounds = g.node("Mul", g.node("Add", g.conv(x, width, 4 * ANCHORS, gain=0.3), g.weight(2.5)), g.weight(1.1))
        flat(bounds, 4, names[stride][1])
        flat(g.conv(x, width, 10 * ANCHORS), 10, names[stride][2])
    outputs = [(names[stride][kind], ["cells", numbers]) for kind, numbers in enumerate((1, 4, 10)) for stride in STRIDES]
    return g.save(path, None, outputs)


def iresnet(path, seed, depths, widths, embedding, own_pixels=False):
    g = Graph(seed)
    x = "input.1"
    if own_pixels:
        x = g.node("Sub", x, g.weight(127.5), name="_minusscalar0")
        x = g.node("Mul", x, g.weight(1 / 128), name="_mulscalar0")
    channels = widths[0]
    x = g.prelu(g.conv(x, 3, channels), channels)
    for depth, width in zip(depths, widths):
        for block in range(depth):
            stride = 1 if block else 2
            short = x if stride == 1 else g.conv(x, channels, width, 1, 2, gain=1.0)
            y = g.prelu(g.conv(g.norm(x, channels), channels, width), width)
            x = g.node("Add", g.conv(y, width, width, stride=stride, gain=0.5), short)
            channels = width
    x = g.node("Flatten", g.norm(x, channels), axis=1)
    weight = g.rng.normal(size=(embedding, channels * 49)) / np.sqrt(channels * 49)
    x = g.node("Gemm", x, g.weight(weight), g.weight(g.rng.normal(size=embedding) * 0.01), transB=1)
    output = "fc1" if own_pixels else "683"
    parts = g.rng.uniform(0.8, 1.2, embedding), np.zeros(embedding), g.rng.uniform(-0.1, 0.1, embedding), g.rng.uniform(0.8, 1.2, embedding)
    g.node("BatchNormalization", x, *map(g.weight, parts), output=output)
    return g.save(path, 112, [(output, [1, embedding])])


def full_size(folder):
    """Depths and widths of SCRFD-10GF (mmdet config `scrfd_10g_bnkps.py`) and iresnet50, for timings."""
    scrfd(str(folder / "det_10g.onnx"), 0, [(0.01, 0.0)] * 3, (56, 88, 88, 224), (3, 4, 2, 3), (28, 28, 56), 56, (80, 80, 80))
    iresnet(str(folder / "w600k_r50.onnx"), 0, (3, 4, 14, 3), (64, 128, 256, 512), 512)


def letterbox(image):
    """SIDExSIDE at the upper left on black, bilinear in the fixed point of OpenCV's `resize`; and the scale."""
    height, width = image.shape[:2]
    ratio = height / width
    h, w = (SIDE, int(SIDE / ratio)) if ratio > 1 else (int(SIDE * ratio), SIDE)
    def taps(source, target):
        x = np.clip(((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32), 0, source - 1)
        first = np.floor(x).astype(int)
        fixed = lambda share: np.rint(share * np.float32(2048)).astype(int)
        return first, np.minimum(first + 1, source - 1), fixed(1 - (x - first)), fixed(x - first)
    (top, bottom, *fy), (left, right, *fx) = taps(height, h), taps(width, w)
    image = image.astype(int)
    along = image[:, left] * fx[0][:, None] + image[:, right] * fx[1][:, None] >> 4
    small = (along[top] * fy[0][:, None, None] >> 16) + (along[bottom] * fy[1][:, None, None] >> 16) + 2 >> 2
    framed = np.zeros((SIDE, SIDE, 3))
    framed[:h, :w] = small
    return framed, h / height


def candidates(session, image):
    framed, scale = letterbox(image)
    outputs = session.run(None, {"input.1": ((framed - 127.5) / 128).transpose(2, 0, 1)[None].astype(np.float32)})
    found = []
    for level, stride in enumerate(STRIDES):
        scores, bounds, points = outputs[level][:, 0], outputs[3 + level] * stride, outputs[6 + level] * stride
        y, x = np.mgrid[: SIDE // stride, : SIDE // stride] * stride
        centres = np.repeat(np.stack([x, y], -1).reshape(-1, 2), ANCHORS, 0)
        boxes = np.concatenate([centres - bounds[:, :2], centres + bounds[:, 2:]], 1)
        points = (points.reshape(-1, 5, 2) + centres[:, None]) / scale
        found.append((scores, boxes / scale, points))
    return [np.concatenate(parts) for parts in zip(*found)], outputs


def overlap(a, b):
    wide = np.maximum(0, np.minimum(a[2], b[:, 2]) - np.maximum(a[0], b[:, 0]) + 1)
    high = np.maximum(0, np.minimum(a[3], b[:, 3]) - np.maximum(a[1], b[:, 1]) + 1)
    size = lambda box: (box[..., 2] - box[..., 0] + 1) * (box[..., 3] - box[..., 1] + 1)
    return wide * high / (size(a) + size(b) - wide * high)


def faces(session, image):
    """Scores, boxes and points after suppression, best first, or None where rounding might change the list."""
    (scores, boxes, points), _ = candidates(session, image)
    if np.abs(scores - 0.5).min() < 3e-4:
        return None
    order = [i for i in np.argsort(-scores) if scores[i] >= 0.5]
    kept, suppressed = [], 0
    for i in order:
        overlaps = overlap(boxes[i], boxes[kept]) if kept else np.zeros(0)
        if np.any(np.abs(overlaps - 0.4) < 5e-3) or np.any(np.abs(scores[i] - scores[kept]) < 1e-4):
            return None
        if np.any(overlaps > 0.4):
            suppressed += 1
        else:
            kept.append(i)
    if len(kept) < 4 or suppressed < 4:
        return None
    return scores[kept], boxes[kept], points[kept]


def main(folder):
    folder = Path(folder)
    astronaut = Image.open("tests/data/astronaut.png").convert("RGB")
    images = {name: np.asarray(astronaut.crop(box), np.float64) for name, box in {"tall": (130, 10, 350, 500), "wide": (0, 0, 512, 301)}.items()}
    path = str(folder / "scrfd.onnx")
    for seed in range(200):
        # The scores of each stride are shifted until a few anchors pass.
        session = scrfd(path, seed, [(0.01, 0.0)] * 3)
        _, outputs = candidates(session, images["tall"])
        heads = []
        for scores, best in zip(outputs[:3], (1.2, 1.5, 1.8)):
            scores = scores.astype(np.float64).ravel()
            logits = np.log(scores / (1 - scores)) / 0.01
            below, above, top = np.sort(logits)[[-13, -12, -1]]
            cut = (below + above) / 2
            factor = best / max(top - cut, 1e-3)
            heads.append((factor, -factor * cut))
        session = scrfd(path, seed, heads)
        found = {name: faces(session, image) for name, image in images.items()}
        print("seed", seed, {name: value is not None for name, value in found.items()}, flush=True)
        if all(value is not None for value in found.values()):
            break
    else:
        sys.exit("no seed has clear margins")
    golden = {}
    for name, (scores, boxes, points) in found.items():
        print("seed", seed, name, len(scores), "faces", boxes[0].round(1).tolist(), scores.round(3).tolist())
        golden |= {f"{name}.scores": scores, f"{name}.boxes": boxes, f"{name}.points": points}

    known = load_file("tests/data/golden/face.safetensors")["astronaut.points"].astype(np.float64)
    face = align(astronaut, known).transpose(2, 0, 1)[None].astype(np.float32)
    session = iresnet(str(folder / "iresnet50.onnx"), 1, (3, 4, 14, 3), (4, 4, 4, 2), 512)
    golden["iresnet50"] = session.run(None, {"input.1": (face - 127.5) / 127.5})[0][0]
    golden["iresnet50.bgr"] = session.run(None, {"input.1": (face[:, ::-1] - 127.5) / 127.5})[0][0]
    golden["iresnet50.raw"] = session.run(None, {"input.1": face})[0][0]
    session = iresnet(str(folder / "mxnet.onnx"), 2, (1, 1, 1, 1), (4, 4, 4, 2), 64, own_pixels=True)
    golden["mxnet"] = session.run(None, {"input.1": face})[0][0]
    cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    print("cosine of RGB to BGR", cosine(golden["iresnet50"], golden["iresnet50.bgr"]), "to raw pixels", cosine(golden["iresnet50"], golden["iresnet50.raw"]))
    save_file({name: np.ascontiguousarray(value, np.float32) for name, value in golden.items()}, folder / "insightface.safetensors")
    for name in ("scrfd.onnx", "iresnet50.onnx", "mxnet.onnx", "insightface.safetensors"):
        os.chmod(folder / name, 0o644)
        print(name, (folder / name).stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
