"""Each operator of ONNX that is read, against onnxruntime: what comes out, with the options that few files use."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import gramlip as gl
from gramlip.cli import main
from gramlip.onnx import OPERATORS, load
from gramlip.onnx.registry import FLOW

Array = Any


def numbers(*shape: int, low: float = -1.0, high: float = 1.0) -> Array:
    return np.random.default_rng(sum(shape)).uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def case(op: str, *given: Any, opset: int = 17, outputs: int = 1, **attributes: Any) -> Any:
    """A node on `given`: the first is the model's input, the others constants; None for one that is left out."""
    shown = [f"{k}={v}" for k, v in attributes.items() if not isinstance(v, onnx.TensorProto)]
    label = "-".join([op, str(opset), *("x".join(map(str, np.shape(g))) for g in given[:1]), *shown])
    return pytest.param(op, given, opset, outputs, attributes, id=label.replace(" ", ""))


X = numbers(1, 4, 7, 9)
LINE, CUBE = numbers(2, 4, 11), numbers(1, 2, 5, 6, 7)
POSITIVE = numbers(2, 3, 4, low=0.5, high=2.0)


def entrywise() -> list[Any]:
    x = numbers(2, 3, 4, low=-4, high=4)
    found = [case(op, x) for op in ["Neg", "Exp", "Sin", "Cos", "Sinh", "Cosh", "Atan", "Asinh", "Erf", "Sign", "Floor", "Ceil", "Round"]]
    found += [case(op, POSITIVE) for op in ["Log", "Sqrt", "Reciprocal", "Tan"]]
    found += [case(op, x) for op in ["Abs", "Relu", "Sigmoid", "Tanh", "Softplus", "HardSwish", "Softsign", "Identity"]]
    found += [case("Mish", x, opset=18)]
    found += [case(op, x, numbers(3, 1)) for op in ["Add", "Sub", "Mul", "Div", "Sum", "Mean", "Max", "Min"]]
    found += [case(op, x, numbers(4), numbers(2, 1, 1)) for op in ["Sum", "Mean", "Max", "Min"]]
    found += [case("Pow", x, np.float32(3)), case("Pow", POSITIVE, np.float32(0.5)), case("Pow", POSITIVE, numbers(4), opset=13)]
    found += [case("Mod", x, numbers(4, low=1, high=2), fmod=1), case("Clip", x, opset=7, min=-1.0, max=0.5), case("Clip", x, opset=7)]
    found += [case("Clip", x, np.float32(-1), np.float32(0.5)), case("Clip", x, None, np.float32(1)), case("Clip", x, np.float32(0))]
    found += [case("LeakyRelu", x), case("LeakyRelu", x, alpha=0.3), case("Elu", x, alpha=1.7), case("Celu", x, alpha=0.6)]
    found += [case("Selu", x), case("Selu", x, alpha=1.2, gamma=2.0), case("HardSigmoid", x), case("HardSigmoid", x, alpha=1 / 6, beta=0.5)]
    found += [case("ThresholdedRelu", x, alpha=0.7), case("Shrink", x, lambd=0.4, bias=0.4), case("Shrink", x, lambd=0.4)]
    found += [case("Gelu", x, opset=20), case("Gelu", x, opset=20, approximate="tanh")]
    found += [case("PRelu", x, numbers(3, 1)), case("PRelu", x, numbers(4)), case("PRelu", x, np.float32([0.2]))]
    found += [case("Softmax", x, opset=11, axis=a) for a in (0, 1, 2)] + [case("LogSoftmax", x, opset=11), case("Softmax", x)]
    found += [case("LogSoftmax", x, axis=-2), case("Softmax", x, axis=1), case("CumSum", x, np.int64(1))]
    for op in ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"]:
        found += [case(op, x, opset=11, axes=[-1, 0], keepdims=0), case(op, x, ints(1), opset=18), case(op, x, opset=18, keepdims=0)]
    found += [case("ReduceLogSum", POSITIVE, opset=11, axes=[1]), case("ReduceMean", X, opset=13, axes=[3, 2], keepdims=0)]
    found += [case("ReduceSum", x, ints(), opset=13, noop_with_empty_axes=1), case("ReduceMean", CUBE, ints(-3, -2, -1), opset=18)]
    return [*found, case("LpNormalization", x, axis=1), case("LpNormalization", x, p=1), case("Cast", x, to=onnx.TensorProto.DOUBLE)]


