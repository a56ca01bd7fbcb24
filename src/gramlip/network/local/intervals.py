"""Intervals: one for every entry of every value, on a set of inputs, and what each step does on them. docs/local.md#intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.network.ranges import INF, Range, capped_step, quick_norm, range_of
from gramlip.network.steps import (
    Attention,
    Join,
    Linear,
    LinearAction,
    Lipschitz,
    OnInterval,
    Pad,
    Product,
    Slice,
    Slope,
    Step,
    Sum,
    Unbounded,
    View,
    rough_norm,
    terms,
)
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.numerics.rounding import frobenius_up, row_norms_up
from gramlip.operators.linear_maps import Dense, Scale, Shape, apply

EACH = 2**14  # entries of a value up to which a function of numbers is asked for each of them

# ---- sets of inputs ------------------------------------------------------------------------------------------------------
#
# Where a constant holds: a box, a ball, or both. Each is convex, so that a difference of two of its points stays inside.


@dataclass(frozen=True)
class Region:
    """The inputs between `low` and `high`, tensors of their shapes in float64, and within `radius` of `centre` where there is one."""

    low: tuple[Tensor, ...]
    high: tuple[Tensor, ...]
    centre: tuple[Tensor, ...] | None = None
    radius: float = INF

    @property
    def entries(self) -> int:
        """Entries of all inputs together."""
        return sum(t.numel() for t in self.low)

    @property
    def halves(self) -> Tensor:
        """The largest distance of each entry of the flat input from the centre."""
        low, high = _flat(self.low), _flat(self.high)
        centre = low + (high - low) / 2 if self.centre is None else _flat(self.centre)
        return round_up(torch.maximum(high - centre, centre - low))

    @property
    def far(self) -> float:
        """The l2 distance from the centre, at most."""
        return min(self.radius, frobenius_up(self.halves))

    def span(self, rows: Tensor) -> Tensor:
        """The largest moduli of linear functions of the input less the centre, whose coefficients are along the last axis."""
        box = (rows.abs() @ self.halves) * (1.0 + rd.gamma(float(rows.shape[-1]) + 8.0))
        return torch.minimum(box, row_norms_up(rows) * self.radius * (1.0 + 2.0**-50)) if self.radius < INF else box

    def inside(self, flat: Tensor) -> Tensor:
        """The flat vector moved into the set: into the box, then along the line to the centre."""
        inner = flat.double().clamp(_flat(self.low), _flat(self.high))
        if self.centre is not None:
            centre = _flat(self.centre)
            far, most = float(torch.linalg.vector_norm(inner - centre)), self.radius * (1 - 2.0**-30)
            inner = inner if far <= most else centre + (inner - centre) * (most / far)
        return inner.to(flat.dtype)

    def drawn(self, normal: Tensor, number: int) -> Tensor:
        """A point of the set: the corner of the box that the signs say, or a point on the way to it, moved into the ball."""
        low, high = _flat(self.low), _flat(self.high)
        return self.inside(low + (high - low) * torch.sigmoid((4.0, 0.5)[number % 2] * normal))

    def cut(self, part: tuple[slice, ...]) -> Region:
        """The set for a part of the one input."""
        centre = None if self.centre is None else (self.centre[0][part],)
        return Region((self.low[0][part],), (self.high[0][part],), centre, self.radius)

    def scale(self, x: Tensor) -> float:
        """The length of the longest steps from a point: twice the radius, else the diagonal of the box."""
        del x
        return min(2 * self.radius, float(torch.linalg.vector_norm(_flat(self.high) - _flat(self.low))))

    def __str__(self) -> str:
        ends = float(_flat(self.low).min()), float(_flat(self.high).max())
        if self.centre is None:
            return f"inputs in [{ends[0]:.6g}, {ends[1]:.6g}], each entry in an interval of its own"
        return f"inputs within {self.radius:.6g} of the given one"


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def region(shapes: Sequence[Shape], domain: object, at: object, radius: object) -> Region | None:
    """The set that `domain`, `at` and `radius` say; None where they say nothing.

    Raises:
        InputError: numbers, shapes or an order that make no set.
    """
    if domain is None and at is None and radius is None:
        return None
    low, high = ((tuple(torch.full(shape, end, dtype=torch.float64) for shape in shapes)) for end in (-INF, INF))
    if domain is not None:
        low, high = _box(shapes, domain)
    if at is None and radius is None:
        return Region(low, high)
    if at is None or not isinstance(radius, int | float) or isinstance(radius, bool) or not 0 < radius < INF:
        given = f"at of {type(at).__name__} and radius={radius!r}"
        msg = f"{given} were given; expected an input and a positive finite radius: type at=x, radius=0.25"
        raise InputError(msg)
    centre = _tensors("at", at, shapes)
    if any(not bool(((lo <= c) & (c <= hi)).all()) for lo, c, hi in zip(low, centre, high, strict=True)):
        msg = "an input outside of the domain was given; expected at=x inside of domain=(low, high)"
        raise InputError(msg)
    pairs = list(zip(low, centre, high, strict=True))
    low = tuple(torch.maximum(lo, round_down(c - radius)) for lo, c, _ in pairs)
    high = tuple(torch.minimum(hi, round_up(c + radius)) for _, c, hi in pairs)
    return Region(low, high, centre, float(radius))


def _box(shapes: Sequence[Shape], domain: object) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The lower and the upper ends of all inputs."""
    wanted = "expected two finite numbers, the lower first, or two tensors that broadcast to the input: type a tuple such as (0.0, 1.0)"
    if not isinstance(domain, Sequence) or len(domain) != 2:  # type: ignore[reportUnknownArgumentType]
        msg = f"domain={domain!r} was given; {wanted}"
        raise InputError(msg)
    if any(isinstance(end, bool) or (isinstance(end, Real) and not math.isfinite(end)) for end in domain):  # type: ignore[reportUnknownVariableType]
        msg = f"domain={domain!r} was given; {wanted}"
        raise InputError(msg)
    low, high = (_tensors("domain", end, shapes) for end in domain)  # type: ignore[reportUnknownVariableType]
    if any(not bool((lo <= hi).all()) or bool((lo == hi).all()) for lo, hi in zip(low, high, strict=True)):
        msg = f"domain={domain!r} was given; {wanted}"
        raise InputError(msg)
    return low, high


