"""Frees the input size of YuNet (OpenCV Zoo, 2023mar): the file says 640x640, the graph takes multiples of 32.

    python scripts/free_yunet.py yunet_fp32.onnx src/assets/face/yunet.onnx
"""

import sys

import onnx


def main(source, target):
    model = onnx.load(source)
    height, width = model.graph.input[0].type.tensor_type.shape.dim[2:]
    height.dim_param, width.dim_param = "height", "width"
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = "cells_" + output.name.split("_")[1]
    del model.graph.value_info[:]
    onnx.save(model, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
