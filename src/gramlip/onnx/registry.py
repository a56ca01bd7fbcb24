"""`OPERATORS`: the known operators of ONNX, each a function from a node to the calls of torch that compute it; and control flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

LARGEST = 2**28  # entries of one value: a file of a few bytes may ask for any number
OLDEST, NEWEST = 7, 28  # versions of the operator set whose meaning the functions here have
Function = Callable[..., Any]


class RefusedError(Exception):
    """A node asks for something that is not covered. The text says what, without the node's name."""


@dataclass(frozen=True)
class Operation:
    """A node as the file has it."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """A graph inside of a node, as the file has it: names that it does not make are those of the graph around it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Tensor]
    operations: tuple[Operation, ...]

    def read(self) -> set[str]:
        """The names that it reads, those of inner graphs too."""
        inner = (value for operation in self.operations for value in operation.attributes.values() if isinstance(value, Graph))
        return {*self.outputs, *(name for operation in self.operations for name in operation.inputs)}.union(*(g.read() for g in inner))


@dataclass(frozen=True)
class Node:
    """A node of the graph, with what its inputs are for one example.

    Attributes:
        op: the operator's name.
        name: the node's own name, or one made of its operator and its place.
        opset: the version of the operator set that the file uses.
        attributes: by name: numbers, lists of numbers, text or tensors.
        given: a tensor for each input, None for one that is left out. Of inputs that depend on the model's input only the shape counts.
        known: for each input, whether it is the same for every input of the model.
        results: how many outputs of the node are used, up to the last of them.
        outputs: how many it has.
        extra: constants that the operator's function is to get behind the node's inputs.
        read: the attributes that were asked for.
    """

    op: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    given: Sequence[Tensor | None]
    known: Sequence[bool]
    results: int
    outputs: int
    extra: list[Tensor] = field(default_factory=list[Tensor])
    read: set[str] = field(default_factory=set[str])

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        self.read.add(name)
        return self.attributes.get(name, default)

    def has(self, i: int) -> bool:
        """Whether the i-th input is there."""
        return i < len(self.given) and self.given[i] is not None

    def tensor(self, i: int = 0) -> Tensor:
        """The i-th input, of which the shape counts."""
        value = self.given[i] if i < len(self.given) else None
        if value is None:
            msg = f"input {i} is missing"
            raise RefusedError(msg)
        return value

    def shape(self, i: int = 0) -> tuple[int, ...]:
        """The shape of the i-th input."""
        return tuple(self.tensor(i).shape)

    def constant(self, i: int) -> Tensor | None:
        """The value of the i-th input, None where it is left out.

        Raises:
            RefusedError: it depends on the model's input.
        """
        if not self.has(i):
            return None
        if not self.known[i]:
            msg = f"input {i} depends on the model's input; expected a constant"
            raise RefusedError(msg)
        return self.given[i]

    def setting(self, name: str, i: int) -> Any:
        """A list of numbers that old versions have as the attribute `name`, new ones as the i-th input; None where there is neither."""
        if (held := self.get(name)) is not None:
            return held
        value = self.constant(i)
        return None if value is None else value.tolist()

    def number(self, i: int, default: Any = None) -> Any:
        """The only entry of the i-th input."""
        value = self.constant(i)
        if value is not None and value.numel() != 1:
            msg = f"input {i} has the shape {tuple(value.shape)}; expected one number"
            raise RefusedError(msg)
        return default if value is None else value.reshape(()).item()

    def axis(self, default: int, rank: int | None = None, *, last: bool = False) -> int:
        """The attribute `axis` as a number from 0; with `last` it may be one behind the last axis."""
        return self.axes_of([self.get("axis", default)], rank, last=last)[0]

    def axes_of(self, axes: Sequence[int], rank: int | None = None, *, last: bool = False) -> list[int]:
        """Axes as numbers from 0."""
        n = len(self.shape()) if rank is None else rank
        if any(not -n <= axis < n + last for axis in axes):
            msg = f"axis {list(axes)} of {n} axes"
            raise RefusedError(msg)
        return [axis + n if axis < 0 else axis for axis in axes]

    def only(self, name: str, *values: Any) -> Any:
        """The attribute, the first value by default.

        Raises:
            RefusedError: it is none of the values.
        """
        value = self.get(name, values[0])
        if value not in values:
            msg = f"{name}={value!r}; expected {' or '.join(map(repr, values))}"
            raise RefusedError(msg)
        return value

    def single(self) -> None:
        """RefusedError where more than the first output is used."""
        if self.results > 1:
            msg = "an output beside the first is used"
            raise RefusedError(msg)

    def check_read(self) -> None:
        """RefusedError for an attribute that nobody asked for: a later version's, whose meaning is not known."""
        unread = sorted(set(self.attributes) - self.read - {*_WITHOUT_MEANING.get(self.op, ())})
        if unread:
            named = ", ".join(f"{name}={self.attributes[name]!r}" for name in unread)
            msg = f"{named}: an attribute that is not known"
            raise RefusedError(msg)