def windows() -> list[Any]:
    found: list[Any] = []
    for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        found += [case("Conv", X, numbers(6, 4, 3, 4), numbers(6), auto_pad=auto, strides=[2, 3])]
        found += [case("MaxPool", X, auto_pad=auto, kernel_shape=[3, 2], strides=[2, 2])]
        found += [case("AveragePool", X, auto_pad=auto, kernel_shape=[3, 2], strides=[2, 2], count_include_pad=c) for c in (0, 1)]
        found += [case("ConvTranspose", X, numbers(4, 3, 4, 4), auto_pad=auto, strides=[2, 3])]
    found += [case("Conv", X, numbers(8, 2, 3, 3), numbers(8), group=2, pads=[1, 0, 2, 3], dilations=[2, 1])]
    found += [case("Conv", X, numbers(8, 1, 3, 3), group=4, pads=[1, 1, 1, 1], kernel_shape=[3, 3])]
    found += [case("Conv", LINE, numbers(5, 4, 3), pads=[2, 0]), case("Conv", CUBE, numbers(3, 2, 2, 3, 1), pads=[1] * 6)]
    found += [case("ConvTranspose", X, numbers(4, 3, 3, 3), numbers(6), group=2, pads=[1, 0, 0, 1], strides=[2, 2])]
    found += [case("ConvTranspose", X, numbers(4, 3, 3, 3), pads=[1, 1, 1, 1], strides=[2, 3], output_padding=[1, 2])]
    found += [case("ConvTranspose", X, numbers(4, 3, 3, 3), strides=[2, 3], output_shape=[14, 26])]
    found += [case("ConvTranspose", LINE, numbers(4, 3, 3), dilations=[2], strides=[2])]
    for op in ("MaxPool", "AveragePool"):
        found += [case(op, X, kernel_shape=[2, 3]), case(op, LINE, kernel_shape=[3], strides=[2], pads=[1, 1])]
        found += [case(op, CUBE, kernel_shape=[2, 2, 2], strides=[2, 2, 2], ceil_mode=1)]
        found += [case(op, X, kernel_shape=[3, 3], strides=[2, 2], pads=pads, ceil_mode=1) for pads in ([0] * 4, [1] * 4, [0, 1, 1, 0])]
        found += [case(op, X, kernel_shape=[3, 3], strides=[2, 2], pads=[2, 0, 0, 1])]
    found += [case("MaxPool", X, kernel_shape=[2, 3], dilations=[2, 3])]
    found += [case("AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, count_include_pad=1)]
    found += [case("AveragePool", X, kernel_shape=[3, 2], pads=[0, 0, 1, 1], count_include_pad=1)]
    return found + [case(op, x) for op in ("GlobalAveragePool", "GlobalMaxPool") for x in (X, LINE, CUBE)]


def normalisation() -> list[Any]:
    w = [numbers(4, low=0.5), numbers(4)]
    statistics = [numbers(4), numbers(4, low=0.5, high=2.0)]
    found = [case("BatchNormalization", x, *w, *statistics, opset=n) for x in (X, LINE, numbers(2, 4)) for n in (9, 15)]
    found += [case("BatchNormalization", X, *w, *statistics, epsilon=0.1), case("InstanceNormalization", X, *w, epsilon=1e-2)]
    found += [case("InstanceNormalization", LINE, *w), case("LayerNormalization", X, numbers(9), numbers(9))]
    found += [case("LayerNormalization", X, numbers(4, 7, 9), axis=1, epsilon=0.1), case("LRN", X, size=3, alpha=0.5, beta=0.6, bias=2.0)]
    found += [case("GroupNormalization", X, numbers(2), numbers(2), opset=18, num_groups=2)]
    found += [case("GroupNormalization", X, *w, opset=21, num_groups=2), case("RMSNormalization", X, numbers(9), opset=23, axis=-1)]
    return [*found, case("Dropout", X, opset=11, ratio=0.3), case("Dropout", X, np.float32(0.3), np.bool_(False))]


def resampling() -> list[Any]:
    found = [case("Upsample", X, opset=7, scales=[1.0, 1.0, 2.0, 3.0]), case("Upsample", X, np.float32([1, 1, 2, 2]), opset=9)]
    found += [case("Upsample", X, np.float32([1, 1, 1.5, 2.3]), opset=9), case("Resize", X, np.float32([1, 1, 2, 0.5]), opset=10)]
    for rounds in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
            sizes = (ints(1, 4, 14, 27), ints(1, 4, 3, 4), ints(1, 4, 10, 13))
            found += [case("Resize", X, None, None, s, nearest_mode=rounds, coordinate_transformation_mode=where) for s in sizes]
    for mode in ("linear", "cubic"):
        for where in ("half_pixel", "align_corners", "pytorch_half_pixel"):
            options = {"mode": mode, "coordinate_transformation_mode": where}
            found += [
                case("Resize", X, None, np.float32([1, 1, 2, 3]), **options),
                case("Resize", X, None, None, ints(1, 4, 5, 20), **options),
            ]
    found += [
        case("Resize", LINE, None, np.float32([1, 1, 2]), mode="linear"),
        case("Resize", X, None, np.float32([2, 2]), opset=18, axes=[2, 3]),
    ]
    return [*found, case("Resize", X, np.float32([]), np.float32([1, 1, 2, 2]), opset=11, mode="linear")]


def shapes() -> list[Any]:
    x = numbers(2, 3, 4, 6)
    found = [
        case("Reshape", x, ints(0, -1, 6)),
        case("Reshape", x, ints(4, 3, 2, 6)),
        case("Transpose", x),
        case("Transpose", x, perm=[0, 2, 3, 1]),
    ]
    found += [case("Flatten", x, axis=a) for a in (0, 1, 2, 4, -1)] + [case("Flatten", numbers(3), axis=1)]
    thin = numbers(2, 1, 3, 1)
    found += [case("Squeeze", thin), case("Squeeze", thin, opset=11, axes=[-1]), case("Squeeze", thin, ints(1, -1))]
    found += [case("Unsqueeze", x, opset=11, axes=[0, -1]), case("Unsqueeze", x, ints(-2, 1)), case("Expand", thin, ints(2, 5, 1, 4))]
    found += [case("Expand", thin, ints(3, 1)), case("Tile", x, ints(1, 2, 1, 3)), case("Concat", x, numbers(2, 3, 4, 1), axis=-1)]
    found += [case("Split", x, opset=11, split=[1, 2], axis=1, outputs=2), case("Split", x, ints(1, 2, 1), axis=-2, outputs=3)]
    found += [case("Split", x, opset=18, num_outputs=4, axis=3, outputs=4), case("Split", x, axis=-1, outputs=2)]
    found += [case("Slice", x, opset=9, starts=[1, 0], ends=[3, -1], axes=[2, 3]), case("Slice", x, ints(1), ints(100))]
    found += [
        case("Slice", x, ints(-1, -1), ints(-(2**62), 0), ints(2, -1), ints(-1, -2)),
        case("Slice", x, ints(0), ints(5), ints(3), ints(2)),
    ]
    found += [case("Gather", x, np.int64(-1), axis=2), case("Gather", x, ints(0, -1, 0), axis=-1)]
    found += [case("Gather", x, np.array([[0, 2], [1, 1]]), axis=1), case("GatherElements", x, np.array([[[[0, -1]]]]), axis=3)]
    found += [case("Trilu", x), case("Trilu", x, np.int64(1), upper=0), case("Pad", X, opset=9, pads=[0, 0, 1, 2, 0, 0, 3, 0], value=0.5)]
    for mode in ("constant", "reflect", "edge"):
        found += [case("Pad", X, ints(0, 0, 1, 2, 0, 0, 3, 0), mode=mode)]
        found += [case("Pad", X, ints(2, 1), None, ints(-1), opset=18, mode=mode)]
    found += [
        case("Pad", X, ints(0, 1, -1, 0, 0, 0, 0, 2), np.float32(0.3)),
        case("Pad", LINE, ints(0, 0, 2, 0, 0, 3), opset=19, mode="wrap"),
    ]
    blocks = numbers(1, 8, 2, 3)
    found += [case("DepthToSpace", blocks, blocksize=2, mode=mode) for mode in ("DCR", "CRD")]
    found += [case("SpaceToDepth", numbers(1, 3, 4, 6), blocksize=2)]
    return [*found, case("Where", x, np.arange(6) % 2 == 0, numbers(6))]


def placed() -> list[Any]:
    """Entries at fixed places."""
    x, at, rows = numbers(3, 4, 5), np.array([[[0, -1], [3, 1]]]), np.array([[0], [-1]])
    found = [case("ScatterElements", x, at, numbers(1, 2, 2), axis=1), case("ScatterElements", x, at, numbers(1, 2, 2), axis=-1, opset=11)]
    found += [case("ScatterElements", x, at % 2, numbers(1, 2, 2), axis=2, opset=18, reduction=how) for how in ("add", "max", "min")]
    found += [case("ScatterND", x, rows, numbers(2, 4, 5)), case("ScatterND", x, rows * 0, numbers(2, 4, 5), opset=18, reduction="add")]
    found += [case("ScatterND", x, np.array([[[0, 1], [2, -1]]]), numbers(1, 2, 5)), case("GatherND", x, np.array([[[0, 1], [2, -1]]]))]
    found += [case("GatherND", x, np.array([[0, 3, 4], [2, -1, 0]]), opset=12)]
    return found


def codes() -> list[Any]:
    x = np.arange(-128, 127, dtype=np.int8)[:120].reshape(4, 5, 6)
    found = [case("DequantizeLinear", x, np.float32(0.03)), case("DequantizeLinear", x, np.float32(0.03), np.int8(-7))]
    found += [case("DequantizeLinear", x, numbers(n, low=0.01), x.reshape(-1)[:n], axis=axis) for n, axis in ((4, 0), (5, 1), (6, -1))]
    unsigned = (x.astype(np.int16) + 128).astype(np.uint8)
    return [*found, case("DequantizeLinear", unsigned, np.float32([0.2]), np.uint8([128]), opset=19)]


def recurrent() -> list[Any]:
    """Both directions, with and without biases and first states."""
    x, found = numbers(4, 2, 3), list[Any]()
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        for way, n in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            w, r, b = numbers(n, gates * 5, 3), numbers(n, gates * 5, 5), numbers(n, 2 * gates * 5)
            states = [numbers(n, 2, 5), numbers(n, 2, 4 + 1)][: 2 if op == "LSTM" else 1]
            outputs = len(states) + 1
            for given in ((w, r), (w, r, b), (w, r, None, None, *states), (w, r, b, np.int32([4, 4]), *states)):
                found.append(case(op, x, *given, direction=way, hidden_size=5, outputs=outputs))
    w, r, b = numbers(1, 15, 3), numbers(1, 15, 5), numbers(1, 30)
    found += [
        case("GRU", x, w, r, b, linear_before_reset=1, hidden_size=5),
        case("RNN", x, w[:, :5], r[:, :5], activations=["Relu"], hidden_size=5),
    ]
    return [*found, *seldom(4 * x)]


def seldom(x: Array) -> list[Any]:
    """What few files use: lengths, peepholes, coupled gates, clipping, other functions with their settings."""
    found, size = list[Any](), {"hidden_size": 5}
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        for way, n in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            w, r, b = 3 * numbers(n, gates * 5, 3), numbers(n, gates * 5, 5), numbers(n, 2 * gates * 5)
            states = [numbers(n, 2, 5), 2 * numbers(n, 2, 4 + 1)][: 2 if op == "LSTM" else 1]
            for lengths in ([4, 2], [3, 3], [1, 4], [0, 4], [0, 0]):
                given = (w, r, b, np.int32(lengths), *states)
                found.append(case(op, x, *given, direction=way, outputs=len(states) + 1, **size))
            found.append(case(op, x, w, r, b, direction=way, clip=0.7, outputs=len(states) + 1, **size))
    w, r, b, p = 3 * numbers(2, 20, 3), numbers(2, 20, 5), numbers(2, 40), 2 * numbers(2, 15)
    both = {"direction": "bidirectional", "outputs": 3, **size}
    states = (numbers(2, 2, 5), 2 * numbers(2, 2, 5))
    found += [case("LSTM", x, w, r, b, np.int32([2, 4]), *states, p, **both), case("LSTM", x, w, r, b, None, *states, p, clip=0.5, **both)]
    found += [case("LSTM", x, w[:1], r[:1], b[:1], None, None, None, p[:1], **size)]
    found += [
        case("LSTM", x, w, r, b, None, *states, input_forget=1, **both),
        case("LSTM", x, w, r, b, None, *states, p, input_forget=1, **both),
    ]
    several = ["HardSigmoid", "LeakyRelu", "Softsign", "Sigmoid", "Elu", "Tanh"]
    found += [
        case("LSTM", x, w, r, b, activations=several, **both),
        case("LSTM", x, w, r, b, activations=several, activation_alpha=[0.3, 0.1, 0.7], activation_beta=[0.4], **both),
        case("GRU", x, w[:1, :15], r[:1, :15], b[:1, :30], activations=["HardSigmoid", "Softplus"], activation_alpha=[0.25], **size),
        case("RNN", x, w[:1, :5], r[:1, :5], activations=["LeakyRelu"], clip=1.5, **size),
    ]
    return found


def test_a_batch_before_the_steps_is_the_same_layer_turned(tmp_path: Path) -> None:
    """onnxruntime does not have `layout`; what it returns for the other one is the oracle."""
    x, w, r = numbers(4, 2, 3), numbers(2, 20, 3), numbers(2, 20, 5)
    b, h, c, lengths, p = numbers(2, 40), numbers(2, 2, 5), 2 * numbers(2, 2, 5), np.int32([2, 4]), numbers(2, 15)
    settings = {"direction": "bidirectional", "hidden_size": 5}
    for given in ((w, r, b), (w, r, b, lengths, h, c, p)):
        saved(tmp_path / "a.onnx", "LSTM", (x, *given), 17, 3, settings)
        turned = [g.swapaxes(0, 1).copy() if g is h or g is c else g for g in given]
        rows = saved(tmp_path / "b.onnx", "LSTM", (x.swapaxes(0, 1).copy(), *turned), 17, 3, {"layout": 1, **settings})
        y, *last = run(tmp_path / "a.onnx", x)
        found = load(tmp_path / "b.onnx")(torch.from_numpy(rows))
        for made, wanted in zip(found, (y.transpose(2, 0, 1, 3), *(each.swapaxes(0, 1) for each in last)), strict=True):
            np.testing.assert_allclose(made.numpy(), wanted, rtol=2e-5, atol=2e-5)


def matrices() -> list[Any]:
    x = numbers(5, 3)
    found = [
        case("MatMul", numbers(2, 5, 3), numbers(3, 4)),
        case("MatMul", numbers(3), numbers(2, 3, 4)),
        case("Gemm", x, numbers(4, 3), transB=1),
    ]
    found += [
        case("Gemm", x, numbers(4, 3), numbers(4), transB=1),
        case("Gemm", x, numbers(5, 4), numbers(1, 4), transA=1, alpha=0.5, beta=2.0),
    ]
    found += [case("Gemm", x, numbers(3, 4), numbers(5, 1)), case("Gemm", x, numbers(4, 3), np.float32(2), transB=1)]
    found += [case("Einsum", numbers(2, 5, 3), numbers(4, 3), equation="bij,kj->bik")]
    heads = numbers(1, 2, 5, 4)
    return [
        *found,
        case("Attention", heads, numbers(1, 2, 6, 4), numbers(1, 2, 6, 3), opset=23),
        case("Attention", heads, heads, heads, opset=23, is_causal=1),
    ]


CASES = [*entrywise(), *windows(), *normalisation(), *resampling(), *shapes(), *placed(), *codes(), *recurrent(), *matrices()]


def saved(path: Path, op: str, given: Any, opset: int, outputs: int, attributes: dict[str, Any]) -> Array:
    """A file with the node alone, and what it is applied to, with `Where` choosing between its input and a constant."""
    helper, names = onnx.helper, ["" if g is None else f"v{i}" for i, g in enumerate(given)]
    first = [names[1], names[0], *names[2:]] if op == "Where" else names
    node = helper.make_node(op, first, [f"y{i}" for i in range(outputs)], **attributes)
    held = [onnx.numpy_helper.from_array(np.asarray(g), name) for g, name in zip(given[1:], names[1:], strict=True) if g is not None]
    x = np.asarray(given[0])
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    results = [helper.make_empty_tensor_value_info(f"y{i}") for i in range(outputs)]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("v0", kind, x.shape)], results, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return x


def run(path: Path, *given: Array, exactly: bool = False) -> list[Array]:
    """What onnxruntime returns; `exactly` as the file says, without its own kernels for codes, which round activations to codes as well."""
    options = onnxruntime.SessionOptions()
    if exactly:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(path, options)
    return session.run(None, {value.name: x for value, x in zip(session.get_inputs(), given, strict=True)})


@pytest.mark.parametrize(("op", "given", "opset", "outputs", "attributes"), CASES)
def test_a_node(tmp_path: Path, op: str, given: Any, opset: int, outputs: int, attributes: dict[str, Any]) -> None:
    x = saved(path := tmp_path / "x.onnx", op, given, opset, outputs, attributes)
    model = load(path)
    expected = run(path, x)
    found = model(torch.from_numpy(x))
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(expected)
    for made, wanted in zip(found, expected, strict=True):
        assert tuple(made.shape) == wanted.shape
        np.testing.assert_allclose(made.numpy(), wanted, rtol=2e-5, atol=2e-5)


# ---- what is worked out before ---------------------------------------------------------------------------------------------


def folded(path: Path, nodes: list[Any], held: dict[str, Array], x: Array, opset: int = 17) -> Any:
    """A file whose nodes make `y` from `x`, and constants."""
    helper = onnx.helper
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", *x.shape[1:]])]
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_empty_tensor_value_info("y")], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return load(path, x.shape[1:])


