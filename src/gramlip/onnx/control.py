"""Control flow: `If`, `Loop` and `Scan` are replaced by what they run, where that is the same for every input of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gramlip.onnx.registry import Graph, Operation, RefusedError

MOST = 20_000  # operations that run inside of nodes of a file: a few bytes may ask for any number


class Builder(Protocol):
    """What takes in operations one by one."""

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


def _run(operation: Operation, graph: Graph, mark: str, given: Sequence[str], builder: Builder) -> list[str]:
    """Take in the operations of an inner graph, its names marked, and return the names of its outputs."""
    if len(given) != len(graph.inputs):
        msg = f"{len(given)} values for a graph that takes {len(graph.inputs)}"
        raise RefusedError(msg)
    builder.taken += max(1, len(graph.operations))
    if builder.taken > MOST:
        msg = f"more than {MOST} operations in all runs"
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
    attributes = {key: _around(held, names) if isinstance(held, Graph) else held for key, held in operation.attributes.items()}
    inputs, outputs = (tuple(names.get(x, x) for x in side) for side in (operation.inputs, operation.outputs))
    return Operation(operation.op, name, inputs, outputs, attributes)


def _around(graph: Graph, names: Mapping[str, str]) -> Graph:
    """A graph that reads names of the graph around it by their new names, but for those that are its own."""
    own = {*graph.inputs, *graph.constants, *(name for operation in graph.operations for name in operation.outputs)}
    others = {old: new for old, new in names.items() if old not in own}
    operations = tuple(_renamed(operation, others, operation.name) for operation in graph.operations)
    return replace(graph, operations=operations, outputs=tuple(others.get(name, name) for name in graph.outputs))


def _give(operation: Operation, made: Sequence[str], builder: Builder) -> None:
    """The outputs of the node are these values."""
    for i, (name, value) in enumerate(zip(operation.outputs, made, strict=False)):
        if name:
            builder.step(Operation("Identity", f"{operation.name}.out{i}", (value,), (name,), {}))


def _graph(operation: Operation, name: str) -> Graph:
    graph = operation.attributes.get(name)
    if not isinstance(graph, Graph):
        msg = f"no graph {name}"
        raise RefusedError(msg)
    return graph


def _settled(builder: Builder, name: str, what: str) -> Any:
    """The only number of a constant.

    Raises:
        RefusedError: it depends on the model's input, or is not one number.
    """
    value = builder.known(name)
    if value is None or value.numel() != 1:
        msg = f"{what} depends on the model's input; expected a constant"
        raise RefusedError(msg)
    return value.reshape(()).item()


def _if(operation: Operation, builder: Builder) -> None:
    graph = _graph(operation, "then_branch" if _settled(builder, operation.inputs[0], "the condition") else "else_branch")
    _give(operation, _run(operation, graph, "branch", (), builder), builder)


def _stacked(operation: Operation, i: int, parts: Sequence[str], axis: int, builder: Builder) -> str:
    """The name of the values of all runs, stacked along a new axis."""
    if not parts:
        msg = "no run, and an output that gathers what runs make"
        raise RefusedError(msg)
    place, name = f"{operation.name}.axis{i}", f"{operation.name}.all{i}"
    builder.hold(place, torch.tensor([axis]))
    raised = [f"{name}.{k}" for k in range(len(parts))]
    for part, one in zip(parts, raised, strict=True):
        inputs, attributes = ((part, place), {}) if builder.opset >= 13 else ((part,), {"axes": [axis]})
        builder.step(Operation("Unsqueeze", one, inputs, (one,), attributes))
    builder.step(Operation("Concat", name, tuple(raised), (name,), {"axis": axis}))
    return name


def _loop(operation: Operation, builder: Builder) -> None:
    """As many runs of the body as its count and its conditions say, all of them constants."""
    body, (count, condition, *state) = _graph(operation, "body"), operation.inputs
    runs = _settled(builder, count, "the number of runs") if count else None
    going = bool(_settled(builder, condition, "the condition")) if condition else True
    gathered: list[list[str]] = [[] for _ in range(len(body.outputs) - 1 - len(state))]
    turn = 0
    while going and (runs is None or turn < runs):
        number, truth = (f"{operation.name}.{turn}.{name}" for name in ("number", "going"))
        builder.hold(number, torch.tensor(turn))
        builder.hold(truth, torch.tensor(True))
        goes_on, *made = _run(operation, body, str(turn), (number, truth, *state), builder)
        state = made[: len(state)]
        for parts, name in zip(gathered, made[len(state) :], strict=True):
            parts.append(name)
        going = bool(_settled(builder, goes_on, "the condition of going on"))
        turn += 1
    used = operation.outputs[len(state) :]
    stacks = [
        _stacked(operation, i, parts, 0, builder) if name else "" for i, (parts, name) in enumerate(zip(gathered, used, strict=False))
    ]
    _give(operation, [*state, *stacks], builder)


def _scan(operation: Operation, builder: Builder) -> None:
    """A run of the body for each place along the scanned axes."""
    body, settings = _graph(operation, "body"), operation.attributes
    scanned = int(settings.get("num_scan_inputs", 0))
    state, inputs = list(operation.inputs[:-scanned]), operation.inputs[-scanned:]
    axes = settings.get("scan_input_axes", [0] * scanned)
    lengths = {int(builder.values[name].shape[axis]) for name, axis in zip(inputs, axes, strict=True)}
    if len(lengths) != 1:
        msg = f"{sorted(lengths)} runs; expected one number"
        raise RefusedError(msg)
    (runs,), turned = lengths, settings.get("scan_input_directions", [0] * scanned)
    gathered: list[list[str]] = [[] for _ in body.outputs[len(state) :]]
    for turn in range(runs):
        places = [runs - 1 - turn if back else turn for back in turned]
        given = [_part(operation, f"{turn}.{j}", part, builder) for j, part in enumerate(zip(inputs, axes, places, strict=True))]
        made = _run(operation, body, str(turn), (*state, *given), builder)
        state = made[: len(state)]
        for parts, name in zip(gathered, made[len(state) :], strict=True):
            parts.append(name)
    back = settings.get("scan_output_directions", [0] * len(gathered))
    ends = settings.get("scan_output_axes", [0] * len(gathered))
    ordered = [parts[::-1] if reverse else parts for parts, reverse in zip(gathered, back, strict=True)]
    _give(operation, [*state, *(_stacked(operation, i, parts, ends[i], builder) for i, parts in enumerate(ordered))], builder)


def _part(operation: Operation, mark: str, part: tuple[str, int, int], builder: Builder) -> str:
    """The name of the entries of a value at one place along an axis."""
    (value, axis, place), (at, name) = part, (f"{operation.name}.{what}.{mark}" for what in ("at", "part"))
    builder.hold(at, torch.tensor(place))
    builder.used.add(name)
    builder.step(Operation("Gather", name, (value, at), (name,), {"axis": axis}))
    return name


FLOW: dict[str, Callable[[Operation, Builder], None]] = {"If": _if, "Loop": _loop, "Scan": _scan}
"""Operator -> function that hands the builder what the node would run."""
