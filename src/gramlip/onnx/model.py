"""An ONNX file as a module of torch: its graph is read and checked, and each node becomes calls of torch. No code of a file runs."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gramlip.errors import InputError, UnsupportedError, first_line
from gramlip.onnx.registry import (
    FLOW,
    NEWEST,
    OLDEST,
    OPERATORS,
    REASONS,
    VALUELESS,
    Function,
    Graph,
    Node,
    Operation,
    RefusedError,
    floating,
)
from gramlip.reports.output import printable
from gramlip.reports.readers import extra, line

Dims = tuple[int | None, ...]
_DOMAINS = ("", "ai.onnx")


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
    constants = {initializer.name: _tensor(package, path, initializer) for initializer in graph.initializer}
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
    opset = next((int(imported.version) for imported in model.opset_import if imported.domain in _DOMAINS), 1)
    if not OLDEST <= opset <= NEWEST:
        msg = f"{path} uses version {opset} of ONNX's operators; expected {OLDEST} to {NEWEST}: type onnx.version_converter.convert_version"
        raise InputError(msg)
    return opset


def _kind(package: Any, path: Path, name: str, number: int) -> torch.dtype:
    try:
        dtype = getattr(torch, str(package.helper.tensor_dtype_to_np_dtype(number).name), None)
    except (KeyError, AttributeError, TypeError):
        dtype = None
    if not isinstance(dtype, torch.dtype):
        msg = f"{path}: {printable(name)} has entries of a type that torch has not; expected numbers"
        raise InputError(msg)
    return dtype


def _tensor(package: Any, path: Path, initializer: Any) -> Tensor:
    """A stored tensor; data outside of the file must lie in the file's folder, and be as long as the shape says."""
    kind = _kind(package, path, initializer.name, initializer.data_type)
    shape = tuple(initializer.dims)
    try:
        if min(shape, default=0) < 0:
            msg = f"the shape {shape}"
            raise ValueError(msg)
        if initializer.data_location == package.TensorProto.EXTERNAL:
            _check_place(path, initializer, math.prod(shape) * kind.itemsize)
        values: Any = np.array(package.numpy_helper.to_array(initializer, str(path.parent)), order="C")
        if values.dtype.kind not in "biufc":  # a type of ml_dtypes, by its bits
            values = values.view(f"u{values.dtype.itemsize}")
        tensor = torch.from_numpy(values)
        return (tensor if tensor.dtype == kind else tensor.view(kind)).reshape(shape)
    except Exception as error:  # damaged files show in many ways
        msg = f"{path}: {printable(initializer.name)} cannot be read ({line(error)}); expected a whole file: export it again"
        raise InputError(msg) from None


def _check_place(path: Path, initializer: Any, size: int) -> None:
    told = {entry.key: entry.value for entry in initializer.external_data}
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
    attributes = {attribute.name: _attribute(package, path, attribute) for attribute in node.attribute}
    return Operation(printable(op), name, tuple(node.input), tuple(node.output), attributes)


def _attribute(package: Any, path: Path, item: Any) -> Any:
    value = package.helper.get_attribute_value(item)
    if item.name in ("to", "dtype") and isinstance(value, int):
        return _kind(package, path, item.name, value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, package.TensorProto):
        return _tensor(package, path, value)
    if isinstance(value, package.GraphProto):
        constants = {item.name: _tensor(package, path, item) for item in value.initializer}
        inputs = tuple(item.name for item in value.input if item.name not in constants)
        operations = tuple(_operation(package, path, node, i) for i, node in enumerate(value.node))
        return Graph(inputs, tuple(item.name for item in value.output), constants, operations)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


# ---- several nodes as one ------------------------------------------------------------------------------------------------
#
# Several nodes that an exporter wrote for one function are joined again: the same function of real numbers, with one rule.


def rewritten(operations: Iterable[Operation], constants: Mapping[str, Tensor]) -> list[Operation]:
    """The operations with idioms in one node each; those that only an idiom used stay, and are not needed any more.

    `where(b x > t, x, softplus(b x) / b)` is torch's softplus, `x tanh(softplus(x))` Mish, `x (1 / sqrt(v))` a quotient, `x W + b` a
    linear layer, and a softmax whose NaN are replaced is the softmax: it has none but where all of a row is masked, whatever the input.
    """
    idioms = _Idioms(constants)
    return [idioms.add(operation) for operation in operations]