N = onnx.helper.make_node
SIZES = {
    "shape": (
        [
            N("Shape", ["x"], ["s"]),
            N("Gather", ["s", "one"], ["c"]),
            N("Mul", ["c", "two"], ["d"]),
            N("Range", ["zero", "d", "two"], ["r"]),
            N("Cast", ["r"], ["f"], to=1),
            N("ReduceMean", ["f"], ["m"], keepdims=0),
            N("Add", ["x", "m"], ["y"]),
        ],
        17,
    ),
    "part of a shape": (
        [
            N("Shape", ["x"], ["s"], start=1, end=-1),
            N("Constant", [], ["v"], value_ints=[-1]),
            N("Concat", ["v", "s"], ["t"], axis=0),
            N("Reshape", ["x", "t"], ["y"]),
        ],
        17,
    ),
    "product": (
        [
            N("Shape", ["x"], ["s"]),
            N("ReduceProd", ["s"], ["p"], keepdims=1),
            N("Size", ["x"], ["n"]),
            N("Equal", ["p", "n"], ["same"]),
            N("Not", ["same"], ["other"]),
            N("Or", ["same", "other"], ["true"]),
            N("Xor", ["same", "other"], ["also"]),
            N("And", ["true", "also"], ["all"]),
            N("Where", ["all", "p", "one"], ["q"]),
            N("Reshape", ["x", "q"], ["y"]),
        ],
        13,
    ),
    "compared": (
        [
            N("Size", ["x"], ["n"]),
            N("Less", ["n", "two"], ["a"]),
            N("LessOrEqual", ["n", "n"], ["b"]),
            N("Greater", ["n", "two"], ["c"]),
            N("GreaterOrEqual", ["two", "n"], ["d"]),
            N("Where", ["a", "one", "two"], ["e"]),
            N("Where", ["b", "e", "one"], ["f"]),
            N("Where", ["c", "f", "one"], ["g"]),
            N("Where", ["d", "one", "g"], ["h"]),
            N("CastLike", ["h", "x"], ["i"]),
            N("Mul", ["x", "i"], ["y"]),
        ],
        17,
    ),
    "filled": (
        [
            N("ConstantOfShape", ["dims"], ["z"], value=onnx.numpy_helper.from_array(np.float32([2.5]))),
            N("IsNaN", ["z"], ["never"]),
            N("Where", ["never", "x", "z"], ["w"]),
            N("Mul", ["x", "w"], ["y"]),
        ],
        17,
    ),
    "divided": (
        [
            N("Constant", [], ["a"], value_int=-7),
            N("Constant", [], ["b"], value_int=2),
            N("Div", ["a", "b"], ["q"]),
            N("Mod", ["a", "b"], ["r"]),
            N("Add", ["q", "r"], ["t"]),
            N("Cast", ["t"], ["f"], to=1),
            N("Constant", [], ["h"], value_float=0.5),
            N("Constant", [], ["k"], value_floats=[1.0, 2.0, 3.0, 4.0]),
            N("Mul", ["f", "h"], ["u"]),
            N("Mul", ["k", "u"], ["v"]),
            N("Add", ["x", "v"], ["y"]),
        ],
        17,
    ),
    "places": (
        [N("NonZero", ["mask"], ["at"]), N("Squeeze", ["at", "zeros"], ["places"]), N("Gather", ["x", "places"], ["y"], axis=2)],
        13,
    ),
    "swish": ([N("Swish", ["x"], ["y"], alpha=0.7)], 24),
}