_WITHOUT_MEANING: dict[str, tuple[str, ...]] = {
    "BatchNormalization": ("momentum",),
    "Dropout": ("ratio", "seed"),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "GroupNormalization"), ("stash_type",)),
    **dict.fromkeys(("Cast", "CastLike"), ("saturate", "round_mode")),
    "MaxPool": ("storage_order",),
    "Attention": ("softmax_precision",),
    "Resize": ("extrapolation_value", "cubic_coeff_a", "nearest_mode", "coordinate_transformation_mode"),
}
"""Attributes that do not change the first output of an operator in evaluation mode, or not of the kinds that are covered."""

_STEPS = (
    "rounds values to codes: a step function, which no Lipschitz constant holds for; "
    "type the model before its activations were quantised (quantised weights alone are read)"
)
REASONS: dict[str, str] = {
    **dict.fromkeys(("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"), _STEPS),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), "takes codes of activations, which QuantizeLinear rounds to steps"),
}
"""Operator -> why no function of it is known, where that is no accident."""

Builder = Callable[[Node], Function]
OPERATORS: dict[str, Builder] = {}
"""Operator -> function of a node that returns a function of the node's inputs, tensors, which returns its output or a tuple of them."""

VALUELESS = ("Shape", "Size")
"""Operators whose output depends on shapes alone, and so not on the model's input."""


def register(*names: str) -> Callable[[Builder], Builder]:
    """Enter a function in `OPERATORS`."""

    def enter(builder: Builder) -> Builder:
        OPERATORS.update(dict.fromkeys(names, builder))
        return builder

    return enter


def plain(name: str, function: Function) -> None:
    """Enter an operator that has no attributes: a function of its inputs."""
    register(name)(lambda node: function)


def sized(shape: Sequence[int]) -> list[int]:
    """The shape of a result.

    Raises:
        RefusedError: it has more than `LARGEST` entries.
    """
    sizes = [int(n) for n in shape]
    if math.prod(sizes) > LARGEST or min(sizes, default=0) < 0:
        msg = f"a value of the shape {tuple(sizes)}; expected at most {LARGEST} entries"
        raise RefusedError(msg)
    return sizes


def floating(x: Tensor) -> bool:
    """Whether the entries are real numbers, not integers."""
    return x.is_floating_point() or x.dtype in (torch.complex64, torch.complex128)


# ---- control flow ------------------------------------------------------------------------------------------------------
#
# `If`, `Loop` and `Scan` are replaced by what they run, if that is the same for every input of the model.


MOST_OPERATIONS = 20_000  # operations that run inside of nodes of a file: a few bytes may ask for any number


class Unroller(Protocol):
    """Takes in the operations that control flow runs, one by one."""

    opset: int
    taken: int  # operations that ran inside of others
    used: set[str]
    values: dict[str, Tensor]

    def step(self, operation: Operation) -> None:
        """Take in one operation."""
        ...

    def known(self, name: str) -> Tensor | None:
        """The value of a name that is the same for every input of the model."""
        ...

    def hold(self, name: str, value: Tensor) -> None:
        """Enter a constant."""
        ...


