"""`OPERATORS`: the operators of ONNX that are known, each a function from a node to the calls of torch that compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        inner = (held for operation in self.operations for held in operation.attributes.values() if isinstance(held, Graph))
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
        found = self.given[i] if i < len(self.given) else None
        if found is None:
            msg = f"input {i} is missing"
            raise RefusedError(msg)
        return found

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