@pytest.mark.parametrize("name", SIZES)
def test_what_depends_on_shapes_alone_is_worked_out(tmp_path: Path, name: str) -> None:
    nodes, opset = SIZES[name]
    held = {
        "one": ints(1),
        "two": ints(2),
        "zero": np.int64(0),
        "zeros": ints(0),
        "dims": ints(3, 4),
        "mask": ints(0, 1, 0, 1),
        "none": ints(),
    }
    scalars = {"two": np.int64(2), "one": np.int64(1)} if name == "shape" else {}
    x = numbers(2, 3, 4)
    model = folded(tmp_path / "x.onnx", nodes, held | scalars, x, opset)
    expected = x / (1 + np.exp(-0.7 * x)) if name == "swish" else np.concatenate([run(tmp_path / "x.onnx", part[None])[0] for part in x])
    np.testing.assert_allclose(model(torch.from_numpy(x)).numpy(), expected, rtol=1e-6)
    assert len(model.calls) <= 3


ODD: dict[str, tuple[list[Any], int]] = {
    "parts of which the last are unused": ([N("Split", ["x"], ["a", "b"], axis=2), N("Relu", ["a"], ["y"])], 13),
    "parts of which the first is unused": ([N("Split", ["x"], ["a", "b"], axis=2), N("Relu", ["b"], ["y"])], 9),
    "four parts": ([N("Split", ["x"], ["a", "b", "c", "d"], axis=2, num_outputs=4), N("Relu", ["b"], ["y"])], 18),
    "the largest": ([N("TopK", ["x", "two"], ["a", "b"]), N("Relu", ["a"], ["y"])], 17),
    "the largest of a column": ([N("TopK", ["x"], ["a", "b"], k=2, axis=1), N("Relu", ["a"], ["y"])], 9),
    "the least": ([N("TopK", ["x", "two"], ["a", "b"], axis=-2, largest=0), N("Relu", ["a"], ["y"])], 11),
    "one number added to a product": ([N("MatMul", ["x", "square"], ["p"]), N("Add", ["p", "half"], ["y"])], 17),
    "a column and a row": ([N("MatMul", ["x", "column"], ["p"]), N("Add", ["p", "row"], ["y"])], 17),
}