def _run(operation: Operation, graph: Graph, mark: str, given: Sequence[str], builder: Unroller) -> list[str]:
    """Take in the operations of an inner graph, its names marked, and return the names of its outputs."""
    if len(given) != len(graph.inputs):
        msg = f"{len(given)} values for a graph that takes {len(graph.inputs)}"
        raise RefusedError(msg)
    builder.taken += max(1, len(graph.operations))
    if builder.taken > MOST_OPERATIONS:
        msg = f"more than {MOST_OPERATIONS} operations in all runs"
        raise RefusedError(msg)
    names = dict(zip(graph.inputs, given, strict=True))
    for name, value in graph.constants.items():
        names[name] = f"{operation.name}.{mark}.{name}"
        builder.hold(names[name], value)
    for inner in graph.operations:
        names |= {name: f"{operation.name}.{mark}.{name}" for name in inner.outputs if name}
        builder.used.update(names.get(name, name) for name in inner.inputs)
    builder.used.update(names.get(name, name) for name in graph.outputs)
    for inner in graph.operations:
        builder.step(_renamed(inner, names, f"{operation.name}.{mark}.{inner.name}"))
    return [names.get(name, name) for name in graph.outputs]


def _renamed(operation: Operation, names: Mapping[str, str], name: str) -> Operation:
    attributes = {key: _around(value, names) if isinstance(value, Graph) else value for key, value in operation.attributes.items()}
    inputs, outputs = (tuple(names.get(x, x) for x in side) for side in (operation.inputs, operation.outputs))
    return Operation(operation.op, name, inputs, outputs, attributes)


def _around(graph: Graph, names: Mapping[str, str]) -> Graph:
    """A graph that reads names of the graph around it by their new names, but for those that are its own."""
    inner_names = {*graph.inputs, *graph.constants, *(name for operation in graph.operations for name in operation.outputs)}
    others = {old: new for old, new in names.items() if old not in inner_names}
    operations = tuple(_renamed(operation, others, operation.name) for operation in graph.operations)
    return replace(graph, operations=operations, outputs=tuple(others.get(name, name) for name in graph.outputs))


def _give(operation: Operation, values: Sequence[str], builder: Unroller) -> None:
    """The outputs of the node are these values."""
    for i, (name, value) in enumerate(zip(operation.outputs, values, strict=False)):
        if name:
            builder.step(Operation("Identity", f"{operation.name}.out{i}", (value,), (name,), {}))


def _graph(operation: Operation, name: str) -> Graph:
    graph = operation.attributes.get(name)
    if not isinstance(graph, Graph):
        msg = f"no graph {name}"
        raise RefusedError(msg)
    return graph


def _settled(builder: Unroller, name: str, what: str) -> Any:
    """The only number of a constant.

    Raises:
        RefusedError: it depends on the model's input, or is not one number.
    """
    value = builder.known(name)
    if value is None or value.numel() != 1:
        msg = f"{what} depends on the model's input; expected a constant"
        raise RefusedError(msg)
    return value.reshape(()).item()


def _if(operation: Operation, builder: Unroller) -> None:
    graph = _graph(operation, "then_branch" if _settled(builder, operation.inputs[0], "the condition") else "else_branch")
    _give(operation, _run(operation, graph, "branch", (), builder), builder)


def _stacked(operation: Operation, i: int, parts: Sequence[str], axis: int, builder: Unroller) -> str:
    """The name of the values of all runs, stacked along a new axis."""
    if not parts:
        msg = "no run, and an output that gathers what runs make"
        raise RefusedError(msg)
    place, name = f"{operation.name}.axis{i}", f"{operation.name}.all{i}"
    builder.hold(place, torch.tensor([axis]))
    raised = [f"{name}.{k}" for k in range(len(parts))]
    for part, unsqueezed in zip(parts, raised, strict=True):
        inputs, attributes = ((part, place), {}) if builder.opset >= 13 else ((part,), {"axes": [axis]})
        builder.step(Operation("Unsqueeze", unsqueezed, inputs, (unsqueezed,), attributes))
    builder.step(Operation("Concat", name, tuple(raised), (name,), {"axis": axis}))
    return name


