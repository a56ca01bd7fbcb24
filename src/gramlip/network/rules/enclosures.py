"""Functions of one number put together from several calls: enclosures of their slopes on pieces of the line. docs/network.md#enclosures.

Each value is `t^k h(t)` with h bounded where t goes to 0, or to infinity; so products such as `x tanh(softplus(x))` have finite slopes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor

from gramlip.network.rules.activations import STEEP
from gramlip.network.rules.registry import Call
from gramlip.network.steps import Linear, OnInterval, Product, Slope, Step, Sum, Unbounded, What
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.numerics.rounding import WHOLE, Known, Pieces, flushed, hull, interval, meet, plus, power, root, times
from gramlip.operators.linear_maps import Scale

INF = math.inf
STEPS = 64  # that one function is made of
ROWS = 512  # different constants of a value's entries, each with a function of its own
ROUNDS, LAST = 12, 5  # of cutting pieces, and those after which each has to bring the bound nearer to what was seen
PARTS = 8  # of a piece, in one round
PIECES = 512  # that are cut in one round
DYADIC = 20  # pieces begin as [2^k, 2^(k+1)] for |k| up to this
CUTS, ENTRIES = 32, 2**18  # pieces of an interval that is given, and of all entries' intervals
FAR = 1e300  # a point beyond it is not looked at
CLOSE = 1e-5  # relative: how far the bound may be above the largest slope that was seen

# ---- entrywise functions of functions ------------------------------------------------------------------------------------


def _activation(pieces: Pieces, f: Known, what: Slope, name: str) -> Known:
    """An entrywise function of f."""
    slopes, values = _on(what, f.value)
    inner = meet(times(slopes, f.value), _decay(what, name, f.value))  # v a'(v) at the values v of f
    grown = meet(times(slopes, f.grown), times(inner, f.rate))
    slope = meet(times(slopes, f.slope), times(grown, pieces.to(torch.tensor(-1))))
    bounded, at_zero = max(map(abs, what.image)) < INF, meet(interval(*what.at_zero), _on(what, interval(0.0))[1])
    if pieces.far:
        k = (f.k if what.at_zero == (0.0, 0.0) else f.k.clamp_min(0)).clamp_max(0 if bounded else f.k)
    else:
        k = f.k if what.at_zero == (0.0, 0.0) else torch.zeros_like(f.k)
    h = meet(times(values, pieces.to(-k)), _along_chords(pieces, f, what, k, at_zero))
    return pieces.closed(Known(k, h, values, slope, grown, WHOLE, f.away, f.at_zero))


def _along_chords(pieces: Pieces, f: Known, what: Slope, k: Tensor, at_zero: Tensor) -> Tensor:
    """Values over `t^k`, from those at one point of each piece, and at 0, along the chords from there."""
    near = f.value.gather(-1, f.value.abs().argmin(-1, keepdim=True)).clamp(-FAR, FAR)
    near, zero = torch.where(rd.holds_zero(f.value)[..., None], 0.0, near).expand(f.value.shape), interval(0.0)
    h = WHOLE
    for start, image in ((near, _on(what, near)[1]), (zero, at_zero)):
        chords = _on(what, hull(f.value, start))[0]
        offset = plus(image, times(times(chords, start), interval(-1.0)))
        h = meet(h, plus(times(times(chords, f.h), pieces.to(f.k - k)), times(offset, pieces.to(-k))))
    return h


def _steep(pieces: Pieces, f: Known, what: Unbounded, exponent: float) -> Known:
    """A function that has bounded slopes on intervals alone, each piece by itself; a power where the exponent is not 0."""
    value = f.value
    assert what.within is not None
    slopes_on = [what.within(a, b) for a, b in value.flatten(0, -2).tolist()]
    ends = torch.tensor([(-INF, INF, -INF, INF) if s is None else (s.low, s.high, *s.image) for s in slopes_on], dtype=torch.float64)
    slopes, values = ends.reshape(*value.shape[:-1], 2, 2).unbind(-2)
    sure = torch.tensor([s is not None for s in slopes_on]).reshape(value.shape[:-1])
    f = f._replace(away=f.away & sure, at_zero=f.at_zero & sure)
    if exponent:
        return pieces.raised(f, exponent, slopes, torch.tensor(0), values, values)
    slope, grown = times(slopes, f.slope), times(slopes, f.grown)
    return pieces.closed(Known(torch.tensor(0), values, values, slope, grown, WHOLE, f.away, f.at_zero))


def _on(what: Slope, value: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and values of an activation on intervals."""
    assert what.within is not None
    on = torch.stack(what.within(*value.unbind(-1)), -1)
    on = torch.where(on.isnan(), torch.cat([WHOLE, WHOLE]), on)
    return on[..., :2], on[..., 2:]