@pytest.mark.parametrize("name", ODD)
def test_several_nodes(tmp_path: Path, name: str) -> None:
    nodes, opset = ODD[name]
    held = {"square": numbers(4, 4), "half": numbers(1), "column": numbers(4, 1), "row": numbers(3), "two": ints(2)}
    x = numbers(1, 3, 4)
    model = folded(tmp_path / "x.onnx", nodes, held, x, opset)
    np.testing.assert_allclose(model(torch.from_numpy(x)).numpy(), run(tmp_path / "x.onnx", x)[0], rtol=1e-6)


# ---- several inputs --------------------------------------------------------------------------------------------------------


def several(path: Path) -> Path:
    """`y = a W + b` of two inputs whose rows are open."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, kind, ["batch", "rows", n]) for name, n in (("a", 3), ("b", 4))]
    nodes = [N("MatMul", ["a", "w"], ["p"]), N("Add", ["p", "b"], ["y"])]
    held = [onnx.numpy_helper.from_array(numbers(3, 4), "w")]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_empty_tensor_value_info("y")], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def test_several_inputs_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = several(tmp_path / "x.onnx")
    model = load(path, {"b": (5, 4), "a": (5, 3)})
    a, b = numbers(1, 5, 3), numbers(1, 5, 4)
    np.testing.assert_allclose(model(torch.from_numpy(a), torch.from_numpy(b)).numpy(), run(path, a, b)[0], rtol=1e-5)
    assert main(["audit", str(path), "--input", "a=5,3", "--input", "b=5,4", "--json", "-"]) == 0
    network = json.loads(capsys.readouterr().out)["network"]
    size = float(np.linalg.norm(numbers(3, 4).astype(float), 2))
    truth = np.sqrt(1 + size**2)
    assert network["lower"] * (1 - 1e-9) <= truth <= network["upper"] * (1 + 1e-12)
    assert network["upper"] <= 1.01 * (1 + size)
    for line, message in (
        (["a=5,3"], "expected the shape of b without the batch: type --input b=3,224,224"),
        (["5,3"], "expected a shape for each by its name"),
        (["c=5,3", "a=5,3"], "expected a shape for each by its name"),
        (["a=5,3", "a=5,4"], "expected one shape, or each with the name of its input"),
        (["a=5,7", "b=5,4"], "takes a of shape (?, ?, 3), and 5,7 was given"),
    ):
        assert main(["audit", str(path), *(part for x in line for part in ("--input", x))]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["audit", "gramlip.demo:demo", "--input", "x=3,32,32"]) == 2
    assert "is no ONNX model; expected one shape" in capsys.readouterr().err


# ---- control flow ----------------------------------------------------------------------------------------------------------


def inner(nodes: list[Any], inputs: list[str], outputs: list[str], held: dict[str, Array] | None = None) -> Any:
    """A graph inside of a node; the types of what it takes and returns are left open, but for those that onnxruntime asks for."""
    kinds = {"turn": (onnx.TensorProto.INT64, []), "going": (onnx.TensorProto.BOOL, []), "goes on": (onnx.TensorProto.BOOL, [])}

    def told(name: str) -> Any:
        kind, shape = kinds.get(name, (onnx.TensorProto.FLOAT, None))
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (held or {}).items()]
    return onnx.helper.make_graph(nodes, "inner", list(map(told, inputs)), list(map(told, outputs)), constants)


DOUBLE, HALVE = (
    inner([N("Add", ["x", "x"], ["d"])], [], ["d"]),
    inner([N("Mul", ["x", "half"], ["h"])], [], ["h"], {"half": np.float32(0.5)}),
)
AGAIN = [N("Identity", ["going"], ["goes on"])]
STEP = inner([*AGAIN, N("Mul", ["s", "half"], ["t"]), N("Add", ["t", "x"], ["u"])], ["turn", "going", "s"], ["goes on", "u", "t"])
NESTED = inner(
    [
        *AGAIN,
        N("Equal", ["turn", "one"], ["second"]),
        N(
            "If",
            ["second"],
            ["v"],
            then_branch=inner([N("Neg", ["s"], ["t"])], [], ["t"]),
            else_branch=inner([N("Add", ["s", "x"], ["t"])], [], ["t"]),
        ),
    ],
    ["turn", "going", "s"],
    ["goes on", "v"],
)
WHILE = inner([N("Less", ["turn", "two"], ["goes on"]), N("Add", ["s", "x"], ["t"])], ["turn", "going", "s"], ["goes on", "t"])
SUMS = inner([N("Add", ["s", "p"], ["t"]), N("Identity", ["t"], ["u"])], ["s", "p"], ["t", "u"])
FLOWS: dict[str, tuple[list[Any], int]] = {
    "a condition": ([N("If", ["yes"], ["y"], then_branch=DOUBLE, else_branch=HALVE)], 17),
    "a condition on a shape": (
        [N("Size", ["x"], ["n"]), N("Less", ["n", "one"], ["c"]), N("If", ["c"], ["y"], then_branch=DOUBLE, else_branch=HALVE)],
        11,
    ),
    "a loop": ([N("Loop", ["three", "yes", "x"], ["y", "all"], body=STEP)], 17),
    "all of a loop": ([N("Loop", ["three", "", "x"], ["a", "b"], body=STEP), N("Relu", ["b"], ["y"])], 11),
    "all of a loop of now": ([N("Loop", ["three", "", "x"], ["a", "b"], body=STEP), N("Relu", ["b"], ["y"])], 13),
    "a condition in a loop": ([N("Loop", ["three", "yes", "x"], ["y"], body=NESTED)], 17),
    "while": ([N("Loop", ["", "yes", "x"], ["y"], body=WHILE)], 17),
    "a scan": ([N("Scan", ["zeros", "x"], ["a", "y"], body=SUMS, num_scan_inputs=1, scan_input_axes=[1])], 17),
    "a scan from behind": (
        [
            N(
                "Scan",
                ["zeros", "x"],
                ["a", "b"],
                body=SUMS,
                num_scan_inputs=1,
                scan_input_axes=[1],
                scan_input_directions=[1],
                scan_output_axes=[1],
                scan_output_directions=[1],
            ),
            N("Add", ["a", "zeros"], ["c"]),
            N("Add", ["b", "c"], ["y"]),
        ],
        17,
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_control_flow_that_is_the_same_for_every_input(tmp_path: Path, name: str) -> None:
    nodes, opset = FLOWS[name]
    held = {"yes": np.bool_(True), "one": np.int64(1), "two": np.int64(2), "three": np.int64(3), "half": np.float32(0.5)}
    x = numbers(1, 3, 4)
    model = folded(tmp_path / "x.onnx", nodes, held | {"zeros": numbers(1, 4) * 0}, x, opset)
    np.testing.assert_allclose(model(torch.from_numpy(x)).numpy(), run(tmp_path / "x.onnx", x)[0], rtol=1e-6)
    assert gl.audit(model, x.shape[1:]).upper < np.inf


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_bound_of_gates_that_is_none_is_refused(tmp_path: Path, clip: float) -> None:
    """Between -clip and clip there is no number, and `clamp` takes its upper end for all."""
    saved(
        path := tmp_path / "x.onnx",
        "GRU",
        (numbers(4, 2, 3), numbers(1, 15, 3), numbers(1, 15, 5)),
        17,
        1,
        {"hidden_size": 5, "clip": clip},
    )
    with pytest.raises(gl.UnsupportedError, match=r"clip=.*; expected .* a clip above 0"):
        load(path)


def test_control_flow_that_depends_on_the_input_is_refused(tmp_path: Path) -> None:
    depends = [N("ReduceMax", ["x"], ["m"], keepdims=0), N("Greater", ["m", "half"], ["c"])]
    held = {"half": np.float32(0.5), "yes": np.bool_(True), "many": np.int64(10**12)}
    for nodes in (
        [*depends, N("If", ["c"], ["y"], then_branch=DOUBLE, else_branch=HALVE)],
        [N("Loop", ["many", "yes", "x"], ["y", "all"], body=STEP)],
        [*depends, N("Cast", ["c"], ["n"], to=7), N("Loop", ["n", "yes", "x"], ["y", "all"], body=STEP)],
    ):
        with pytest.raises(gl.UnsupportedError, match=r"If: the condition depends|Loop: (more than|the number of runs depends)"):
            folded(tmp_path / "x.onnx", nodes, held, numbers(1, 3, 4), 17)


PASSES = inner([*AGAIN, N("Relu", ["s"], ["u"])], ["turn", "going", "s"], ["goes on", "u"])
TWICE = inner([*AGAIN, N("Loop", ["many", "", "s"], ["u"], body=PASSES)], ["turn", "going", "s"], ["goes on", "u"])
DAMAGED = {
    "no state": [N("Loop", ["three"], ["y"], body=STEP)],
    "no condition": [N("If", [], ["y"], then_branch=DOUBLE, else_branch=HALVE)],
    "no graph": [N("If", ["yes"], ["y"], then_branch=3, else_branch=HALVE)],
    "too few values": [N("Loop", ["three", "yes"], ["y"], body=STEP)],
    "a name that nothing makes": [N("If", ["yes"], ["y"], then_branch=inner([N("Relu", ["z"], ["d"])], [], ["d"]), else_branch=HALVE)],
    "an axis beyond the last": [N("Scan", ["x"], ["y"], body=SUMS, num_scan_inputs=1, scan_input_axes=[7])],
    "more scanned than given": [N("Scan", ["x"], ["y"], body=SUMS, num_scan_inputs=9)],
    "for ever": [N("Loop", ["", "yes", "x"], ["y"], body=PASSES)],
    "too often in all": [N("Loop", ["many", "yes", "x"], ["y"], body=TWICE)],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_control_flow_is_one_line(tmp_path: Path, name: str) -> None:
    held = {"yes": np.bool_(True), "three": np.int64(3), "many": np.int64(10**6), "half": np.float32(0.5)}
    with pytest.raises(
        (gl.InputError, gl.UnsupportedError), match=r"damaged|cannot be applied|not covered|which no node before it makes"
    ) as error:
        folded(tmp_path / "x.onnx", DAMAGED[name], held, numbers(1, 3, 4), 17)
    assert "\n" not in str(error.value)


def test_codes_of_activations_are_refused_with_what_to_type(tmp_path: Path) -> None:
    nodes = [N("QuantizeLinear", ["x", "scale"], ["q"]), N("DequantizeLinear", ["q", "scale"], ["y"])]
    with pytest.raises(gl.UnsupportedError, match=r"QuantizeLinear: rounds values to codes.*type the model before"):
        folded(tmp_path / "x.onnx", nodes, {"scale": np.float32(0.1)}, numbers(1, 3, 4), 17)


def test_a_layer_whose_weight_is_stored_as_codes(tmp_path: Path) -> None:
    nodes = [N("DequantizeLinear", ["codes", "scales", "zero"], ["w"], axis=1), N("MatMul", ["x", "w"], ["y"])]
    held = {"codes": np.arange(-10, 10, dtype=np.int8).reshape(4, 5), "scales": numbers(5, low=0.01), "zero": np.arange(5, dtype=np.int8)}
    x = numbers(1, 3, 4)
    model = folded(tmp_path / "x.onnx", nodes, held, x, 17)
    np.testing.assert_allclose(model(torch.from_numpy(x)).numpy(), run(tmp_path / "x.onnx", x, exactly=True)[0], rtol=1e-5, atol=1e-6)
    truth = np.linalg.norm((held["codes"].astype(float) - held["zero"]) * held["scales"].astype(float), 2)
    report = gl.audit(model, x.shape[1:])
    assert report.lower * (1 - 1e-12) <= truth <= report.upper
    assert report.upper <= 1.01 * truth


@pytest.mark.parametrize("mode", ["half_pixel", "asymmetric"])
@pytest.mark.parametrize("rounds", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
def test_nearest_neighbours_that_float32_takes_elsewhere_are_refused(tmp_path: Path, mode: str, rounds: str) -> None:
    """From 10 by 0.6 the place of an output is nearly a whole number: onnxruntime takes one side, the real numbers the other."""
    refused = 0
    for n, m in itertools.product((3, 5, 9, 10), (2, 3, 6, 11, 13, 23)):
        x = numbers(1, 1, n)
        held = {"by": np.array([1, 1, np.float32(m / n)], dtype=np.float32)}
        node = N("Resize", ["x", "", "by"], ["y"], mode="nearest", coordinate_transformation_mode=mode, nearest_mode=rounds)
        try:
            model = folded(tmp_path / "x.onnx", [node], held, x, 13)
        except gl.UnsupportedError as error:
            refused += "others in float32" in str(error)
            continue
        assert np.array_equal(model(torch.from_numpy(x)).numpy(), run(tmp_path / "x.onnx", x)[0])
    assert refused < 15


# ---- ONNX's own cases ------------------------------------------------------------------------------------------------------

OTHER = (
    "test_attention_4d_fp16",
    "test_attention_4d_causal_fp16",
    "test_l2normalization_axis_0",
)  # rounding of half precision; zero by zero


def test_the_cases_of_onnx_itself(tmp_path: Path) -> None:
    """What its reference implementation computes, in every version: it is computed, or refused; all inputs but the first are constants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = importlib.import_module("onnx.backend.test.case.node").collect_testcases(None)
    right, wrong = 0, list[str]()
    for found in given:
        known = found.model is not None and {node.op_type for node in found.model.graph.node} <= {*OPERATORS, *FLOW}
        if not known or not found.data_sets or found.name.startswith(OTHER):
            continue
        inputs, outputs = found.data_sets[0]
        if not all(isinstance(x, np.ndarray) and x.dtype.kind in "biuf" and x.size for x in (*inputs, *outputs)) or not inputs:
            continue
        model = onnx.ModelProto()
        model.CopyFrom(found.model)
        for value, held in list(zip(found.model.graph.input, inputs, strict=False))[1:]:
            model.graph.input.remove(value)
            model.graph.initializer.append(onnx.numpy_helper.from_array(held, value.name))
        onnx.save(model, tmp_path / "x.onnx")
        try:
            made = load(tmp_path / "x.onnx")(torch.from_numpy(np.array(inputs[0])))
        except (gl.UnsupportedError, gl.InputError):
            continue
        made = made if isinstance(made, tuple) else (made,)
        close = (np.allclose(a.double().numpy(), b.astype(float), 1e-3, 1e-5, equal_nan=True) for a, b in zip(made, outputs, strict=True))
        if [tuple(x.shape) for x in made] == [x.shape for x in outputs] and all(close):
            right += 1
        else:
            wrong.append(found.name)
    assert not wrong
    assert right > 800