def _gathered(results: Sequence[str], states: int, parts: Sequence[list[str]]) -> list[str]:
    """The state behind a run; what the run makes beside it is put behind that of the runs before."""
    for part, name in zip(parts, results[states:], strict=True):
        part.append(name)
    return list(results[:states])


def _loop(operation: Operation, builder: Unroller) -> None:
    """As many runs of the body as its count and its conditions say, all of them constants."""
    body, (count, condition, *state) = _graph(operation, "body"), operation.inputs
    runs = _settled(builder, count, "the number of runs") if count else math.inf
    going = bool(_settled(builder, condition, "the condition")) if condition else True
    parts: list[list[str]] = [[] for _ in range(len(body.outputs) - 1 - len(state))]
    turn = 0
    while going and turn < runs:
        goes_on, *results = _run(operation, body, str(turn), (*_turn(operation, turn, builder), *state), builder)
        state = _gathered(results, len(state), parts)
        going = bool(_settled(builder, goes_on, "the condition of going on"))
        turn += 1
    used = zip(parts, operation.outputs[len(state) :], strict=False)
    _give(operation, [*state, *(_stacked(operation, i, p, 0, builder) if name else "" for i, (p, name) in enumerate(used))], builder)


def _turn(operation: Operation, turn: int, builder: Unroller) -> list[str]:
    """The names of the first two values that the body of a loop takes: the number of the run, and that it goes on."""
    names = [f"{operation.name}.{turn}.{name}" for name in ("number", "going")]
    for name, value in zip(names, (torch.tensor(turn), torch.tensor(True)), strict=True):
        builder.hold(name, value)
    return names


def _scan(operation: Operation, builder: Unroller) -> None:
    """A run of the body for each place along the scanned axes."""
    body, settings = _graph(operation, "body"), operation.attributes
    scanned = int(settings.get("num_scan_inputs", 0))
    state = list(operation.inputs[:-scanned])
    parts: list[list[str]] = [[] for _ in body.outputs[len(state) :]]
    for turn, given in enumerate(_scanned(operation, operation.inputs[-scanned:], builder)):
        state = _gathered(_run(operation, body, str(turn), (*state, *given), builder), len(state), parts)
    back = settings.get("scan_output_directions", [0] * len(parts))
    ends = settings.get("scan_output_axes", [0] * len(parts))
    ordered = [part[::-1] if reverse else part for part, reverse in zip(parts, back, strict=True)]
    _give(operation, [*state, *(_stacked(operation, i, part, ends[i], builder) for i, part in enumerate(ordered))], builder)


def _scanned(operation: Operation, inputs: Sequence[str], builder: Unroller) -> Iterator[list[str]]:
    """For each run the names of the entries of the inputs at its place."""
    settings, n = operation.attributes, len(inputs)
    axes, turned = settings.get("scan_input_axes", [0] * n), settings.get("scan_input_directions", [0] * n)
    lengths = {int(builder.values[name].shape[axis]) for name, axis in zip(inputs, axes, strict=True)}
    if len(lengths) != 1:
        msg = f"{sorted(lengths)} runs; expected one number"
        raise RefusedError(msg)
    (runs,) = lengths
    for turn in range(runs):
        places = [runs - 1 - turn if back else turn for back in turned]
        yield [_part(operation, f"{turn}.{j}", part, builder) for j, part in enumerate(zip(inputs, axes, places, strict=True))]


def _part(operation: Operation, mark: str, part: tuple[str, int, int], builder: Unroller) -> str:
    """The name of the entries of a value at one place along an axis."""
    (value, axis, place), (at, name) = part, (f"{operation.name}.{what}.{mark}" for what in ("at", "part"))
    builder.hold(at, torch.tensor(place))
    builder.used.add(name)
    builder.step(Operation("Gather", name, (value, at), (name,), {"axis": axis}))
    return name


FLOW: dict[str, Callable[[Operation, Unroller], None]] = {"If": _if, "Loop": _loop, "Scan": _scan}
"""Operator -> function that hands the builder what the node would run."""
