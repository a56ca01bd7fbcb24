"""Entries written into another value: scatters, assignments to parts, sums of entries at given places. docs/network.md#placements."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.rules.affine import added, spread
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.rules.shapes import between
from gramlip.network.steps import Lipschitz
from gramlip.numerics import rounding as rd
from gramlip.operators.linear_maps import Shape


@dataclass(frozen=True)
class Put:
    """`value` written into `base`: `codes` has for each entry of the result the number of the entry of `value`, or -1 to keep its own."""

    OP: ClassVar[str] = "put"
    base: Var | Tensor
    value: Var | Tensor
    codes: Tensor

    @property
    def placed(self) -> Tensor:
        """Where the result has entries of the value."""
        return self.codes >= 0

    @property
    def once(self) -> bool:
        """Whether no entry of the value is written twice."""
        return _most(self.codes[self.placed]) <= 1

    @staticmethod
    def of(call: Call) -> Put:
        """The assignment that a call of `gramlip.network.graph.put` is."""
        return Put(call["0"], call["1"], call.const("2"))

    def made(self, call: Call) -> Var:
        """The value of the result: what is kept and what is written, side by side."""
        parts, constants = list[Var](), list[Tensor]()
        for given, numbers in ((self.base, (~self.placed).reshape(-1).nonzero()[:, 0]), (self.value, self.codes[self.placed])):
            if isinstance(given, Var) and len(numbers):
                parts.append(_taken(call, given, numbers))
            elif len(numbers):
                constants.append(torch.as_tensor(given).reshape(-1)[numbers])
        if not parts:
            low, high = between(constants) or (0.0, 0.0)
            return call.then(Lipschitz(0.0, "a constant", (low, high)), *call.vars)
        if len(parts) == 1 and not constants and parts[0].shape == call.shape:
            return parts[0]
        return call.then(Lipschitz(1.0, "entries put side by side", same_range=True, others=between(constants)), *parts)


def _taken(call: Call, x: Var, numbers: Tensor) -> Var:
    """Entries of a value by their numbers."""
    if len(numbers) == math.prod(x.shape) and torch.equal(numbers, torch.arange(len(numbers))):
        return x
    most = _most(numbers)
    what = Lipschitz(
        rd.sqrt_up(float(most)),
        f"entries taken, each at most {most} times",
        same_range=True,
        copy_entries=lambda given: given.reshape(-1)[numbers],
    )
    return call.then(what, x, shape=(len(numbers),))


def _most(numbers: Tensor) -> int:
    return int(torch.bincount(numbers.reshape(-1)).max()) if numbers.numel() else 0


@register(Put.OP)
def _put(call: Call) -> Var:
    return Put.of(call).made(call)


@register("aten.copy", "aten.fill", "aten.zero")
def _copy(call: Call) -> Var | Lipschitz:
    """All entries replaced: what was there before does not count."""
    new = call.args.get("src", call.args.get("value", 0.0))
    if isinstance(new, Var):
        wide = spread(call, new, call.shape)
        turned = call.dtype is not None and not call.dtype.is_complex and call.op.startswith("aten.copy")
        return call.then(Lipschitz(1.0, "a copy", same_range=turned), wide)
    low, high = between([new]) or (0.0, 0.0)
    return Lipschitz(0.0, "a constant", (low, high))


# ---- the operations of torch ---------------------------------------------------------------------------------------------

_VALUES = ("src", "source", "values", "value")


def _fixed(call: Call) -> None:
    """Refuse places that depend on the input.

    Raises:
        UnsupportedError: such places.
    """
    for name in ("index", "mask"):
        if name in call.args:
            call.const(name)
    if any(isinstance(i, Var) for i in call.args.get("indices", ())):
        msg = f"{call.op} at places that depend on the input, which jumps"
        raise UnsupportedError(msg)


def _given(call: Call) -> tuple[Call, Any]:
    """The call, and what it writes, as wide as the places that it is written to."""
    name = next(name for name in _VALUES if name in call.args)
    value = call[name]
    if "index_put" not in call.op:
        return call, value
    numbers = torch.empty(call.shape, device="meta")
    shape: Shape = tuple(torch.ops.aten.index.Tensor(numbers, [None if i is None else i.to("meta") for i in _numbered(call)]).shape)
    wide = spread(call, value, shape) if isinstance(value, Var) else value.expand(shape)
    return replace(call, args={**call.args, name: wide, "indices": _numbered(call)}), wide


def _numbered(call: Call) -> list[Tensor | None]:
    """Indices with masks as numbers, as many as axes of the mask."""
    found: list[Tensor | None] = []
    for index in call["indices"]:
        found += index.nonzero(as_tuple=True) if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else [index]
    return found


def _run(call: Call, base: Tensor, value: Any, **others: Any) -> Tensor:
    """The call on constants in place of what it writes into and what it writes."""
    name = next(name for name in _VALUES if name in call.args)
    first = "self" if "self" in call.args else "input"
    args = {**call.args, first: base, name: value, **others}
    positional = [a.name for a in call.target._schema.arguments if not a.kwarg_only]  # type: ignore[attr-defined]
    ordered = [args.pop(name) for name in positional]
    return call.target(*ordered, **args)


def _numbers(shape: Shape) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@register("aten.scatter", "aten.index_copy", "aten.index_fill", "aten.slice_scatter", "aten.select_scatter", "aten.diagonal_scatter")
def _overwritten(call: Call) -> Var:
    """Entries at fixed places replaced by those of a value, or by one number."""
    _fixed(call)
    if call.args.get("reduce") is not None:
        msg = f"{call.op} with reduce={call['reduce']!r}, which no rule covers; expected scatter_add or scatter_reduce"
        raise UnsupportedError(msg)
    part, value = _given(call)
    base, alone = torch.full(call.shape, -1.0, dtype=torch.float64), not isinstance(value, Var | Tensor) or value.shape == ()
    codes = _run(part, base, 0.0 if not isinstance(value, Var | Tensor) else _numbers(tuple(value.shape))).long()
    if not alone and (index := call.args.get("index")) is not None and isinstance(index, Tensor):
        _check_once(call, index)
    written = value if isinstance(value, Var | Tensor) else torch.tensor([value], dtype=torch.float64)
    return Put(call["self"] if "self" in call.args else call["input"], written, codes).made(call)


def _check_once(call: Call, index: Tensor) -> None:
    """Refuse places that are named twice.

    Raises:
        UnsupportedError: such places.
    """
    if "scatter" in call.op:
        counts = torch.zeros(call.shape).scatter_add(int(call["dim"]), index, torch.ones(index.shape))
        twice = bool((counts > 1).any())
    else:
        twice = _most(index % call.shape[int(call["dim"])]) > 1
    if twice:
        _refuse_twice(call)


def _refuse_twice(call: Call) -> None:
    msg = f"{call.op} at a place that is named twice, where torch keeps either entry; expected each place once, or a sum: accumulate"
    raise UnsupportedError(msg)


@register("aten.index_put", "aten._unsafe_index_put")
def _index_put(call: Call) -> Var:
    """Assignment at fixed places, or a sum there."""
    _fixed(call)
    part, value = _given(call)
    if call.const("accumulate"):
        return _accumulated(part, value)
    shape = tuple(value.shape)
    if math.prod(call["values"].shape) > 1:
        counts = _run(part, torch.zeros(call.shape), torch.ones(shape), accumulate=True)
        if bool((counts > 1).any()):
            _refuse_twice(call)
    codes = _run(part, torch.full(call.shape, -1.0, dtype=torch.float64), _numbers(shape)).long()
    return Put(call["self"], value, codes).made(call)


@register("aten.scatter_add", "aten.index_add")
def _placed_sum(call: Call) -> Var:
    """Entries of a value added up at fixed places."""
    _fixed(call)
    return _accumulated(*_given(call))


def _accumulated(call: Call, value: Any) -> Var:
    """What is at a place, and the sum of what is added there: rows of ones on disjoint entries have the root of their number as norm."""
    ones = torch.ones(tuple(value.shape), dtype=torch.float64)
    base, alpha = call["self"], abs(float(call.args.get("alpha", 1)))
    if not isinstance(value, Var):
        moved = _run(call, torch.zeros(call.shape, dtype=torch.float64), value.double() if not value.is_complex() else value)
        return added(replace(call, op="aten.add", args={"self": base, "other": moved, "alpha": 1}))
    most = float(_run(call, torch.zeros(call.shape, dtype=torch.float64), ones, **({"alpha": 1} if "alpha" in call.args else {})).max())
    what = Lipschitz(
        rd.mul_up(rd.sqrt_up(most), alpha),
        f"sums of at most {most:.0f} entries: the root of their number",
        same_range=True,
        others=(0.0, 0.0),
        times=float(call.args.get("alpha", 1)) * most,
    )
    placed = call.then(what, value)
    if not isinstance(base, Var) and not bool(base.any()):
        return placed
    return added(replace(call, op="aten.add", args={"self": base, "other": placed, "alpha": 1}))


@register("aten.scatter_reduce", "aten.index_reduce")
def _reduced(call: Call) -> Lipschitz:
    """The largest, the least or the mean of what is at a place and of what comes there: at most the root of the sum of squares."""
    _fixed(call)
    if call.const("reduce") not in ("amax", "amin", "mean"):
        msg = f"{call.op} with reduce={call['reduce']!r}, which no rule covers; expected amax, amin or mean, or scatter_add for sums"
        raise UnsupportedError(msg)
    return Lipschitz(1.0, "the largest, the least or the mean at each place", same_range=True, others=between(list(call.args.values())[:4]))