_OF_ONE = ("Softplus", "Tanh", "IsNaN", "Softmax", "Sqrt", "Reciprocal")


class _Idioms:
    """Which operation makes a value."""

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        self.constants = dict(constants)
        self.makers: dict[str, Operation] = {}

    def add(self, operation: Operation) -> Operation:
        """The operation, or the one that it ends."""
        if operation.op == "Constant" and isinstance(tensor := operation.attributes.get("value"), Tensor):
            self.constants[operation.outputs[0]] = tensor
        idioms = {
            ("Where", 3): (self._softplus, self._softmax),
            ("Mul", 2): (self._mish, self._quotient),
            ("Add", 2): (self._linear,),
        }.get((operation.op, len(operation.inputs)), ())
        simplified = next((joined for idiom in idioms if (joined := idiom(operation)) is not None), operation)
        self.makers |= dict.fromkeys(operation.outputs, simplified)
        return simplified

    def _made(self, name: str, op: str) -> tuple[str, ...]:
        """The inputs of the operation of this kind that makes a value; nothing where another makes it."""
        maker = self.makers.get(name)
        return maker.inputs if maker is not None and maker.op == op and len(maker.inputs) == (1 if op in _OF_ONE else 2) else ()

    def _number(self, name: str) -> float | None:
        tensor = self.constants.get(name)
        return float(tensor) if tensor is not None and tensor.numel() == 1 else None

    def _softplus(self, operation: Operation) -> Operation | None:
        condition, x, smooth = operation.inputs
        greater = self._made(condition, "Greater")
        if not greater or (threshold := self._number(greater[1])) is None:
            return None
        argument, beta = greater[0], 1.0
        divided = self._made(smooth, "Div")
        if divided:
            beta = self._number(divided[1])
            factors = self._made(argument, "Mul")
            if beta is None or not factors or factors[0] != x or self._number(factors[1]) != beta:
                return None
            smooth = divided[0]
        elif argument != x:
            return None
        if self._made(smooth, "Softplus") != (argument,):
            return None
        return replace(operation, op="Softplus", inputs=(x,), attributes={"beta": beta, "threshold": threshold})

    def _mish(self, operation: Operation) -> Operation | None:
        for x, gate in (operation.inputs, operation.inputs[::-1]):
            tanh = self._made(gate, "Tanh")
            if tanh and self._made(tanh[0], "Softplus") == (x,) and not self.makers[tanh[0]].attributes:
                return replace(operation, op="Mish", inputs=(x,))
        return None

    def _softmax(self, operation: Operation) -> Operation | None:
        condition, _, x = operation.inputs
        if self._made(condition, "IsNaN") == (x,) and self._made(x, "Softmax"):
            return replace(operation, op="Identity", inputs=(x,))
        return None

    def _quotient(self, operation: Operation) -> Operation | None:
        for x, inverse in (operation.inputs, operation.inputs[::-1]):
            reciprocal = self._made(inverse, "Div")
            root = reciprocal[1:] if reciprocal and self._number(reciprocal[0]) == 1 else self._made(inverse, "Reciprocal")
            if root and self._made(root[0], "Sqrt"):
                return replace(operation, op="Div", inputs=(x, root[0]))
        return None

    def _linear(self, operation: Operation) -> Operation | None:
        for product, bias in (operation.inputs, operation.inputs[::-1]):
            factors = self._made(product, "MatMul")
            if factors and self._sizes(factors[1])[1:] == self._sizes(bias) and len(self._sizes(bias)) == 1:
                return replace(self.makers[product], inputs=(*factors, bias), outputs=operation.outputs)
        return None

    def _sizes(self, name: str) -> tuple[int, ...]:
        tensor = self.constants.get(name)
        return () if tensor is None else tuple(tensor.shape)


# ---- the module ----------------------------------------------------------------------------------------------------------
#
# The graph as a module: weights as stored, each node a call of torch, which `torch.export` then follows.

_MOVES = (
    *("Constant", "ConstantOfShape", "Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile", "Concat"),
    *("Split", "Slice", "Gather", "GatherElements", "Trilu", "Pad", "Where", "Neg"),
)  # what they make of constants is exact, and is kept in place of the constants