FALLS = {
    **dict.fromkeys(("tanh", "sigmoid", "erf", "atan", "hardsigmoid"), (True, True)),
    **dict.fromkeys(("softplus", "elu", "selu", "celu"), (True, False)),
    "log_sigmoid": (False, True),
}
"""Activations that rise and whose slopes do not grow away from 0: below it, and above it."""


def _decay(what: Slope, name: str, value: Tensor) -> Tensor:
    """The products of arguments and slopes: by the mean value theorem at most twice what the activation rises from v to v / 2."""
    if name not in FALLS:
        return WHOLE
    low, high = value.unbind(-1)
    below, above = FALLS[name]
    near, far = torch.where(low > 0, low, high), torch.where(low > 0, high, low)
    halves, ends = (_on(what, torch.stack([at, at], -1))[1] for at in (near / 2, far))
    rise = torch.where(low > 0, ends[..., 1] - halves[..., 0], halves[..., 1] - ends[..., 0])
    known = ((low > 0) & above) | ((high < 0) & below)
    most = torch.where(known, 2 * rise * (1 + 2.0**-50) + rd.TINY, INF).nan_to_num(INF)
    return torch.stack([torch.where(known & (low > 0), 0.0, -most), torch.where(known & (high < 0), 0.0, most)], -1)


# ---- functions -----------------------------------------------------------------------------------------------------------

Base = Mapping[int, Callable[[Pieces], Known]]  # steps that are known as functions of t


def itself(pieces: Pieces) -> Known:
    """The step is t."""
    return pieces.start(1, interval(1.0))


@dataclass(frozen=True)
class Function:
    """The values of some steps, entry by entry functions of one number t; `inner` are the steps from there to the `ends`, in order."""

    steps: Mapping[int, Step]
    base: Base
    inner: tuple[int, ...]
    ends: tuple[int, ...]

    @staticmethod
    def of(call: Call, base: Base, ends: Sequence[int]) -> Function | None:
        """The function that the ends are of the base alone; None where they are none, or one of too many steps."""
        inner, stack = dict[int, Step](), list(ends)
        while stack:
            at = stack.pop()
            if at in inner or at in base:
                continue
            step = _followed(call, at)
            if step is None or at < min(base) or len(inner) == STEPS:
                return None
            inner[at] = step
            stack += step.sources
        return Function(inner, base, tuple(sorted(inner)), tuple(ends))

    def known(self, pieces: Pieces) -> list[Known]:
        """What is known of each end on the pieces."""
        by_step = {at: start(pieces) for at, start in self.base.items()}
        for at in self.inner:
            step = self.steps[at]
            by_step[at] = _step(step, [by_step[s] for s in step.sources], pieces, at)
        return [pieces.joined(by_step[at]) for at in self.ends]

    @property
    def key(self) -> object:
        """Equal for functions that are the same."""
        places = {at: i for i, at in enumerate((*sorted(self.base), *self.inner))}
        parts = [(tuple(places[s] for s in self.steps[at].sources), *_what(self.steps[at])) for at in self.inner]
        if self.rows is None:
            return None
        return tuple(parts), tuple(places[at] for at in self.ends), tuple(self.base.values()), self.rows.numpy().tobytes()

    @property
    def places(self) -> dict[int, int]:
        """For each step of constants the first of its columns in `rows`."""
        return {at: 4 * i for i, at in enumerate(at for at in self.inner if isinstance(self.steps[at].what, Linear))}

    def constants(self) -> list[tuple[int, list[Tensor]]]:
        """For each step of constants its number and the ends of its weights and biases."""
        whats = [(at, what) for at in self.inner if isinstance(what := self.steps[at].what, Linear)]
        return [(at, _constants(what)) for at, what in whats]

    @cached_property
    def rows(self) -> Tensor | None:
        """The different constants of entries, a row each, four for each step of constants; None where there are too many."""
        constants = torch.broadcast_tensors(*(end for _, ends in self.constants() for end in ends))
        if not constants:
            return torch.zeros(1, 0, dtype=torch.float64)
        rows = torch.stack([c.reshape(-1) for c in constants], 1).unique(dim=0)
        return rows if len(rows) <= ROWS else None


