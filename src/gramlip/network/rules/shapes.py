"""Rearranging, selecting, repeating, joining and padding entries, and writing them into other values. docs/network.md#selections."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.rules.affine import added, spread
from gramlip.network.rules.enclosures import steepness_on, tied
from gramlip.network.rules.entrywise import IDENTITY, Entrywise, NotACurveError, steepness
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.rules.statistics import compared
from gramlip.network.steps import Join, Linear, LinearAction, Lipschitz, Pad, RowLayout, Shortcut, Slice, Step, Unbounded, View
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Shape


def aten(names: str) -> list[str]:
    """The operations of these names."""
    return [f"aten.{name}" for name in names.split()]


_SAME = aten(
    "clone contiguous detach alias lift_fresh_copy lift_fresh positive _to_copy to type_as dropout feature_dropout "
    "alpha_dropout feature_alpha_dropout"
)
_VIEWS = aten(
    "view reshape _unsafe_view flatten unflatten permute transpose t numpy_T mT squeeze unsqueeze movedim moveaxis swapaxes swapdims "
    "flip fliplr flipud rot90 roll ravel pixel_shuffle pixel_unshuffle channel_shuffle view_as reshape_as fft_fftshift fft_ifftshift"
)
_PARTS = aten(
    "split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk chunk unbind tensor_split diagonal narrow_copy "
    "sort msort topk kthvalue median amax amin max min maximum minimum"
)
PICKS = {
    *_VIEWS,
    *aten("split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk chunk unbind tensor_split diagonal narrow_copy"),
    *aten("slice narrow select index index_select gather expand expand_as broadcast_to repeat tile repeat_interleave"),
}
"""Operations that copy entries, of one value that depends on the input."""
RISING = {
    *aten("amax amin max min maximum minimum msort sort kthvalue median"),
    *(f"aten.{kind}max_pool{d}d{rest}" for kind in ("", "adaptive_") for d in (1, 2, 3) for rest in ("", "_with_indices")),
}
"""Operations that choose entries by comparing them: what they give rises with every entry, and is computed exactly."""


@register(*_SAME)
def _same(call: Call) -> Var:
    if call.args.get("train") or call.args.get("training"):
        msg = f"{call.op} in training mode is random; expected evaluation mode: type model.eval()"
        raise UnsupportedError(msg)
    dtype = call.args.get("dtype")
    if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
        msg = f"a conversion to {dtype}, which jumps"
        raise UnsupportedError(msg)
    return call.vars[0]


@register(*_VIEWS)
def _view(call: Call) -> Var | View:
    if "dtype" in call.args:
        msg = f"a view of the bits as {call['dtype']}, which jumps"
        raise UnsupportedError(msg)
    flat = call.op.split(".")[1] in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "ravel")
    return call.vars[0] if flat and call.vars[0].shape == call.shape else View(flat, _row_layout(call))


LARGEST = 2**20  # entries of a value whose rows are followed through views


def _row_layout(call: Call) -> RowLayout:
    """Which lines of the result are parts of rows of the one variable, read off by giving the call the rows' numbers."""
    x = call.vars[0]
    if len(call.vars) > 1 or len(x.shape) < 2 or len(call.shape) < 2 or math.prod(x.shape) > LARGEST:
        return ""
    numbers = torch.arange(math.prod(x.shape[:-1]), dtype=torch.float64).reshape(*x.shape[:-1], 1).expand(x.shape).contiguous()
    layout: Tensor | Sequence[Tensor] = call.run(numbers)
    parts = [layout] if isinstance(layout, Tensor) else list(layout)
    if all(bool((part == part[..., :1]).all()) for part in parts):
        return "rows"
    return "columns" if all(bool((part == part[..., :1, :]).all()) for part in parts) else ""


@register(*_PARTS)
def _parts(call: Call) -> Lipschitz:
    """Parts, orders and extremes of entries: 1 in all variables joined, the root of the repeats where one is broadcast."""
    constants = between([v for v in call.args.values() if isinstance(v, Tensor)])
    parted = call.op.split(".")[1] in ("split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unbind", "tensor_split")
    upper = rd.sqrt_up(float(max(1, _widest(call))))
    row_layout = _row_layout(call) if parted else ""
    extremum = _extremum(call)
    plain = Lipschitz(upper, "entries kept, sorted or compared", same_range=True, others=constants, row_layout=row_layout)
    return replace(plain, extremum=extremum, compared=compared(call, extremum))