def _tensors(name: str, given: object, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """One float64 tensor for each input, broadcast to its shape; a sequence of tensors stands for several inputs."""
    several = isinstance(given, list | tuple) and len(given) == len(shapes) and all(isinstance(g, Tensor) for g in given)  # type: ignore[reportUnknownVariableType]
    items: Sequence[Any] = given if several else [given] * len(shapes)  # type: ignore[assignment]
    tensors: list[Tensor] = []
    for item, shape in zip(items, shapes, strict=True):
        try:
            wide = to_float64(item if isinstance(item, Tensor) else torch.as_tensor(item, dtype=torch.float64)).cpu()
            tensors.append(wide.expand(torch.broadcast_shapes(wide.shape, shape)).reshape(shape).clone())
        except (RuntimeError, TypeError, ValueError) as error:
            shown = f"of shape {tuple(item.shape)}" if isinstance(item, Tensor) else repr(item)
            msg = f"{name} {shown} was given; expected real numbers that broadcast to the input's shape {shape}"
            raise InputError(msg) from error
        if isinstance(item, bool) or not bool(tensors[-1].isfinite().all()):
            msg = f"{name}={item!r} was given; expected finite numbers"
            raise InputError(msg)
    return tuple(tensors)


# ---- intervals of values -------------------------------------------------------------------------------------------------
#
# Every entry of a value has its interval; a value of several tensors, such as the parts of a split, has a list.

Entries = Any  # a Tensor, or a sequence of them


@dataclass(frozen=True)
class Value:
    """What is known of a value: an interval for each entry, one for all of them, and how far it is from its value at the centre.

    `middle` are intervals of the value at the centre of a ball, `far` is at least the l2 distance of every value from that one.
    """

    low: Entries
    high: Entries
    whole: Range
    middle: tuple[Tensor, Tensor] | None = None
    far: float = INF


def round_down(x: Tensor) -> Tensor:
    """Below every real number that rounds to x."""
    return x - (x.abs() * 2.0**-52 + rd.TINY)


def round_up(x: Tensor) -> Tensor:
    """Above every real number that rounds to x."""
    return x + (x.abs() * 2.0**-52 + rd.TINY)


def as_rows(values: Tensor) -> Tensor:
    """A batch of values, a row each; of single numbers too."""
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def given(area: Region, i: int) -> Value:
    """The i-th input."""
    low, high = area.low[i], area.high[i]
    whole = whole_of(low, high, Range(-INF, INF, INF, INF), tuple(low.shape))
    centre = low + (high - low) / 2 if area.centre is None else area.centre[i]
    if not bool(centre.isfinite().all()):
        return Value(low, high, whole)
    far = frobenius_up(round_up(torch.maximum(high - centre, centre - low)))
    return Value(low, high, whole, (centre, centre), min(far, area.radius))


def followed(step: Step, sources: Sequence[Value], shapes: Sequence[Shape]) -> tuple[Step, Value]:
    """A step on the set, and its value."""
    wholes = [v.whole for v in sources]
    narrowed = capped_step(restrict(step, sources), wholes, shapes)
    # slopes on the set say nothing of the way from 0 to it, which ranges go: they read the step as it was
    whole = range_of(narrowed if isinstance(step.what, Unbounded) else capped_step(step, wholes, shapes), wholes, shapes)
    low, high = _bounds(narrowed, [(v.low, v.high) for v in sources], whole)
    middle, far = None, INF
    if all(v.middle is not None for v in sources) and sources:
        middle = _bounds(narrowed, [v.middle for v in sources if v.middle is not None], whole)
        far = distance(narrowed, [v.far for v in sources])
        if isinstance(low, Tensor):
            reach = _reach(narrowed, sources, far)
            low, high = torch.maximum(low, round_down(middle[0] - reach)), torch.minimum(high, round_up(middle[1] + reach))
    if isinstance(low, Tensor):
        whole = whole_of(low, high, whole, narrowed.shape)
    return narrowed, Value(low, high, whole, middle, far)


def _bounds(step: Step, sources: Sequence[tuple[Entries, Entries]], whole: Range) -> tuple[Entries, Entries]:
    """Intervals of the entries, inside that of all of them; that one for each where the step is not followed entry by entry."""
    plain = all(isinstance(end, Tensor) for pair in sources for end in pair)
    copied = getattr(step.what, "copy_entries", None)
    ends = (copied(sources[0][0]), copied(sources[0][1])) if copied is not None else entries(step.what, step, sources) if plain else None
    if ends is None and step.op == "getitem" and isinstance(sources[0][0], list) and len(sources[0][0]) == 1:
        ends = sources[0][0][0], sources[0][1][0]  # of an order's values and places the values alone are known
    if ends is not None and not isinstance(ends[0], Tensor):
        return ends
    if ends is None or tuple(ends[0].shape) != step.shape or bool(ends[0].isnan().any() | ends[1].isnan().any()):
        return tuple(torch.full(step.shape, end, dtype=torch.float64) for end in (whole.low, whole.high))  # type: ignore[return-value]
    return ends[0].clamp_min(whole.low), ends[1].clamp_max(whole.high)


def inside(value: Value, span: Tensor, step: Step) -> Value:
    """A value within so far of its value at the centre."""
    if value.middle is None or not isinstance(value.low, Tensor):
        return value
    low = torch.maximum(value.low, round_down(value.middle[0] - span))
    high = torch.minimum(value.high, round_up(value.middle[1] + span))
    return replace(value, low=low, high=high, whole=whole_of(low, high, value.whole, step.shape), far=min(value.far, frobenius_up(span)))


def between(value: Value, sign: int, sources: Sequence[Value], shape: Shape) -> Value:
    """The larger (1) or the smaller (-1) of two values."""
    if not all(isinstance(v.low, Tensor) for v in (value, *sources)):
        return value
    extreme = torch.maximum if sign > 0 else torch.minimum
    low = torch.maximum(value.low, extreme(*(v.low for v in sources)))
    high = torch.minimum(value.high, extreme(*(v.high for v in sources)))
    return replace(value, low=low, high=high, whole=whole_of(low, high, value.whole, shape))


def whole_of(low: Tensor, high: Tensor, before: Range, shape: Shape) -> Range:
    """The interval of all entries and the norms of rows and columns, where the entries know them better."""
    size = torch.maximum(low.abs(), high.abs())
    if not bool(size.isfinite().all()):
        return Range(max(before.low, float(low.min())), min(before.high, float(high.max())), before.row, before.column)
    row = float(row_norms_up(size).max()) if len(shape) else float(size)
    column = float(row_norms_up(size.mT.contiguous()).max()) if len(shape) > 1 else INF
    return Range(max(before.low, float(low.min())), min(before.high, float(high.max())), min(before.row, row), min(before.column, column))


# ---- steps on intervals --------------------------------------------------------------------------------------------------
#
# What each step becomes on intervals of its sources.


def restrict(step: Step, sources: Sequence[Value]) -> Step:
    """The step with its slopes or its constant on the intervals of its sources."""
    what = step.what
    if not sources or not all(isinstance(v.low, Tensor) for v in sources):
        return step
    low, high = sources[0].low, sources[0].high
    if isinstance(what, Slope) and what.within is not None and tuple(low.shape) == step.shape:
        return replace(step, what=_restricted_slope(what, low, high))
    if isinstance(what, Lipschitz) and what.within is not None:
        upper, least, most = what.within(low, high)
        image = max(what.image[0], float(least.min())), min(what.image[1], float(most.max()))
        upper = upper if upper < what.upper else what.upper
        return replace(step, what=replace(what, upper=upper, image=image, because=f"{what.because}; {upper:.6g} on the given inputs"))
    if isinstance(what, Unbounded) and what.within is not None and low.numel() <= EACH and tuple(low.shape) == step.shape:
        on = _each(what.within, low, high)
        if on is None:
            return step
        image = float(on.least.min()), float(on.most.max())
        because = f"{step.op.split('.')[1]} on an interval of each entry"
        return replace(step, what=Slope(on.low, on.high, because, image, (-INF, INF), within=partial(_within, what.within, on)))
    return step


def shortened(step: Step, known: Sequence[Value]) -> Step:
    """The step with its shortcut on the intervals of what that reads."""
    short = step.shortcut
    if short is None or not short.within:
        return step
    ends = [(v.low, v.high) for v in (known[s] for s in short.sources) if isinstance(v.low, Tensor)]
    return replace(step, shortcut=short.on(ends)) if len(ends) == len(short.sources) else step


def _each(within: Callable[[float, float], Slope | None], low: Tensor, high: Tensor) -> OnInterval | None:
    """The slopes and values of a function of numbers for each entry; None where they have no finite bound."""
    slopes = [within(a, b) for a, b in zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)]
    ends = [torch.tensor([float(s.low), float(s.high), *s.image], dtype=torch.float64) for s in slopes if s is not None]
    return OnInterval(*(part.reshape(low.shape) for part in torch.stack(ends, 1))) if len(ends) == len(slopes) else None