def _constants(what: Linear) -> list[Tensor]:
    weight, bias = to_float64(what.op.weight), torch.as_tensor(what.bias, dtype=torch.float64)
    error, stray = (torch.tensor(e, dtype=torch.float64) for e in (what.error, what.bias_error))
    return [end for value, room in ((weight, error), (bias, stray)) for end in (_off(value, -room), _off(value, room))]


def _off(value: Tensor, by: Tensor) -> Tensor:
    return value if not by else torch.nextafter(value + by, value + by + by.sign() * INF)


def _what(step: Step) -> tuple[object, ...]:
    """What a step is, but for the constants of its entries."""
    what = step.what
    within = getattr(what, "within", None)
    bounds = (what.low, what.high, what.image, what.at_zero) if isinstance(what, Slope) else ()
    return (
        type(what),
        step.op,
        *bounds,
        *((within.func, within.args) if isinstance(within, partial) and isinstance(what, Unbounded) else (within,)),
    )


def _followed(call: Call, at: int) -> Step | None:
    """A step that is followed here: entry by entry, of values of its own shape; one that several calls are together is what they are."""
    steps, step = call.steps, call.steps[at]
    if at in call.known.written:
        return replace(step, what=Sum((1,)), sources=(call.known.written[at],))
    alike = bool(step.sources) and all(steps[s].shape == step.shape for s in step.sources)
    return step if alike and _entrywise(step.what) else None


def _entrywise(what: What) -> bool:
    if isinstance(what, Slope):
        return what.within is not None and isinstance(what.low, float | int) and isinstance(what.high, float | int)
    if isinstance(what, Linear):
        return isinstance(what.op, Scale) and what.error < INF and what.bias_error < INF and not what.op.weight.is_complex()
    if isinstance(what, Product):
        return what.kind == "entries" and what.scale == 1.0
    return isinstance(what, Sum) or (isinstance(what, Unbounded) and what.within is not None)


def _step(step: Step, sources: Sequence[Known], pieces: Pieces, at: int) -> Known:
    what, first = step.what, sources[0]
    if isinstance(what, Linear):
        return pieces.scaled(first, *pieces.constant(at))
    if isinstance(what, Sum):
        return reduce(pieces.sum, sources)
    if isinstance(what, Product):
        return pieces.product(first, sources[1], step.sources[0] == step.sources[1])
    if isinstance(what, Slope):
        return _activation(pieces, first, what, step.op.split(".")[1] if step.op.startswith("aten.") else "")
    assert isinstance(what, Unbounded)
    if what.within is STEEP["reciprocal"]:
        return pieces.inverse(first)
    if what.within in (STEEP["sqrt"], STEEP["rsqrt"]):
        return pieces.root(first, 1 if what.within is STEEP["sqrt"] else -1)
    if what.within is STEEP["exp"]:
        return pieces.exponential(first)
    if what.within is STEEP["log"]:
        return pieces.logarithm(first)
    if what.within is STEEP["log1p"]:
        return pieces.logarithm(pieces.scaled(first, interval(1.0), interval(1.0)))
    if what.within is STEEP["cosh"]:
        sides = (pieces.exponential(pieces.scaled(first, interval(sign), interval(0.0))) for sign in (1.0, -1.0))
        return pieces.scaled(pieces.sum(*sides), interval(0.5), interval(0.0))
    exponent = what.within.args[0] if isinstance(what.within, partial) and step.op.startswith("aten.pow") else 0.0
    if exponent.is_integer() and 0 < abs(exponent) <= 16:
        return pieces.power(first, int(exponent))
    return _steep(pieces, first, what, exponent)


# ---- the largest slope ---------------------------------------------------------------------------------------------------

Measure = Callable[[Sequence[Known], Pieces], Tensor]


def steepness(known: Sequence[Known], pieces: Pieces) -> Tensor:
    """At least the root of the sum of the squares of all slopes on each piece."""
    del pieces
    return root(reduce(plus, (power(f.slope, 2) for f in known)))[..., 1]