def _extremum(call: Call) -> tuple[int, tuple[int, ...]] | None:
    """Whether the entries are the largest or the least of two or more, and along which axes: of pairs of two values along none."""
    sign = {"amax": 1, "max": 1, "maximum": 1, "amin": -1, "min": -1, "minimum": -1}.get(call.op.split(".")[1])
    if sign is None:
        return None
    if len(call.vars) == 2:
        return (sign, ()) if all(v.shape == call.shape for v in call.vars) else None
    x, dims = call.vars[0], call.args.get("dim", [])
    if "other" in call.args or math.prod(x.shape) < 2 * math.prod(call.shape):
        return None
    axes = [dims] if isinstance(dims, int) else dims or range(len(x.shape))
    return sign, tuple(sorted(axis % len(x.shape) for axis in axes))


@register("getitem")
def _getitem(call: Call) -> Lipschitz | Var:
    if isinstance(call.args["0"], tuple):
        return call.args["0"][call.args["1"]]
    if "native" in call.steps[call.vars[0].step].op and call.args["1"] != 0:
        msg = "a normalisation's mean or scale as a value, which no rule covers"
        raise UnsupportedError(msg)
    alike = call.vars[0].shape == call.shape  # what is known of rows is known for the shape of the first result
    copied = getattr(call.steps[call.vars[0].step].what, "copy_entries", None) is not None
    copy_entries = operator.itemgetter(call.args["1"]) if copied else None
    return Lipschitz(1.0, "one of several results", same_range=True, row_layout="rows" if alike else "", copy_entries=copy_entries)