def _within(within: Callable[[float, float], Slope | None], known: OnInterval, low: Tensor, high: Tensor) -> OnInterval:
    """The same on smaller intervals; what is known, where there are too many of them."""
    on = _each(within, low, high) if low.numel() <= EACH else None
    return known if on is None else on


def _restricted_slope(what: Slope, low: Tensor, high: Tensor) -> Slope:
    assert what.within is not None
    on = what.within(low, high)
    least, most = (
        torch.maximum(on.low, torch.as_tensor(what.low, dtype=torch.float64)),
        torch.minimum(on.high, torch.as_tensor(what.high, dtype=torch.float64)),
    )
    fixed, count = int((least == most).sum()), least.numel()
    name = what.because.split(":")[0]
    text = f"{name}: slopes in [{float(least.min()):.6g}, {float(most.max()):.6g}] on the given inputs, fixed in {fixed} of {count} entries"
    return replace(what, low=least, high=torch.maximum(least, most), because=text, sharp=False)


@singledispatch
def entries(what: object, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Intervals of the entries of a step from those of its sources; None where it is not followed entry by entry."""
    del what, step, sources


@entries.register
def _(what: Linear, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    low, high = sources[0]
    known = low.isfinite() & high.isfinite()
    mid, half = torch.where(known, low + (high - low) / 2, 0.0), torch.where(known, (high - low) / 2, 0.0)
    half = torch.where(known & (half > 0), round_up(round_up(half)) + mid.abs() * 2.0**-51, half)
    if what.op.weight.is_complex():
        return None
    if isinstance(what.op, Scale) and what.op.weight.numel() == 1 and float(what.op.weight) == -1.0 and not what.error + what.constant:
        return -high, -low
    op, moduli = what.op, replace(what.op, weight=to_float64(what.op.weight).abs())
    bias = torch.as_tensor(what.bias, dtype=torch.float64)
    centre, spread, size = apply(op, mid) + bias, apply(moduli, half), apply(moduli, mid.abs()) + bias.abs()
    stray = what.bias_error
    if what.error > 0.0:
        stray = rd.add_up(stray, rd.mul_up(what.error, frobenius_up(torch.maximum(low.abs(), high.abs()))))
    room = rd.gamma(8.0 * (terms(op) + 8)) * (size + spread) + (terms(op) + 8) * rd.TINY + stray
    if not bool(known.all()):
        room = torch.where(apply(moduli, (~known).double()) > 0, INF, room)
    return centre - spread - room, centre + spread + room


@entries.register
def _(what: Slope, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    if what.within is None or tuple(sources[0][0].shape) != step.shape:
        return None
    _, _, least, most = what.within(*sources[0])
    return least.expand(step.shape), most.expand(step.shape)


@entries.register
def _(what: Lipschitz, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    if what.monotone is not None:
        low, high = (what.monotone(*ends) for ends in zip(*sources, strict=True))
        return (low, high) if isinstance(low, Tensor) else ([low[0]], [high[0]])  # type: ignore[return-value]
    if what.linear is not None and what.linear.averages:
        return _averages(what.linear, sources)
    return None if what.within is None else what.within(*sources[0])[1:]


def _averages(linear: LinearAction, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """The values of a linear map without negative entries, in float64 with a rounding for each entry that it reads, at most."""
    ends = [torch.stack([low, high]) for low, high in sources]
    if not all(bool(end.isfinite().all()) for end in ends):
        return None
    low, high = (linear.run(*(end[k] for end in ends)) for k in (0, 1))
    sizes = [end.abs().amax(0) for end in ends]
    count = sum(size.numel() for size in sizes)
    room = 2.0 * rd.gamma(8.0 * (count + 8)) * linear.run(*sizes) + (count + 8) * rd.TINY
    room = room + rd.mul_up(linear.error, rd.hypot_up(frobenius_up(size) for size in sizes))
    return low - room, high + room


@entries.register
def _(what: View, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    return (sources[0][0].reshape(step.shape), sources[0][1].reshape(step.shape)) if what.flat else None


@entries.register
def _(what: Pad, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    pads = [p for pair in reversed(what.pairs) for p in pair]
    mode = {"mode": "constant", "value": what.value} if what.mode == "zeros" else {"mode": what.mode}
    low, high = (torch.nn.functional.pad(end, pads, **mode) for end in sources[0])  # type: ignore[arg-type]
    return low, high


@entries.register
def _(what: Sum, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    low, high = sources[0]
    for a, b in sources[1:]:  # nothing is rounded where a term is zero
        low = torch.where((low == 0) | (a == 0), low + a, round_down(low + a))
        high = torch.where((high == 0) | (b == 0), high + b, round_up(high + b))
    return low, high


@entries.register
def _(what: Join, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    return torch.cat([a for a, _ in sources], what.axis), torch.cat([b for _, b in sources], what.axis)


@entries.register
def _(what: Slice, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    kept = (slice(None),) * what.axis + (slice(what.start, what.stop, what.step),)
    return sources[0][0][kept], sources[0][1][kept]


@entries.register
def _(what: Product, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    (a, b), (c, d) = sources
    if what.scale != 1.0:
        return None
    if what.kind == "matrix":
        return _matrix_product((a, b), (c, d)) if a.shape[-1] == c.shape[-2] else None
    ends = torch.stack([x * y for x in (a, b) for y in (c, d)]).nan_to_num(0.0, INF, -INF)
    low, high = round_down(ends.amin(0)), round_up(ends.amax(0))
    return (low.clamp_min(0.0), high) if step.sources[0] == step.sources[1] else (low, high)


def _matrix_product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    if not all(bool(end.isfinite().all()) for pair in (left, right) for end in pair):
        return None
    (a, r), (b, s) = (((lo + hi) / 2, round_up((hi - lo) / 2) + (lo.abs() + hi.abs()) * 2.0**-50) for lo, hi in (left, right))
    spread = a.abs() @ s + r @ (b.abs() + s)
    room = rd.gamma(8.0 * (a.shape[-1] + 8)) * (a.abs() @ b.abs() + spread) + (a.shape[-1] + 8) * rd.TINY
    return a @ b - spread - room, a @ b + spread + room


@entries.register
def _(what: Attention, step: Step, sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    low, high = (getattr(end, way)(-2, keepdim=True) for end, way in zip(sources[2], ("amin", "amax"), strict=True))
    if what.empty:
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    return low.expand(step.shape), high.expand(step.shape)


# ---- distances from the value at the centre ------------------------------------------------------------------------------


def distance(step: Step, sources: Sequence[float]) -> float:
    """How far a value is from that at the centre, at most, from how far its sources are from theirs. docs/local.md#intervals."""
    what, far = step.what, rd.hypot_up(sources)
    if far == INF:
        return INF
    if isinstance(what, Linear):
        norm = quick_norm(to_float64(what.op.weight)) if isinstance(what.op, Dense) else rough_norm(what.op)
        return rd.mul_up(rd.add_up(norm, what.error), far)
    if isinstance(what, Slope):
        return rd.mul_up(max(float(torch.as_tensor(end, dtype=torch.float64).abs().max()) for end in (what.low, what.high)), far)
    if isinstance(what, Lipschitz):
        return rd.mul_up(what.upper, far)
    if isinstance(what, View | Slice | Join):
        return far
    if isinstance(what, Sum):
        return rd.add_up(*(rd.mul_up(rd.sqrt_up(float(n)), x) for n, x in zip(what.repeats, sources, strict=True)))
    return INF


def _reach(step: Step, sources: Sequence[Value], far: float) -> Tensor | float:
    """How far each entry is from that at the centre: the norm of its row of a linear map times how far the source is."""
    what = step.what
    if not isinstance(what, Linear) or sources[0].far == INF:
        return far
    op, lines = what.op, None
    if isinstance(op, Scale):
        lines = to_float64(op.weight).abs().expand(step.shape)
    elif isinstance(op, Dense):
        lines = row_norms_up(to_float64(op.weight)).expand(step.shape)
    elif op.padding_mode == "zeros" and isinstance(sources[0].low, Tensor):
        weight = to_float64(op.weight).abs()
        top = float(weight.max())
        if 1e-100 < top < 1e100:  # whatever is flushed of a square is made up for
            squares = apply(replace(op, weight=(weight / top) ** 2), torch.ones_like(sources[0].low))
            lines = squares.sqrt() * (top * (1.0 + rd.gamma(terms(op) + 32.0))) + top * terms(op) * 2.0**-500
    if lines is None:
        return far
    return round_up(lines * sources[0].far + rd.mul_up(what.error, sources[0].far))


# ---- slopes of chords --------------------------------------------------------------------------------------------------
#
# Chords of an activation from its value at the centre of a set: their slopes are in narrower intervals than those of
# all chords.

PIECES = 16  # of the way from the centre to each end, on either side of 0


def chords(what: Slope, argument: Value) -> tuple[Tensor, Tensor]:
    """Bounds of the slopes of the chords from the value at the centre to that at any other point of the set, entry by entry.

    Reference: docs/local.md#columns, theorem L11.
    """
    assert isinstance(argument.low, Tensor)
    shape = argument.low.shape
    least, most = (torch.as_tensor(end, dtype=torch.float64).expand(shape) for end in (what.low, what.high))
    known = argument.low.isfinite() & argument.high.isfinite()
    if what.within is None or argument.middle is None or not bool((known & (least < most)).any()):
        return least, most
    first, last = argument.middle
    sides = [_means(what, first, last, argument.high, most - least), _means(what, last, first, argument.low, most - least)]
    low, high = torch.minimum(sides[0][0], sides[1][0]), torch.maximum(sides[0][1], sides[1][1])
    low = torch.where(known, torch.maximum(least, low.nan_to_num(-torch.inf)), least)
    high = torch.where(known, torch.minimum(most, high.nan_to_num(torch.inf)), most)
    return low, torch.maximum(low, high)


def _means(what: Slope, centre: Tensor, inner: Tensor, end: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the means of the derivative on the way from the centre to any place up to the end.

    The centre is between `centre` and `inner`, which differ by rounding; the slopes of all chords by `width`.
    """
    assert what.within is not None
    turn = torch.where((centre < 0) != (end < 0), 0.0, (centre + end) / 2)
    share = torch.linspace(0, 1, PIECES + 1, dtype=torch.float64).reshape(-1, *(1,) * centre.ndim)
    knots = torch.cat([centre + (turn - centre) * share[:-1], turn + (end - turn) * share])
    knots[-1] = end
    on = what.within(torch.minimum(knots[:-1], knots[1:]), torch.maximum(knots[:-1], knots[1:]))
    steps, way = (knots[1:] - knots[:-1]).abs(), (knots[1:] - centre).abs()
    low, high = (torch.cat([slopes[:1], (slopes * steps).cumsum(0) / way]) for slopes in (on.low, on.high))
    apart = (inner - centre).abs() / ((knots[1] - centre).abs() - (inner - centre).abs()).clamp_min(0.0)  # infinite where nothing is known
    room = 2.0 * apart * width + 2.0**-40 * (low.abs().amax(0) + high.abs().amax(0)) + 64 * rd.TINY
    return low.amin(0) - room, high.amax(0) + room