@dataclass
class _Grid:
    """Pieces `sign [low, high]`, each for a row of constants."""

    row: Tensor
    sign: Tensor
    low: Tensor
    high: Tensor

    def __getitem__(self, chosen: Tensor) -> _Grid:
        return _Grid(self.row[chosen], self.sign[chosen], self.low[chosen], self.high[chosen])

    def parts(self) -> _Grid:
        """Each piece in `PARTS`."""
        share = torch.linspace(0, 1, PARTS + 1, dtype=torch.float64)[:, None]
        edges = self.low + (self.high - self.low) * share
        edges = torch.where(self.high == INF, self.low * 4.0 ** (PARTS * share), edges).clamp(self.low, self.high)
        edges[0], edges[-1] = self.low, self.high
        return _Grid(self.row.repeat(PARTS), self.sign.repeat(PARTS), edges[:-1].reshape(-1), edges[1:].reshape(-1))

    def with_middles(self) -> _Grid:
        """The pieces, and after them a point of each."""
        middle = torch.where(self.high == INF, 2 * self.low, (self.low + self.high) / 2)
        ends = torch.cat([self.low, middle]), torch.cat([self.high, middle])
        return _Grid(self.row.repeat(2), self.sign.repeat(2), *ends)


def largest(f: Function, measure: Measure, *, signs: Sequence[float] = (-1.0, 1.0), room: float = 0.0, rounds: int = 0) -> float:
    """Upper bound of what is measured on any piece, over the line, or the half of it that the one sign says.

    Pieces are cut until the bound is within `room`, or `CLOSE` of it, of what was seen at a point, or the rounds are over. Where slopes
    have a period, one will do, but for values, which have `rounds` of their own.
    """
    rows = f.rows
    if rows is None:
        return INF
    half, grid = len(signs) == 1, _grid(f, rows, signs, None if rounds else _period(f, rows))
    settled, before = -INF, INF  # the largest bound of the pieces that are not cut any more, and how far it all was above what was seen
    bounds, seen = _measured(f, rows, measure, grid, half)
    for i in range(rounds or ROUNDS):
        gap = max(settled, float(bounds.max())) - seen
        open_ = bounds > seen + max(room, CLOSE * abs(seen))
        if not bool(open_.any()) or (i >= LAST and gap >= 0.8 * before):
            break
        order, before = bounds.argsort(descending=True)[: int(open_.sum())], gap
        settled = max([settled, *bounds[~open_].tolist(), *bounds[order[PIECES : PIECES + 1]].tolist()])
        grid, above = grid[order[:PIECES]].parts(), bounds[order[:PIECES]].repeat(PARTS)
        bounds, at_points = _measured(f, rows, measure, grid, half)
        bounds, seen = torch.minimum(bounds, above), max(seen, at_points)
    return max(settled, float(bounds.max()))


def _measured(f: Function, rows: Tensor, measure: Measure, grid: _Grid, half: bool) -> tuple[Tensor, float]:
    """What is measured on the pieces of a grid, and the most that is at a point of each; of one `half` of the line."""
    bounds, far, seen = torch.empty(len(grid.row), dtype=torch.float64), grid.low >= 1.0, -INF
    for outside in (False, True):
        at = far == outside
        if bool(at.any()):
            pieces = replace(_pieces(f, rows, grid[at].with_middles(), outside), half=half)
            values = measure(f.known(pieces), pieces).expand(pieces.t.shape[:-1]).nan_to_num(INF, INF, -INF)
            bounds[at], points = values.split(len(values) // 2)
            seen = max([seen, *(v for v in points.tolist() if v < INF)])
    return bounds, seen


def _pieces(f: Function, rows: Tensor, grid: _Grid, far: bool) -> Pieces:
    above = grid.sign > 0
    t = torch.stack([torch.where(above, grid.low, -grid.high), torch.where(above, grid.high, -grid.low)], -1)
    places = f.places

    def constant(at: int) -> tuple[Tensor, Tensor]:
        ends = rows[grid.row, places[at] : places[at] + 4]
        return flushed(ends[:, :2]), flushed(ends[:, 2:])

    return Pieces(t, far, constant)


def _grid(f: Function, rows: Tensor, signs: Sequence[float], period: Tensor | None) -> _Grid:
    """Where the search begins: one period of functions that have one, else pieces of the line that grow away from 0."""
    if period is not None:
        edges = torch.linspace(0.0, 0.5 + 1e-9, 33, dtype=torch.float64) * period[:, None]
        edges = torch.cat([edges, edges[:, -1:].clamp_max(1.0)], 1).sort(1)[0]
    else:
        powers = 2.0 ** torch.arange(-DYADIC, DYADIC + 1, dtype=torch.float64)
        edges = torch.cat([torch.zeros(1), powers, torch.full((1,), INF)]).double().expand(len(rows), -1)
    n, count = edges.shape[0], edges.shape[1] - 1
    row = torch.arange(n).repeat_interleave(count)
    low, high, k = edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1), len(signs)
    sign = torch.tensor(signs, dtype=torch.float64).repeat_interleave(len(row))
    return _Grid(row.repeat(k), sign, low.repeat(k), high.repeat(k))