def test_every_operator_has_a_case() -> None:
    tried = {found.values[0] for found in CASES} | {node.op_type for nodes, _ in (*SIZES.values(), *ODD.values()) for node in nodes}
    assert set(OPERATORS) == tried


def test_the_document_names_every_operator() -> None:
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text().split("## Whole ONNX models")[1].split("## Pickles")[0]
    assert set(OPERATORS) <= set(re.findall(r"`([A-Z]\w+)`", page))


@pytest.mark.parametrize(
    ("settings", "lengths", "reason"),
    [
        ({"activations": ["Sigmoid", "Affine", "Tanh"]}, None, r"activations=.*'Affine'.*; expected 3 for each direction of Sigmoid, Tanh"),
        ({"activations": ["Sigmoid", "Tanh"]}, None, r"expected 3 for each direction"),
        ({}, [5, 2], r"sequences of lengths \[5, 2\]; expected at most 4, that of the input"),
    ],
)
def test_a_recurrent_layer_that_is_not_covered_is_one_line(tmp_path: Path, settings: Any, lengths: Any, reason: str) -> None:
    given = (numbers(4, 2, 3), numbers(1, 20, 3), numbers(1, 20, 5), None, None if lengths is None else np.int32(lengths))
    saved(tmp_path / "x.onnx", "LSTM", given, 17, 1, {"hidden_size": 5, **settings})
    with pytest.raises(gl.UnsupportedError, match=reason):
        load(tmp_path / "x.onnx")


@pytest.mark.parametrize("extra", [{}, {"clip": 0.7}, {"input_forget": 1}], ids=str)
@pytest.mark.parametrize("lengths", [None, [2]], ids=str)
def test_the_constant_of_a_cell_with_peepholes_is_not_below_what_its_inputs_show(tmp_path: Path, extra: Any, lengths: Any) -> None:
    path, weights = tmp_path / "x.onnx", (3 * numbers(1, 20, 3), numbers(1, 20, 5), numbers(1, 40))
    rest = (None if lengths is None else np.int32(lengths), None, None, 2 * numbers(1, 15))
    saved(path, "LSTM", (numbers(4, 1, 3), *weights, *rest), 17, 1, {"hidden_size": 5, **extra})
    model = load(path)
    upper = gl.audit(model, model.example).upper
    torch.manual_seed(0)
    x, ways = 3 * torch.randn(200, 4, 1, 3), torch.randn(200, 4, 1, 3) / 1e3
    steepest = max(float((model(a + d) - model(a)).norm() / d.norm()) for a, d in zip(x, ways, strict=True))
    assert 0.5 < steepest * (1 - 1e-3) <= upper < float("inf")
