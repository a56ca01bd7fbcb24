"""A graph of ONNX as a module: weights as they are stored, each node a call of torch, which `torch.export` then follows."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramlip.errors import InputError, UnsupportedError, first_line
from gramlip.onnx.files import Dims, File, Operation, read
from gramlip.onnx.idioms import rewritten
from gramlip.onnx.registry import OPERATORS, VALUELESS, Function, Node, RefusedError, floating

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
        """What the node returns."""
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
            held = nn.Parameter(tensor, requires_grad=False) if real else tensor
            (self.weights.register_parameter if real else self.weights.register_buffer)(self.places[name], held)  # type: ignore[arg-type]
        self.calls: list[str] = []
        self.calls += [self._place(path, call) for path, call in calls]

    def _place(self, path: str, call: Call) -> str:
        """Put a call at its dotted path, or at one beside it where something else is there."""
        *parents, last = path.split(".")
        parent: nn.Module = self
        for i, name in enumerate(parents):
            found = getattr(parent, name, None)
            if found is None or not isinstance(found, nn.Module):
                parents[i] = _free(name, dir(parent))
                found = nn.Module()
                parent.add_module(parents[i], found)
            parent = found
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
            made = call(*(values[name] for name in call.inputs))
            values |= zip(call.outputs, made if isinstance(made, tuple | list) else (made,), strict=False)
        found = tuple(values[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found

    def _one_by_one(self, batch: Tensor) -> Any:
        made = [self(sample[None]) for sample in batch]
        if isinstance(made[0], Tensor):
            return torch.cat(made)
        return tuple(map(torch.cat, zip(*made, strict=True)))


def load(path: str | Path, shape: Sequence[int] | None = None) -> OnnxModule:
    """The model in a file of ONNX, in evaluation mode; no code of the file runs.

    Shape arithmetic is worked out once, for the inputs' shapes. What is bounded is the graph as a function of real numbers, with the
    weights as they are stored.

    Args:
        path: the file.
        shape: the shape of the model's only input without the batch, such as (3, 224, 224); by default the file's own.

    Raises:
        InputError: no package `onnx`, a damaged file, data outside of its folder, or a shape that the file does not have.
        UnsupportedError: operators or options that are not covered: all of them, with the names of their nodes.
    """
    file = read(Path(path))
    return OnnxModule(file, _example(file, shape)).eval()


# ---- inputs --------------------------------------------------------------------------------------------------------------


def _example(file: File, shape: Sequence[int] | None) -> list[Tensor]:
    if not file.inputs:
        msg = f"{file.path} takes no input; expected a model"
        raise InputError(msg)
    if shape is not None and len(file.inputs) > 1:
        msg = f"{file.path} takes {_named(file)}; expected one input for one shape, or a file that has all: type gramlip.onnx.load(path)"
        raise InputError(msg)
    return [torch.zeros(_sizes(file, name, dims, shape), dtype=kind) for name, (kind, dims) in file.inputs.items()]


def _named(file: File) -> str:
    return ", ".join(f"{name} of shape {_shown(dims)}" for name, (_, dims) in file.inputs.items())


def _shown(dims: Dims | None) -> str:
    return "?" if dims is None else f"({', '.join('?' if n is None else str(n) for n in dims)})"


def _sizes(file: File, name: str, dims: Dims | None, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The sizes of an input, the batch's too: 1 where the file leaves it open."""
    if shape is None:
        known = () if dims is None else (dims[0] or 1, *dims[1:]) if dims else ()
        if dims is None or None in known:
            msg = f"{file.path} takes {_named(file)}; expected the shape without the batch: type gramlip.onnx.load(path, (3, 224, 224))"
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
        self.file = file
        self.values: dict[str, Tensor] = dict(file.constants)  # what is known, and stand-ins of the right shape
        self.kept: dict[str, Tensor] = dict(file.constants)  # constants that calls may take
        self.values |= {name: _stand_in(x) for name, x in zip(file.inputs, example, strict=True)}
        self.varies = set(file.inputs)
        self.lost: set[str] = set()  # results of what is refused
        self.refused: dict[str, list[str]] = {}
        self.operations = rewritten(file.operations, file.constants)
        self.used = {name for operation in self.operations for name in operation.inputs} | set(file.outputs)
        self.calls: list[tuple[str, Call]] = []

    def built(self) -> tuple[list[tuple[str, Call]], dict[str, Tensor]]:
        """The calls that the outputs need, by their paths, and the constants that these take."""
        for operation in self.operations:
            if operation.op not in OPERATORS:
                self._refuse(operation, "")
            elif not self.lost.intersection(operation.inputs):
                self._add(operation)
            else:
                self.lost.update(operation.outputs)
        if self.refused:
            named = "; ".join(f"{what} ({_few(names)})" for what, names in self.refused.items())
            msg = f"{self.file.path} has operators that are not covered: {named}; expected those of docs/formats.md#whole-onnx-models"
            raise UnsupportedError(msg)
        return self._needed()

    def _refuse(self, operation: Operation, why: str) -> None:
        self.refused.setdefault(f"{operation.op}: {why}" if why else operation.op, []).append(operation.name)
        self.lost.update(operation.outputs)

    def _add(self, operation: Operation) -> None:
        missing = next((name for name in operation.inputs if name and name not in self.values), None)
        if missing is not None:
            msg = f"{self.file.path}: {operation.name} takes {missing!r}, which no node before it makes; expected a whole model"
            raise InputError(msg)
        given = [self.values[name] if name else None for name in operation.inputs]
        known = [name not in self.varies for name in operation.inputs]
        results = max((i + 1 for i, name in enumerate(operation.outputs) if name in self.used), default=1)
        node = Node(operation.op, operation.name, self.file.opset, operation.attributes, given, known, results)
        try:
            call = Call(OPERATORS[operation.op](node), node.extra, operation.inputs, operation.outputs[:results])
            with torch.no_grad():
                made = call(*given)
            node.check_read()
        except RefusedError as error:
            self._refuse(operation, str(error))
            return
        except Exception as error:  # whatever a damaged node makes torch say
            shapes = [tuple(x.shape) if x is not None else None for x in given]
            msg = f"{self.file.path}: {operation.name} ({operation.op}) cannot be applied to inputs of shapes {shapes}: {first_line(error)}"
            raise InputError(msg) from error
        self._keep(node, call, dict(zip(call.outputs, made if isinstance(made, tuple | list) else (made,), strict=False)))

    def _keep(self, node: Node, call: Call, made: dict[str, Tensor]) -> None:
        if not all(node.known) and node.op not in VALUELESS:
            self.varies.update(made)
            self.values |= {name: _stand_in(x) for name, x in made.items()}
        else:
            self.values |= made
            real = any(x is not None and floating(x) for x in node.given) and any(map(floating, made.values()))
            if (
                node.op in _MOVES or node.op in VALUELESS or not real
            ):  # else rounding: what is bounded is the function of the stored numbers
                self.kept |= {name: x.clone() for name, x in made.items()}
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


def _free(name: str, taken: Iterable[str]) -> str:
    others = set(taken)
    return next(x for x in _numbered(name) if x not in others)


def _numbered(name: str) -> Iterator[str]:
    yield name
    i = 1
    while True:
        yield f"{name}_{i}"
        i += 1
