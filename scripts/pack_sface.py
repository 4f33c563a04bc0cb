"""Packs SFace (OpenCV Zoo, 2021dec, Apache-2.0) from 38.7 MB of fp32 into about 10.5 MB, without loss.

    python scripts/pack_sface.py sface_fp32.onnx src/assets/face/sface.onnx

The fp32 file was folded from the zoo's block-quantised one: every 64 neighbours in a row of a weight are
(q - zero_point) * scale with q in int8. This script finds scale and zero_point of each block again, demands
that they give back every fp32 number bit for bit, and writes int8 blocks behind a DequantizeLinear and a
Reshape, which every ONNX runtime folds when it loads the file. Weights whose rows are not whole blocks
(depthwise kernels, the first convolution) stay fp32. The last line compares both files in onnxruntime.
"""

import sys

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

BLOCK = 64


def recover(rows):
    """Blocks [n, 64] of fp32 -> (q int8, scale fp32, zero_point int8), exact."""
    wide = rows.astype(np.float64)
    low, high = np.minimum(wide.min(1), 0), np.maximum(wide.max(1), 0)
    count = np.full(rows.shape, np.nan)  # q - zero_point
    for steps in (255, 254):  # 254 where both ends were rounded inwards
        scaled = wide / ((high - low) / steps)[:, None]
        fits = (np.abs(scaled - np.round(scaled)).max(1) < 0.01) & np.isnan(count[:, 0])
        count[fits] = np.round(scaled[fits])
    assert not np.isnan(count).any(), "not blocks of int8 numbers"
    # The step from the largest number is right to an ulp or two; of these neighbours one is exact.
    at = np.abs(count).argmax(1)
    lines = np.arange(len(rows))
    guess = np.abs(rows[lines, at] / count[lines, at].astype(np.float32))
    scale = np.full(len(rows), np.nan, np.float32)
    for ulps in range(-4, 5):
        near = (guess.view(np.int32) + ulps).view(np.float32)
        exact = (count.astype(np.float32) * near[:, None] == rows).all(1)
        scale = np.where(exact & np.isnan(scale), near, scale)
    assert not np.isnan(scale).any(), f"{np.isnan(scale).sum()} of {len(rows)} blocks have no exact scale"
    zero = np.clip(-128 - count.min(1), -128, 127)
    q = count + zero[:, None]
    assert q.min() >= -128 and q.max() <= 127
    return q.astype(np.int8), scale, zero.astype(np.int8)


def pack(model):
    graph = model.graph
    small, before = [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        row = int(np.prod(values.shape[1:]))
        if values.dtype != np.float32 or values.ndim < 2 or row % BLOCK or not row:
            small.append(tensor)
            continue
        q, scale, zero = recover(values.reshape(-1, BLOCK))
        name = tensor.name
        small += [
            numpy_helper.from_array(q, name + ".q"),
            numpy_helper.from_array(scale, name + ".scale"),
            numpy_helper.from_array(zero, name + ".zero"),
            numpy_helper.from_array(np.array(values.shape, np.int64), name + ".shape"),
        ]
        blocks = [name + ".q", name + ".scale", name + ".zero"]
        before.append(helper.make_node("DequantizeLinear", blocks, [name + ".blocks"], axis=0))
        before.append(helper.make_node("Reshape", [name + ".blocks", name + ".shape"], [name]))
    nodes = before + list(graph.node)
    del graph.initializer[:], graph.node[:], graph.value_info[:]
    graph.initializer.extend(small)
    graph.node.extend(nodes)
    return model


def main(source, target):
    onnx.save(pack(onnx.load(source)), target)
    faces = np.random.default_rng(0).integers(0, 256, (8, 1, 3, 112, 112)).astype(np.float32)
    old, new = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (source, target))
    apart = max(np.abs(old.run(None, {"data": face})[0] - new.run(None, {"data": face})[0]).max() for face in faces)
    print(f"{target}: largest difference to {source} in onnxruntime {apart:g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