def _period(f: Function, rows: Tensor) -> Tensor | None:
    """For each row a period that all slopes have; None where they have none."""
    places = f.places
    kinds: dict[int, tuple[str, Tensor]] = {at: ("line", torch.ones(len(rows), dtype=torch.float64)) for at in f.base}
    for at in f.inner:
        kind = _repeats(
            f.steps[at], [kinds[s] for s in f.steps[at].sources], rows[:, places[at] : places[at] + 2] if at in places else rows
        )
        if kind is None:
            return None
        kinds[at] = kind
    periods = [kinds[at][1] for at in f.ends if kinds[at][0] != "line"]
    return periods[0] if periods and all(torch.equal(p, periods[0]) for p in periods) else None


def _repeats(step: Step, sources: Sequence[tuple[str, Tensor]], weights: Tensor) -> tuple[str, Tensor] | None:
    """Whether a step is a line, with its slope, or repeats itself, with its period, or does so beside a line; None for anything else."""
    what, (kind, number), kinds = step.what, sources[0], {kind for kind, _ in sources}
    if isinstance(what, Linear):
        exact = bool((weights[:, 1] - weights[:, 0] <= 1e-13 * weights[:, 0].abs()).all())
        return (None if not exact else ("line", number * weights[:, 0])) if kind == "line" else (kind, number)
    if isinstance(what, Slope) and kind == "line":
        waves = step.op in ("aten.sin.default", "aten.cos.default")
        return ("wave", math.tau / number.abs()) if waves and bool(((number.abs() > 1e-100) & (number.abs() < 1e100)).all()) else None
    if isinstance(what, Slope | Unbounded):
        return (kind, number) if kind == "wave" else None
    periods = [n for k, n in sources if k != "line"]
    if any(not torch.equal(n, periods[0]) for n in periods[1:]):
        return None
    if isinstance(what, Product):
        return ("wave", periods[0]) if kinds == {"wave"} else None
    if kinds == {"line"}:
        total, size = (reduce(torch.add, (part(n) for _, n in sources)) for part in (Tensor.clone, Tensor.abs))
        return ("line", total) if bool((total.abs() >= 1e-2 * size).all()) else None
    return "wave" if kinds == {"wave"} else "drift", periods[0]


# ---- steps ---------------------------------------------------------------------------------------------------------------


BASES = 4  # values, the nearest first, that something is looked at as a function of


def of_one_value(call: Call, ends: Sequence[int]) -> list[Function]:
    """The functions that some steps are of one earlier value, the nearest value first."""
    before, stack = set[int](), list(ends)
    while stack and len(before) <= STEPS:
        at = stack.pop()
        if at not in before:
            before.add(at)
            step = _followed(call, at)
            stack += () if step is None else step.sources
    functions = (Function.of(call, {at: itself}, ends) for at in sorted(before, reverse=True))
    return [f for f in functions if f is not None and f.inner][:BASES]


def tied(call: Call, values: Sequence[int]) -> tuple[list[tuple[Function, float]], list[int]]:
    """Values that are functions of one earlier value, several together, each group with its constant; and the others.

    The constant is infinite where it is finite on intervals alone.
    """
    rest, groups, left = list(values), list[tuple[Function, float]](), list[int]()
    while rest:
        first = rest.pop(0)
        group = [first, *(i for i in rest if of_one_value(call, [first, i]))]
        functions = of_one_value(call, group) if len(group) > 1 else []
        if not functions:
            left.append(first)
            continue
        rest = [i for i in rest if i not in group]
        sizes = [(f, remembered(call, ("joined", f.key), lambda f=f: largest(f, steepness))) for f in functions]
        groups.append(next((pair for pair in sizes if pair[1] < INF), sizes[0]))
    return groups, left