@register("aten.slice", "aten.narrow")
def _slice(call: Call) -> Slice | Linear | Var:
    x = call.vars[0]
    axis = int(call.const("dim")) % len(x.shape)
    start = call.const("start") or 0
    start = min(max(start + x.shape[axis] if start < 0 else start, 0), x.shape[axis])
    step = int(call.args.get("step", 1))
    stop = start + (call.shape[axis] - 1) * step + 1
    if call.shape == x.shape:
        return x
    spatial = 2 <= axis < len(x.shape) <= 5 and x.shape[1] <= WIDEST
    if spatial and start == 0 and step > 1 and call.shape[axis] == -(-x.shape[axis] // step):
        return _selection(x, torch.eye(x.shape[1], dtype=torch.float64), [step if j == axis else 1 for j in range(2, len(x.shape))])
    return Slice(axis, start, stop, step)


WIDEST = 1024  # channels up to which a selection is written as a 1x1 convolution, so that it can be coupled


def _selection(x: Var, rows: Tensor, stride: list[int]) -> Linear:
    """Channels by a matrix of zeros and ones, each input entry at most once, and every stride-th place: a 1x1 convolution."""
    weight = rows.reshape(*rows.shape, *[1] * len(stride))
    return Linear(Conv(weight, input_size=x.shape[2:], stride=stride), known=Bound(1.0, 1.0, "a selection of entries"))


@register("aten.select")
def _select(call: Call) -> Lipschitz:
    call.const("index")
    return Lipschitz(1.0, "a selection of entries", same_range=True, row_layout=_row_layout(call))


def _most_frequent(numbers: Tensor) -> int:
    """How often the most frequent number occurs."""
    return int(torch.bincount(numbers.reshape(-1)).max()) if numbers.numel() else 0


@register("aten.index_select", "aten.gather")
def _index_select(call: Call) -> Lipschitz:
    x, index = call.var("self"), call.const("index")
    axis = int(call.const("dim"))
    most = _most_frequent(index % x.shape[axis]) if "select" in call.op else call.shape[axis]
    return Lipschitz(rd.sqrt_up(float(most)), f"a selection of entries, each at most {most} times", same_range=True)


@register("aten.index")
def _index(call: Call) -> Lipschitz:
    x, indices = call["self"], call.const("indices")
    if any(isinstance(i, Var) for i in indices):
        msg = f"{call.op} by indices that depend on the input jumps; expected the parts before and after it audited each by itself"
        raise UnsupportedError(msg)
    most = _most_frequent(torch.ops.aten.index.Tensor(torch.arange(math.prod(x.shape)).reshape(x.shape), list(indices)))
    return Lipschitz(rd.sqrt_up(float(most)), f"a selection of entries, each at most {most} times", same_range=True)


@register("aten.expand", "aten.repeat", "aten.tile", "aten.expand_as", "aten.broadcast_to", "aten.repeat_interleave")
def _repeat(call: Call) -> Lipschitz | Var:
    x = call.vars[0]
    if any(isinstance(v, Tensor) for v in call.args.values()) and "expand_as" not in call.op:
        msg = f"{call.op} with a tensor of repeats, which no rule covers"
        raise UnsupportedError(msg)
    times = math.prod(call.shape) // math.prod(x.shape)
    if times == 1 and x.shape == call.shape:
        return x
    return Lipschitz(rd.sqrt_up(float(times)), f"each entry repeated {times} times", same_range=True)


@register("aten.where", "aten.masked_fill")
def _where(call: Call) -> Lipschitz:
    if isinstance(call["condition" if "where" in call.op else "mask"], Var):
        msg = f"{call.op} chooses by values that depend on the input, which may jump where it changes; expected a clamp or an activation"
        raise UnsupportedError(msg)
    chosen = [call.args["self"], call.args["other" if "where" in call.op else "value"]]
    upper = rd.sqrt_up(float(_widest(call)))
    if all(isinstance(value, Var) for value in chosen):
        return Lipschitz(upper, "entries chosen by a constant mask", same_range=True, linear=call.linear(upper))
    linear = call.linear(upper, shifted=True)
    return Lipschitz(upper, "entries kept, others constant", same_range=True, others=between(chosen), linear=linear)


def between(values: Sequence[Any]) -> tuple[float, float] | None:
    """The least interval with the entries of all constants among the values, None without one."""
    tensors = [torch.as_tensor(v) for v in values if not isinstance(v, Var)]
    if any(t.is_complex() for t in tensors):
        return -math.inf, math.inf
    held = [to_float64(t) for t in tensors]
    ends = [float(end) for v in held if v.numel() for end in (v.min(), v.max())]
    return (min(ends), max(ends)) if ends else None


def _widest(call: Call) -> int:
    """The most repeats by broadcasting among the variables."""
    return max(math.prod(call.shape) // math.prod(v.shape) for v in call.vars)


@register("aten.embedding", "aten.max_unpool2d", "aten.max_unpool3d")
def _by_places(call: Call) -> Unbounded:
    return Unbounded(
        f"{call.op.split('.')[1]} by places that depend on the input jumps; expected the parts before and after it audited alone"
    )


@register("aten.triu", "aten.tril")
def _triangle(call: Call) -> Lipschitz:
    return Lipschitz(1.0, "a selection of entries", same_range=True, others=(0.0, 0.0), linear=call.linear(1.0))


@register("aten.pad", "aten.constant_pad_nd")
def _pad(call: Call) -> Pad | Linear | Lipschitz | Var:
    x, given = call.var("self"), [int(p) for p in call.const("pad")]
    pairs = [(given[i], given[i + 1]) for i in range(0, len(given), 2)][::-1]
    mode = str(call.args.get("mode", "constant")).replace("constant", "zeros")
    if x.shape == call.shape and not any(given):
        return x
    spatial, value = len(x.shape) - 2, float(call.args.get("value") or 0.0)
    if mode != "zeros" and len(pairs) == spatial + 1:
        return call.batched(_pad)
    if (
        mode == "zeros"
        and spatial > 0
        and len(pairs) == spatial + 1 <= 4
        and not any(map(any, pairs[1:]))
        and min(given) >= 0
        and value == 0.0
    ):
        rows = torch.eye(x.shape[1], dtype=torch.float64)
        if x.shape[1] <= WIDEST:
            return _selection(x, torch.nn.functional.pad(rows, (0, 0, *pairs[0])), [1] * spatial)
    if min(given) < 0 or len(pairs) > spatial or spatial > 3:
        if mode != "zeros":
            msg = f"{mode} padding by {given} of an input of shape {x.shape}, which no rule covers"
            raise UnsupportedError(msg)
        around, linear = (value, value) if max(given) > 0 else None, call.linear(1.0, shifted=True)
        return Lipschitz(1.0, "constants around, or entries cut off", same_range=True, others=around, linear=linear)
    return Pad(((0, 0),) * (spatial - len(pairs)) + tuple(pairs), mode, value)


@register(*(f"aten.{mode}_pad{d}d" for mode in ("reflection", "replication") for d in (1, 2, 3)))
def _pad_mode(call: Call) -> Pad | Var:
    given = [int(p) for p in call.const("padding")]
    if len(call.shape) == len(given) // 2 + 1:
        return call.batched(_pad_mode)
    mode = "reflect" if "reflection" in call.op else "replicate"
    if min(given) < 0 or len(call.shape) != len(given) // 2 + 2:
        msg = f"{mode} padding by {given} of an input of shape {call.var('self').shape}, which no rule covers"
        raise UnsupportedError(msg)
    return Pad(tuple((given[i], given[i + 1]) for i in range(0, len(given), 2))[::-1], mode)


@register("aten.logaddexp", "aten.logaddexp2", "aten.hypot")
def _of_gradient_one(call: Call) -> Lipschitz:
    upper = rd.sqrt_up(float(_widest(call)))
    return Lipschitz(upper, f"{call.op.split('.')[1]}: its gradient has norm at most 1")


# ---- joins, and what is known of the values together: docs/network.md#shortcuts ------------------------------------------


@register("aten.cat", "aten.concat", "aten.concatenate", "aten.stack", "aten.hstack", "aten.vstack", "aten.dstack")
def _cat(call: Call) -> Var:
    parts: list[Any] = next(v for v in call.args.values() if isinstance(v, list | tuple))  # type: ignore[reportUnknownVariableType]
    if len(call.vars) < len(parts):
        linear = call.linear(1.0, shifted=True)
        what = Lipschitz(1.0, "concatenation with constants", same_range=True, others=between(parts), linear=linear)
    elif "cat" in call.op:
        what = Join(int(call.const("dim")) % len(call.shape))
    else:
        what = Lipschitz(1.0, "values stacked", same_range=True, linear=call.linear(1.0))
    result, apart = call.then(what, *call.vars), [_origin(call, v) for v in call.vars]
    ways = _tied(call, list(apart))
    if sorted((way.factor, way.source) for way in ways) != [(1.0, i) for i in sorted(apart)]:
        factors, sources, within = zip(*ways, strict=True)
        short = Shortcut(factors, sources, within=within if any(within) else ())
        call.steps[result.step] = replace(call.steps[result.step], shortcut=short)
    return result


class _Way(NamedTuple):
    """A part of a shortcut: a factor and the step whose difference it multiplies; and the factor on intervals of that step."""

    factor: float
    source: int
    within: Callable[[Tensor, Tensor], float] | None = None


def _tied(call: Call, alone: list[int]) -> list[_Way]:
    """Steps whose differences, times these factors and joined, are at least as long as those of the given ones joined."""
    curves: dict[int, list[Entrywise]] = {}
    for i in alone:
        curve = call.known.curves.get(i)
        curves.setdefault(i if curve is None else curve.base.step, []).append(
            curve or Entrywise(Var(i, call.steps[i].shape), (), lambda _: IDENTITY)
        )
    ways: list[_Way] = []
    for base, values in curves.items():
        try:
            factor = steepness(values) if len(values) > 1 else math.inf
        except NotACurveError:
            continue
        if factor < math.inf:
            for value in values:
                value.rely(call)
            ways.append(_Way(factor, base))
            alone = [i for i in alone if i != base and (i not in call.known.curves or call.known.curves[i].base.step != base)]
    single: list[int] = []
    while alone:
        i = alone.pop()
        mate = next((j for j in alone if _mates(call.steps[i], call.steps[j])), None)
        if mate is None:
            single.append(i)
            continue
        alone.remove(mate)
        ways += [_Way(1.0, s) for s in call.steps[i].sources]
    functions, single = tied(call, single)
    return ways + [_Way(size, min(f.base), partial(steepness_on, f)) for f, size in functions] + [_Way(1.0, i) for i in single]


def _mates(first: Step, second: Step) -> bool:
    """Whether the two are the largest and the least of the same groups of entries, or sine and cosine of one value."""
    a, b = first.what, second.what
    if sorted(first.sources) != sorted(second.sources):
        return False
    if isinstance(a, Lipschitz) and isinstance(b, Lipschitz) and a.extremum is not None and b.extremum is not None:
        return a.extremum[0] == -b.extremum[0] and a.extremum[1] == b.extremum[1]
    return {first.op, second.op} == {"aten.sin.default", "aten.cos.default"}


def _origin(call: Call, v: Var) -> int:
    """The step of the value before it was only rearranged."""
    at, steps = v.step, call.steps
    while isinstance(steps[at].what, View) or _is_value(steps, at):
        at = steps[at].sources[0]
    return at


def _is_value(steps: Sequence[Step], at: int) -> bool:
    """Whether the step takes the values, not the places, from what the largest or least entries are found with."""
    indices = steps[steps[at].sources[0]].what if steps[at].op == "getitem" else None
    return getattr(indices, "extremum", None) is not None and not isinstance(steps[at].what, Unbounded)


# ---- entries written into others: docs/network.md#placements ------------------------------------------------------------


@dataclass(frozen=True)
class Put:
    """`value` written into `base`: `codes` has for each entry of the result the number of the entry of `value`, or -1 to keep its own."""

    OP: ClassVar[str] = "put"
    base: Var | Tensor
    value: Var | Tensor
    codes: Tensor

    @property
    def placed(self) -> Tensor:
        """Mask of the entries of the result that come from the value."""
        return self.codes >= 0

    @property
    def once(self) -> bool:
        """Whether no entry of the value is written twice."""
        return _most_frequent(self.codes[self.placed]) <= 1

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
    most = _most_frequent(numbers)
    what = Lipschitz(
        rd.sqrt_up(float(most)),
        f"entries taken, each at most {most} times",
        same_range=True,
        copy_entries=lambda given: given.reshape(-1)[numbers],
    )
    return call.then(what, x, shape=(len(numbers),))


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
    """Refuse places that depend on the input."""
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
    numbered: list[Tensor | None] = []
    for index in call["indices"]:
        numbered += index.nonzero(as_tuple=True) if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else [index]
    return numbered


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
    """Refuse places that are named twice."""
    if "scatter" in call.op:
        counts = torch.zeros(call.shape).scatter_add(int(call["dim"]), index, torch.ones(index.shape))
        _refuse_twice(call, bool((counts > 1).any()))
    else:
        _refuse_twice(call, _most_frequent(index % call.shape[int(call["dim"])]) > 1)


def _refuse_twice(call: Call, twice: bool) -> None:
    if twice:
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
        _refuse_twice(call, bool((counts > 1).any()))
    codes = _run(part, torch.full(call.shape, -1.0, dtype=torch.float64), _numbers(shape)).long()
    return Put(call["self"], value, codes).made(call)


@register("aten.scatter_add", "aten.index_add")
def _placed_sum(call: Call) -> Var:
    """Entries of a value added up at fixed places."""
    _fixed(call)
    return _accumulated(*_given(call))


def _accumulated(call: Call, value: Any) -> Var:
    """The entry at a place plus the entries added there: rows of ones on disjoint entries have the root of their number as norm."""
    ones = torch.ones(tuple(value.shape), dtype=torch.float64)
    base, alpha = call["self"], abs(float(call.args.get("alpha", 1)))
    if not isinstance(value, Var):
        moved = _run(call, torch.zeros(call.shape, dtype=torch.float64), value.double() if not value.is_complex() else value)
        return added(replace(call, op="aten.add", args={"self": base, "other": moved, "alpha": 1}))
    most = float(_run(call, torch.zeros(call.shape, dtype=torch.float64), ones, **({"alpha": 1} if "alpha" in call.args else {})).max())
    upper = rd.mul_up(rd.sqrt_up(most), alpha)
    what = Lipschitz(
        upper,
        f"sums of at most {most:.0f} entries: the root of their number",
        same_range=True,
        others=(0.0, 0.0),
        times=float(call.args.get("alpha", 1)) * most,
        linear=LinearAction(partial(_run, call, torch.zeros(call.shape, dtype=torch.float64)), upper),
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