class Call(nn.Module):
    """One node: a function of its inputs, and of constants that it holds."""

    def __init__(self, function: Function, extra: Sequence[Tensor], inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.function, self.inputs, self.outputs = function, tuple(inputs), tuple(outputs)
        self.held = [f"extra_{i}" for i in range(len(extra))]
        for name, tensor in zip(self.held, extra, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, *given: Tensor | None) -> Any:
        """The results of the node."""
        while given and given[-1] is None and not self.held:
            given = given[:-1]
        return self.function(*given, *(getattr(self, name) for name in self.held))


class OnnxModule(nn.Module):
    """A model of ONNX, for inputs of the shapes of `example`; a batch of another size goes through one sample after another.

    Attributes:
        example: an input of zeros for each of the model's, of the shapes that it was read for.
    """

    def __init__(self, file: File, example: Sequence[Tensor]) -> None:
        super().__init__()
        self.example = tuple(example)
        self.inputs, self.outputs = tuple(file.inputs), file.outputs
        calls, constants = _Builder(file, self.example).built()
        self.weights = nn.Module()
        self.places: dict[str, str] = {}  # value -> its name among the weights
        for name, tensor in constants.items():
            self.places[name] = _free(_identifier(name), dir(self.weights))
            real = tensor.is_floating_point()
            value = nn.Parameter(tensor, requires_grad=False) if real else tensor
            (self.weights.register_parameter if real else self.weights.register_buffer)(self.places[name], value)  # type: ignore[arg-type]
        self.calls: list[str] = []
        self.calls += [self._place(path, call) for path, call in calls]

    def _place(self, path: str, call: Call) -> str:
        """Put a call at its dotted path, or at one beside it where something else is there."""
        *parents, last = path.split(".")
        parent: nn.Module = self
        for i, name in enumerate(parents):
            child = getattr(parent, name, None)
            if child is None or not isinstance(child, nn.Module):
                parents[i] = _free(name, dir(parent))
                child = nn.Module()
                parent.add_module(parents[i], child)
            parent = child
        last = _free(last, dir(parent))
        parent.add_module(last, call)
        return ".".join((*parents, last))

    def forward(self, *given: Tensor) -> Any:
        """The model's outputs: a tensor, or a tuple of them."""
        shapes, known = [tuple(x.shape) for x in given], [tuple(x.shape) for x in self.example]
        if shapes != known:
            if len(given) == len(known) == 1 and known[0] == (1, *shapes[0][1:]):
                return self._one_by_one(given[0])
            msg = (
                f"inputs of shapes {shapes} were given; expected {known}, for which the model was read: type gramlip.onnx.load(path, shape)"
            )
            raise InputError(msg)
        values: dict[str, Any] = {name: getattr(self.weights, place) for name, place in self.places.items()}
        values |= dict(zip(self.inputs, given, strict=True)) | {"": None}
        for path in self.calls:
            call = self.get_submodule(path)
            assert isinstance(call, Call)
            result = call(*(values[name] for name in call.inputs))
            values |= zip(call.outputs, result if isinstance(result, tuple | list) else (result,), strict=False)
        results = tuple(values[name] for name in self.outputs)
        return results[0] if len(results) == 1 else results

    def _one_by_one(self, batch: Tensor) -> Any:
        results = [self(sample[None]) for sample in batch]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(map(torch.cat, zip(*results, strict=True)))


Shapes = Sequence[int] | Mapping[str, Sequence[int]]


def load(path: str | Path, shape: Shapes | None = None) -> OnnxModule:
    """The model in a file of ONNX, in evaluation mode; no code of the file runs.

    Shape arithmetic is worked out once, for the inputs' shapes. What is bounded is the graph as a function of real numbers, with the
    weights as they are stored.

    Args:
        path: the file.
        shape: the shape of the model's only input without the batch, such as (3, 224, 224), or those of some of its inputs by name; by
            default the file's own.

    Raises:
        InputError: no package `onnx`, a damaged file, data outside of its folder, or a shape that the file does not have.
        UnsupportedError: operators or options that are not covered: all of them, with the names of their nodes.
    """
    file = read(Path(path))
    return OnnxModule(file, _example(file, shape)).eval()


# ---- inputs --------------------------------------------------------------------------------------------------------------


def _example(file: File, shape: Shapes | None) -> list[Tensor]:
    if not file.inputs:
        msg = f"{file.path} takes no input; expected a model"
        raise InputError(msg)
    shapes = shape if isinstance(shape, Mapping) else {} if shape is None else dict.fromkeys(list(file.inputs)[:1], shape)
    if not set(shapes) <= set(file.inputs) or (len(file.inputs) > 1 and shape is not None and shape is not shapes):
        msg = f"{file.path} takes {_named(file)}; expected a shape for each by its name: type --input {next(iter(file.inputs))}=3,224,224"
        raise InputError(msg)
    return [torch.zeros(_sizes(file, name, dims, shapes.get(name)), dtype=kind) for name, (kind, dims) in file.inputs.items()]


def _named(file: File) -> str:
    return ", ".join(f"{name} of shape {_shown(dims)}" for name, (_, dims) in file.inputs.items())


def _shown(dims: Dims | None) -> str:
    return "?" if dims is None else f"({', '.join('?' if n is None else str(n) for n in dims)})"


def _sizes(file: File, name: str, dims: Dims | None, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The sizes of an input, the batch's too: 1 where the file leaves it open."""
    if shape is None:
        known = () if dims is None else (dims[0] or 1, *dims[1:]) if dims else ()
        if dims is None or None in known:
            single = len(file.inputs) == 1
            of, how = ("", "gramlip.onnx.load(path, (3, 224, 224))") if single else (f" of {name}", f"--input {name}=3,224,224")
            msg = f"{file.path} takes {_named(file)}; expected the shape{of} without the batch: type {how}"
            raise InputError(msg)
        return tuple(n for n in known if n is not None)
    sizes = tuple(int(n) for n in shape)
    if dims is None:
        return (1, *sizes)
    whole = sizes if len(dims) == len(sizes) and None not in dims else ((dims[0] if dims else None) or 1, *sizes)
    if len(whole) != len(dims) or any(n is not None and n != m for n, m in zip(dims, whole, strict=True)):
        given = ",".join(map(str, sizes))
        msg = f"{file.path} takes {name} of shape {_shown(dims)}, and {given} was given; expected its shape without the batch"
        raise InputError(msg)
    return whole


# ---- the graph -----------------------------------------------------------------------------------------------------------


class _Builder:
    """Node after node: constants are worked out, what depends on the input becomes a call."""

    def __init__(self, file: File, example: Sequence[Tensor]) -> None:
        self.file, self.opset, self.taken = file, file.opset, 0
        self.values: dict[str, Tensor] = dict(file.constants)  # what is known, and stand-ins of the right shape
        self.kept: dict[str, Tensor] = dict(file.constants)  # constants that calls may take
        self.values |= {name: _stand_in(x) for name, x in zip(file.inputs, example, strict=True)}
        self.varies = set(file.inputs)
        self.lost: set[str] = set()  # results of what is refused
        self.refused: dict[str, list[str]] = {}
        self.operations = rewritten(file.operations, file.constants)
        self.used = Graph((), file.outputs, {}, tuple(self.operations)).read()
        self.calls: list[tuple[str, Call]] = []

    def built(self) -> tuple[list[tuple[str, Call]], dict[str, Tensor]]:
        """The calls that the outputs need, by their paths, and the constants that these take."""
        for operation in self.operations:
            self.step(operation)
        if self.refused:
            named = "; ".join(f"{what} ({_few(names)})" for what, names in self.refused.items())
            msg = f"{self.file.path} has operators that are not covered: {named}; expected those of docs/formats.md#whole-onnx-models"
            raise UnsupportedError(msg)
        return self._needed()

    def step(self, operation: Operation) -> None:
        """Take in one operation; one of control flow is replaced by what it would run."""
        if operation.op not in OPERATORS and operation.op not in FLOW:
            self._refuse(operation, REASONS.get(operation.op, ""))
        elif self.lost.intersection(operation.inputs):
            self.lost.update(operation.outputs)
        elif operation.op in OPERATORS:
            self._add(operation)
        else:
            try:
                FLOW[operation.op](operation, self)
            except RefusedError as error:
                self._refuse(operation, str(error))
            except (InputError, UnsupportedError):
                raise
            except Exception as error:  # whatever a damaged node makes Python say
                msg = f"{self.file.path}: {operation.name} ({operation.op}) is damaged ({first_line(error)}); expected a whole model"
                raise InputError(msg) from error

    def known(self, name: str) -> Tensor | None:
        """The value of a name, None where it depends on the model's input or is refused."""
        return None if name in self.varies or name in self.lost else self.values.get(name)

    def hold(self, name: str, value: Tensor) -> None:
        """Enter a constant."""
        self.values[name] = self.kept[name] = value

    def _refuse(self, operation: Operation, reason: str) -> None:
        self.refused.setdefault(f"{operation.op}: {reason}" if reason else operation.op, []).append(operation.name)
        self.lost.update(operation.outputs)

    def _add(self, operation: Operation) -> None:
        missing = next((name for name in operation.inputs if name and name not in self.values), None)
        if missing is not None:
            msg = f"{self.file.path}: {operation.name} takes {missing!r}, which no node before it makes; expected a whole model"
            raise InputError(msg)
        given = [self.values[name] if name else None for name in operation.inputs]
        known = [name not in self.varies for name in operation.inputs]
        results = max((i + 1 for i, name in enumerate(operation.outputs) if name in self.used), default=1)
        node = Node(operation.op, operation.name, self.file.opset, operation.attributes, given, known, results, len(operation.outputs))
        try:
            call = Call(OPERATORS[operation.op](node), node.extra, operation.inputs, operation.outputs[:results])
            with torch.no_grad():
                result = call(*given)
            node.check_read()
        except RefusedError as error:
            self._refuse(operation, str(error))
            return
        except Exception as error:  # whatever a damaged node makes torch say
            shapes = [tuple(x.shape) if x is not None else None for x in given]
            msg = f"{self.file.path}: {operation.name} ({operation.op}) cannot be applied to inputs of shapes {shapes}: {first_line(error)}"
            raise InputError(msg) from error
        self._keep(node, call, dict(zip(call.outputs, result if isinstance(result, tuple | list) else (result,), strict=False)))

    def _keep(self, node: Node, call: Call, results: dict[str, Tensor]) -> None:
        if not all(node.known) and node.op not in VALUELESS:
            self.varies.update(results)
            self.values |= {name: _stand_in(x) for name, x in results.items()}
        else:
            self.values |= results
            real = any(x is not None and floating(x) for x in node.given) and any(map(floating, results.values()))
            if (
                node.op in _MOVES or node.op in VALUELESS or not real
            ):  # else rounding: what is bounded is the function of the stored numbers
                self.kept |= {name: x.clone() for name, x in results.items()}
                return
        self.calls.append((_path(call, node.name, self.file.constants), call))

    def _needed(self) -> tuple[list[tuple[str, Call]], dict[str, Tensor]]:
        if missing := [name for name in self.file.outputs if name not in self.values]:
            msg = f"{self.file.path} returns {', '.join(missing)}, which no node makes; expected a whole model"
            raise InputError(msg)
        needed, calls = set(self.file.outputs), list[tuple[str, Call]]()
        for path, call in reversed(self.calls):
            if needed.intersection(call.outputs):
                calls.append((path, call))
                needed.update(call.inputs)
        return calls[::-1], {name: x for name, x in self.kept.items() if name in needed}


def _stand_in(x: Tensor) -> Tensor:
    """A tensor of this shape in one number's memory."""
    return torch.zeros((), dtype=x.dtype).expand(x.shape)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _path(call: Call, name: str, weights: Container[str]) -> str:
    """The module that the node's weight is of, as torch names it, or the node's own name."""
    owned = [x.rpartition(".")[0] for end in (".weight", ".bias") for x in call.inputs if x in weights and x.endswith(end)]
    path = owned[0] if owned else name.replace("/", ".")
    return ".".join(_identifier(part) for part in path.split(".") if part) or "call"


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII) or "_"


def _free(name: str, names_taken: Iterable[str]) -> str:
    others = set(names_taken)
    return next(x for x in _numbered(name) if x not in others)


def _numbered(name: str) -> Iterator[str]:
    yield name
    i = 1
    while True:
        yield f"{name}_{i}"
        i += 1