def remembered(call: Call, key: object, make: Callable[[], Any]) -> Any:
    """What was found for the same function before."""
    if key not in call.known.functions:
        call.known.functions[key] = make()
    return call.known.functions[key]


def _cut(f: Function, low: Tensor, high: Tensor) -> Pieces:
    """The intervals of all entries in pieces, along a first axis."""
    shape = torch.broadcast_shapes(low.shape, *(end.shape for _, ends in f.constants() for end in ends))
    low, high = low.expand(shape), high.expand(shape)
    cuts = max(1, min(CUTS, ENTRIES // max(1, low.numel())))
    edges = low + (high - low) * torch.linspace(0, 1, cuts + 1, dtype=torch.float64).reshape(-1, *[1] * low.ndim)
    edges = torch.where(edges.isfinite(), edges, low).clamp(low, high)
    edges[0], edges[-1] = low, high
    a, b = edges[:-1], edges[1:]
    through = (a < 0) & (b > 0)
    t = torch.stack([torch.cat([a, torch.where(through, 0.0, a)]), torch.cat([torch.where(through, 0.0, b), b])], -1)
    held = {at: (flushed(torch.stack(ends[:2], -1)), flushed(torch.stack(ends[2:], -1))) for at, ends in f.constants()}
    return Pieces(flushed(t), False, held.__getitem__)


def on_set(f: Function, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and values of the first end where t is in an interval for each entry."""
    pieces = _cut(f, low, high)
    known = f.known(pieces)[0]
    return _together(known.slope.expand(pieces.t.shape)), _together(known.value.expand(pieces.t.shape))


def _together(x: Tensor) -> Tensor:
    """The least interval that holds all along the first axis, with the ends in order: where t is one number, any slope is one."""
    return torch.stack([x.amin(-1).amin(0), x.amax(-1).amax(0)], -1)


def steepness_on(f: Function, low: Tensor, high: Tensor) -> float:
    """At least the root of the sum of the squares of all slopes where t is in an interval for each entry."""
    pieces = _cut(f, low, high)
    return float(steepness(f.known(pieces), pieces).max())


def _on_interval(f: Function, slopes: tuple[float, float], image: tuple[float, float], low: Tensor, high: Tensor) -> OnInterval:
    slope, value = on_set(f, low, high)
    (least, most), values = slope.clamp(*slopes).unbind(-1), value.clamp(*image)
    return OnInterval(least, most, *values.unbind(-1))


def slope_of(f: Function, because: str, most: float) -> Slope | None:
    """The step of a function of one value; None where its slopes are not bounded, or not below `most`."""
    high = largest(f, lambda known, _: known[0].slope[..., 1])
    if not high < most:
        return None
    low = -largest(f, lambda known, _: -known[0].slope[..., 0], room=CLOSE * abs(high))
    if not -low < most:
        return None
    image = [largest(f, lambda known, _, side=side: side * known[0].value[..., int(side > 0)], rounds=ROUNDS // 3) for side in (-1, 1)]
    text = f"{because}: slopes in [{low:.6g}, {high:.6g}]"
    zero = torch.zeros((), dtype=torch.float64)
    at_zero = on_set(f, zero, zero)[1]
    within = partial(_on_interval, f, (low, high), (-image[0], image[1]))
    return Slope(low, high, text, (-image[0], image[1]), (float(at_zero[..., 0].min()), float(at_zero[..., 1].max())), within=within)


def summed_up(f: Function) -> float:
    """The root of the sum of the squares of all slopes as far as the ends of the slopes of its parts say."""
    rows = f.rows
    if rows is None:
        return INF
    grid = _Grid(
        torch.arange(len(rows)), torch.ones(len(rows)), *(torch.full((len(rows),), end, dtype=torch.float64) for end in (-INF, INF))
    )
    pieces = _pieces(f, rows, grid, False)
    return float(steepness(f.known(pieces), pieces).max())
