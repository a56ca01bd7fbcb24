"""What is read of a file of ONNX: its graph, checked before anything is computed. No code of a file runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.onnx.registry import NEWEST, OLDEST
from gramlip.reports.output import printable
from gramlip.reports.readers import extra, line

Dims = tuple[int | None, ...]
_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Operation:
    """A node as the file has it."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class File:
    """A graph: its constants, its operations in the order of their work, and the names, types and shapes of what goes in.

    `inputs` has the sizes of each input, None for an axis of any size, and for an input of which the file does not say the axes.
    """

    path: Path
    opset: int
    inputs: dict[str, tuple[torch.dtype, Dims | None]]
    outputs: tuple[str, ...]
    constants: dict[str, Tensor]
    operations: tuple[Operation, ...]


def read(path: Path) -> File:
    """The graph of a file, with its weights.

    Raises:
        InputError: no package `onnx`, no whole model, data outside of the file's folder, or an operator set that is not known.
    """
    package = extra(path, "onnx", "onnx")
    model = _model(package, path)
    opset = _opset(path, model)
    graph = model.graph
    constants = {held.name: _tensor(package, path, held) for held in graph.initializer}
    if graph.sparse_initializer:
        msg = f"{path} holds sparse weights; expected dense ones"
        raise InputError(msg)
    inputs = {value.name: _input(package, path, value) for value in graph.input if value.name not in constants}
    operations = tuple(_operation(package, path, node, i) for i, node in enumerate(graph.node))
    return File(path, opset, inputs, tuple(value.name for value in graph.output), constants, operations)


def _model(package: Any, path: Path) -> Any:
    try:
        model = package.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # protobuf's own errors have no common type
        msg = f"{path} cannot be read as ONNX ({line(error)}); expected a whole model: export it again"
        raise InputError(msg) from None
    if not model.graph.output or not model.graph.node:
        msg = f"{path} holds no graph with outputs; expected a whole model: export it again"
        raise InputError(msg)
    if not model.functions:
        return model
    from importlib import import_module

    try:
        return import_module("onnx.inliner").inline_local_functions(model)
    except Exception as error:  # as above
        msg = f"{path} holds functions that cannot be read ({line(error)}); expected a whole model: export it again"
        raise InputError(msg) from None


def _opset(path: Path, model: Any) -> int:
    opset = next((int(held.version) for held in model.opset_import if held.domain in _DOMAINS), 1)
    if not OLDEST <= opset <= NEWEST:
        msg = f"{path} uses version {opset} of ONNX's operators; expected {OLDEST} to {NEWEST}: type onnx.version_converter.convert_version"
        raise InputError(msg)
    return opset


def _kind(package: Any, path: Path, name: str, number: int) -> torch.dtype:
    try:
        found = getattr(torch, str(package.helper.tensor_dtype_to_np_dtype(number).name), None)
    except (KeyError, AttributeError, TypeError):
        found = None
    if not isinstance(found, torch.dtype):
        msg = f"{path}: {printable(name)} has entries of a type that torch has not; expected numbers"
        raise InputError(msg)
    return found


def _tensor(package: Any, path: Path, held: Any) -> Tensor:
    """A stored tensor; data outside of the file must lie in the file's folder, and be as long as the shape says."""
    kind = _kind(package, path, held.name, held.data_type)
    shape = tuple(held.dims)
    try:
        if min(shape, default=0) < 0:
            msg = f"the shape {shape}"
            raise ValueError(msg)
        if held.data_location == package.TensorProto.EXTERNAL:
            _check_place(path, held, math.prod(shape) * kind.itemsize)
        values: Any = np.array(package.numpy_helper.to_array(held, str(path.parent)), order="C")
        if values.dtype.kind not in "biufc":  # a type of ml_dtypes, by its bits
            values = values.view(f"u{values.dtype.itemsize}")
        made = torch.from_numpy(values)
        return (made if made.dtype == kind else made.view(kind)).reshape(shape)
    except Exception as error:  # damaged files show in many ways
        msg = f"{path}: {printable(held.name)} cannot be read ({line(error)}); expected a whole file: export it again"
        raise InputError(msg) from None


def _check_place(path: Path, held: Any, size: int) -> None:
    told = {entry.key: entry.value for entry in held.external_data}
    folder = path.parent.resolve()
    place = (folder / told.get("location", "")).resolve()
    if not place.is_relative_to(folder) or not place.is_file():
        msg = f"its data is in {printable(told.get('location', ''))!r}, which is no file in the folder of the model"
        raise ValueError(msg)
    offset = int(told.get("offset", 0))
    length = int(told.get("length", size))
    if offset < 0 or length != size or offset + length > place.stat().st_size:
        msg = f"{length} bytes from {offset} of {place.name} for {size} bytes"
        raise ValueError(msg)


def _input(package: Any, path: Path, value: Any) -> tuple[torch.dtype, Dims | None]:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type":
        msg = f"{path} takes {printable(value.name)}, which is no tensor; expected tensors alone"
        raise InputError(msg)
    kind = _kind(package, path, value.name, tensor.elem_type)
    if not tensor.HasField("shape"):
        return kind, None
    return kind, tuple(int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)


def _operation(package: Any, path: Path, node: Any, i: int) -> Operation:
    op = node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"
    name = printable(node.name or f"{node.op_type}_{i}")
    attributes = {held.name: _attribute(package, path, held) for held in node.attribute}
    return Operation(printable(op), name, tuple(node.input), tuple(node.output), attributes)


def _attribute(package: Any, path: Path, held: Any) -> Any:
    value = package.helper.get_attribute_value(held)
    if held.name in ("to", "dtype") and isinstance(value, int):
        return _kind(package, path, held.name, value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, package.TensorProto):
        return _tensor(package, path, value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
