"""An OpenVINO model of the weights of benchmarks/shapes.py, for the side "openvino" of benchmarks/engine.py. Needs openvino-genai.

    python benchmarks/openvino_model.py SHAPE 32|128 FOLDER

OpenVINO GenAI's own reader opens the Q4_0 file and makes the graph, with u4 and a zero point for each group of 32, which its kernels run
a fifth slower than i4 without; so the matrices become i4 with float16 scales. 32: the file's own scales, so that the numbers are
the same, 4.5 bits a weight. 128: what its users' exporter makes, a scale for each 128, 4.125 bits. Either way the embedding and the head
become u8 with a scale and a zero point for each row, as that exporter has them, and the head is given the last token alone, as
OpenVINO GenAI's pipelines do.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as op
import openvino_genai
from shapes import SHAPES, write

GROUP = 32  # Q4_0's


def constant(packed: np.ndarray, shape: list[int], type: Any) -> Any:
    """A node that holds ``packed`` (bytes: two numbers each in types of four bits, the lower first)."""
    tensor = ov.Tensor(type, ov.Shape(shape))
    tensor.data[:] = packed.reshape(tensor.data.shape)
    return op.constant(tensor)


def unpack(node: Any, count: int) -> np.ndarray:
    """The numbers of a u4 or u8 constant as float32, flat."""
    data = np.asarray(node.data).reshape(-1).view(np.uint8)
    if node.get_element_type() == ov.Type.u4:
        data = np.stack([data & 15, data >> 4], -1).reshape(-1)
    return data[:count].astype(np.float32)


def weights(tail: Any) -> tuple[np.ndarray, np.ndarray]:
    """``[rows, columns]`` float32 of the reader's constant -> subtract -> multiply -> reshape, given the reshape; its scales
    ``[rows, groups, 1]`` float16."""
    product = tail.input_value(0).get_node()
    difference, scale = (product.input_value(i).get_node() for i in (0, 1))
    numbers, zero = (difference.input_value(i).get_node().input_value(0).get_node() for i in (0, 1))
    shape = list(numbers.get_output_shape(0))
    values = unpack(numbers, int(np.prod(shape))).reshape(shape)
    values -= unpack(zero, shape[0] * shape[1]).reshape(shape[0], shape[1], 1)
    return (values * np.asarray(scale.data).astype(np.float32)).reshape(shape[0], -1), np.array(scale.data)


def int4(values: np.ndarray, scale: np.ndarray) -> Any:
    """As i4 with a scale for each group, float16 out."""
    rows, columns = values.shape
    blocks = values.reshape(*scale.shape[:2], -1)
    numbers = np.clip(np.rint(blocks / scale.astype(np.float32)), -8, 7).astype(np.int8).view(np.uint8) & 15
    flat = numbers.reshape(-1, 2)
    node = op.convert(constant(flat[:, 0] | flat[:, 1] << 4, list(blocks.shape), ov.Type.i4), "f16")
    return op.reshape(op.multiply(node, op.constant(scale)), op.constant([rows, columns]), False)


def int8(values: np.ndarray) -> Any:
    """As u8 with a scale and a zero point for each row, float16 out."""
    low, high = (np.minimum(values.min(-1, keepdims=True), 0), np.maximum(values.max(-1, keepdims=True), 0))
    scale = ((high - low) / 255).astype(np.float16)
    zero = np.rint(-low / scale.astype(np.float32))
    numbers = np.clip(np.rint(values / scale.astype(np.float32) + zero), 0, 255).astype(np.uint8)
    node, offset = (op.convert(op.constant(part), "f16") for part in (numbers, zero.astype(np.uint8)))
    return op.multiply(op.subtract(node, offset), op.constant(scale))


def regroup(model: Any, group: int, vocab: int) -> None:
    """Every matrix in groups of ``group`` (the largest part of it that divides the columns); the embedding and the head in 8 bits."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Reshape" or node.input_value(0).get_node().get_type_name() != "Multiply":
            continue
        if node.input_value(0).get_node().input_value(0).get_node().get_type_name() != "Subtract":
            continue
        values, scale = weights(node)
        rows, columns = values.shape
        if group != GROUP:
            blocks = values.reshape(rows, -1, math.gcd(columns, group))
            scale = (np.abs(blocks).max(-1, keepdims=True) / 7).astype(np.float16)
        node.output(0).replace((int8(values) if rows == vocab else int4(values, scale)).output(0))


def last_only(model: Any) -> None:
    """The head for the last token of each sequence."""
    head = model.get_results()[0].input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    hidden = head.input_value(0)  # [B, T, hidden] -> [B, 1, hidden]
    start, stop, step, axis = (op.constant(np.array([n], np.int64)) for n in (-1, np.iinfo(np.int64).max, 1, 1))
    head.input(0).replace_source_output(op.slice(hidden, start, stop, step, axis).output(0))
    model.validate_nodes_and_infer_types()


def convert(file: Path, group: int, folder: Path, vocab: int) -> None:
    """``folder``/model.xml of a Q4_0 file of ours; beside the file, what OpenVINO GenAI writes."""
    openvino_genai.LLMPipeline(str(file), "CPU", enable_save_ov_model=True, ATTENTION_BACKEND="SDPA")
    model = ov.Core().read_model(file.parent / "openvino_model.xml")
    regroup(model, group, vocab)
    last_only(model)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)


def make(shape: str, group: int, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    file = write(shape, "Q4_0", partial / "model.gguf", words=True)  # the reader wants a vocabulary
    convert(file, group, partial, SHAPES[shape]["vocab"])
    for other in (*partial.glob("openvino_*"), file):
        other.unlink()
    partial.rename(folder)


if __name__ == "__main__":
    make(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
