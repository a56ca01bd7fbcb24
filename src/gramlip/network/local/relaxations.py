"""Linear relaxations: values as linear functions of the input, and what activations deviate from them. docs/local.md#relaxations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gramlip.network.local.intervals import Region, Value, as_rows, round_down, round_up, whole_of
from gramlip.network.steps import (
    Argument,
    Compared,
    Drift,
    Input,
    Join,
    Linear,
    LinearAction,
    Lipschitz,
    Network,
    OnInterval,
    Pad,
    Shortcut,
    Slice,
    Slope,
    Step,
    Sum,
    View,
    What,
    terms,
)
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.numerics.rounding import row_norms_up
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape, apply

INF = math.inf
BUDGET = 5e10  # multiplications that rows may take by which intervals are tightened
THIRD = 2**24  # entries of the derivatives of a value's slopes by its input, twice
COLUMNS, MATRIX = 2**12, 2**22  # columns and entries of the matrix of a linear map that is read off a basis
TOGETHER = 2**23  # of them at a time
FINE = 256  # and its derivative
CELLS = 16  # pieces of an interval, on either side of 0, on which an activation is compared with a line

# ---- linear steps on rows --------------------------------------------------------------------------------------------------
#
# What linear steps do to a batch of values, and by its derivative to rows: linear functions of a value.

Act = Callable[[Sequence[Tensor], bool], Tensor]
Action = tuple[tuple[int, ...], Act]


def action(steps: Sequence[Step], i: int) -> Action | None:
    """The steps that a linear one reads, and what it does to a batch of them, or with the moduli of its weights; None for others.

    The parts of a split are taken from the value that was split.
    """
    step = steps[i]
    what = step.what
    if isinstance(what, Linear) and not what.op.weight.is_complex():
        return step.sources, lambda xs, moduli: _linear(what, xs[0], moduli)
    if getattr(what, "copy_entries", None) is not None:
        return _copied(steps, i)
    if isinstance(what, View) and what.flat:
        return step.sources, lambda xs, _: xs[0].reshape(-1, *step.shape)
    if isinstance(what, Sum):
        return step.sources, lambda xs, _: _sum(xs, step)
    if isinstance(what, Join):
        return step.sources, lambda xs, _: torch.cat(list(xs), what.axis + 1)
    if isinstance(what, Slice):
        kept = (slice(None),) * (what.axis + 1) + (slice(what.start, what.stop, what.step),)
        return step.sources, lambda xs, _: xs[0][kept]
    if isinstance(what, Pad):
        pads = [p for pair in reversed(what.pairs) for p in pair]
        mode = "constant" if what.mode == "zeros" else what.mode
        return step.sources, lambda xs, _: torch.nn.functional.pad(xs[0].flatten(0, 1), pads, mode=mode).reshape(-1, *step.shape)
    if isinstance(what, Lipschitz) and what.linear is not None:
        return _matrices(step, [steps[s].shape for s in step.sources], what.linear)
    return None


def _matrices(step: Step, shapes: Sequence[Shape], linear: LinearAction) -> Action | None:
    """Any other linear map by its matrices, one for each source, read off a basis.

    Where they are too large, averages by the map itself, which is that of the moduli too; None for others.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) > COLUMNS or sum(sizes) * math.prod(step.shape) > MATRIX:
        return (step.sources, lambda xs, _: torch.vmap(linear.run)(*xs)) if linear.averages else None
    blank, blocks = [torch.zeros(shape, dtype=torch.float64) for shape in shapes], list[Tensor]()
    with torch.no_grad():
        for k, size in enumerate(sizes):
            basis = torch.eye(size, dtype=torch.float64).reshape(size, *shapes[k])
            blocks.append(torch.stack([linear.run(*blank[:k], e, *blank[k + 1 :]).reshape(-1) for e in basis]))

    def act(xs: Sequence[Tensor], moduli: bool) -> Tensor:
        parts = [as_rows(x) @ (block.abs() if moduli else block) for x, block in zip(xs, blocks, strict=True)]
        return torch.stack(parts).sum(0).reshape(-1, *step.shape)

    return step.sources, act


def stray_of(steps: Sequence[Step], i: int) -> float:
    """The norm of what a linear step's real map differs by from the one that is followed."""
    what = steps[i].what
    if isinstance(what, Linear):
        return what.error
    if isinstance(what, Lipschitz) and what.linear is not None and what.copy_entries is None:
        count = sum(math.prod(steps[s].shape) for s in steps[i].sources)
        return rd.add_up(what.linear.error, rd.mul_up(rd.gamma(8.0 * (count + 8)), what.linear.moduli))
    return 0.0


def copies(steps: Sequence[Step], i: int) -> tuple[int, Tensor] | None:
    """The step that one copies entries of, and their numbers there, of its own shape; None where it does not copy entries of one value."""
    step = steps[i]
    copied = getattr(step.what, "copy_entries", None)
    if copied is None:
        return None
    before = steps[step.sources[0]]
    inner = getattr(before.what, "copy_entries", None) if step.op == "getitem" else None
    source = step.sources[0] if inner is None else before.sources[0]
    shape = steps[source].shape
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    read = copied(numbers if inner is None else inner(numbers))
    return (source, read.long()) if isinstance(read, Tensor) and tuple(read.shape) == step.shape else None


def _copied(steps: Sequence[Step], i: int) -> Action | None:
    known, shape = copies(steps, i), steps[i].shape
    if known is None:
        return None
    source, numbers = known
    places = numbers.reshape(-1)
    return (source,), lambda xs, _: as_rows(xs[0])[:, places].reshape(-1, *shape)


def _linear(what: Linear, x: Tensor, moduli: bool) -> Tensor:
    op = replace(what.op, weight=to_float64(what.op.weight).abs()) if moduli else what.op
    return apply(op, x.flatten(0, 1)).unflatten(0, (-1, x.shape[1])) if isinstance(op, Conv) else apply(op, x)


def _sum(xs: Sequence[Tensor], step: Step) -> Tensor:
    wide = [x.reshape(len(x), *(1,) * (len(step.shape) + 1 - x.ndim), *x.shape[1:]) for x in xs]
    return torch.stack([x.expand(len(x), *step.shape) for x in wide]).sum(0)


def adjoint(steps: Sequence[Step], i: int, action_of: Action, rows: Tensor, moduli: bool) -> list[Tensor]:
    """Rows of the result of a linear step as rows of what it reads."""
    what, (reads, act) = steps[i].what, action_of
    if isinstance(what, Linear) and isinstance(what.op, Dense):
        weight = to_float64(what.op.weight)
        return [rows @ (weight.abs() if moduli else weight)]
    given = [torch.zeros(len(rows), *steps[s].shape, dtype=torch.float64, requires_grad=True) for s in reads]
    with torch.enable_grad():
        value = act(given, moduli)
    return list(torch.autograd.grad(value, given, rows))


def roundings(steps: Sequence[Step]) -> float:
    """As many as an entry of a row may meet on its way back through all steps."""
    read = [0] * len(steps)
    for step in steps:
        for s in step.sources:
            read[s] += 1
    wide = [isinstance(s.what, Lipschitz) and s.what.linear is not None for s in steps]
    read_by = [sum(math.prod(steps[k].shape) for k in s.sources) if w else len(s.sources) for s, w in zip(steps, wide, strict=True)]
    counts = [terms(s.what.op) if isinstance(s.what, Linear) else n for s, n in zip(steps, read_by, strict=True)]
    return 8.0 * sum(count + n + 8 for count, n in zip(counts, read, strict=True))


# ---- maxima --------------------------------------------------------------------------------------------------------------
#
# A maximum of two values is the second one and a ReLU of their difference: theorem L16.

COMPARED, MEMBERS = 16, 2**22  # entries of a group that are compared one by one, and of all groups of a step
NEGATIVE = torch.tensor(-1.0, dtype=torch.float64)
Side = tuple[int, Tensor | None]


@dataclass(frozen=True)
class Apart:
    """A network whose comparisons are ReLUs of differences.

    `number` has for each step before the one that has its value, None for those that are `replaced` and their places. `pairs` are the
    steps that are the larger (1) or the smaller (-1) of two others.
    """

    network: Network
    number: list[int]
    replaced: set[int]
    pairs: dict[int, tuple[int, int, int]]


def maxima_apart(network: Network) -> Apart:
    """The same function, its values on a set included, with maxima, minima and orders of small groups by pairs of entries."""
    made, number, replaced = _Pairs(), list[int](), set[int]()
    for i, step in enumerate(network.steps):
        what = step.what
        if isinstance(what, Lipschitz) and step.op == "getitem" and step.sources[0] in replaced:
            replaced.add(i)
            number.append(number[step.sources[0]])
        elif isinstance(what, Lipschitz) and what.compared is not None and _is_small(what.compared, step):
            replaced.add(i)
            moved = step.moved(number.__getitem__)
            number.append(made.compared(moved, what.compared, moved.sources, what.upper))
        else:
            made.steps.append(step.moved(number.__getitem__))
            number.append(len(made.steps) - 1)
    return Apart(Network(made.steps, tuple(number[i] for i in network.outputs)), number, replaced, made.pairs)


def _is_small(compared: Compared, step: Step) -> bool:
    return compared.count <= COMPARED and compared.count * math.prod(step.shape) <= MEMBERS


class _Pairs:
    """The steps of a network whose maxima are apart; equal differences are one step."""

    def __init__(self) -> None:
        self.steps, self.pairs = list[Step](), dict[int, tuple[int, int, int]]()
        self._known = dict[tuple[object, ...], int]()

    def compared(self, step: Step, compared: Compared, sources: Sequence[int], upper: float) -> int:
        """The result of a step that compares entries."""
        if compared.members is None:
            end = self._extreme(step, compared.sign, (sources[0], None), (sources[1], None))[0]
        else:
            members = compared.members()
            values = [(self._entries(step, sources[0], part), part[None]) for part in members]
            while compared.sign and len(values) > 1:
                paired = [self._extreme(step, compared.sign, a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
                values = paired + values[len(paired) * 2 :]
            end = values[0][0] if compared.sign else self._ordered(step, compared, [value for value, _ in values])
        if end > max(sources):
            self.steps[end] = replace(self.steps[end], shortcut=step.shortcut or Shortcut((upper,) * len(sources), tuple(sources)))
        return end

    def _ordered(self, step: Step, compared: Compared, values: list[int]) -> int:
        """All entries of each group in order, by a network of comparisons."""
        first, last = (1, -1) if compared.descending else (-1, 1)
        for i, j in comparisons(len(values)):
            a, b = (values[i], None), (values[j], None)
            values[i], values[j] = self._extreme(step, first, a, b)[0], self._extreme(step, last, a, b)[0]
        return self._step(step, Join(compared.axis), tuple(values), step.shape)

    def _entries(self, step: Step, source: int, numbers: Tensor) -> int:
        """The entries of a value that have these numbers."""
        shape, places = tuple(numbers.shape), numbers.reshape(-1)

        def copy(x: Tensor) -> Tensor:
            return x.reshape(-1)[places].reshape(shape)

        upper = rd.sqrt_up(float(places.bincount().max()))
        what = Lipschitz(upper, "entries that are compared", same_range=True, copy_entries=copy)
        return self._step(step, what, (source,), shape, places.numpy().tobytes())

    def _extreme(self, step: Step, sign: int, first: Side, second: Side) -> Side:
        """The larger or the smaller of two values, with the numbers of the entries that it is one of, where these are known."""
        (a, in_a), (b, in_b) = sorted((first, second), key=lambda side: side[0])
        if a == b:
            return first
        shape, joined, what, key = self.steps[a].shape, None, _excess(), b""
        if in_a is not None and in_b is not None:
            joined = torch.cat([in_a, in_b])
            small, great = ((x[:, None] == y[None]).any(1).all(0) for x, y in ((in_a, in_b), (in_b, in_a))[::sign])
            what, key = _excess(small, great), torch.stack([small, great]).numpy().tobytes()
        away = self._step(step, Linear(Scale(NEGATIVE)), (b,), shape)
        over = self._step(step, what, (self._step(step, Sum((1, 1)), (a, away), shape),), shape, key)
        end = (b, over) if sign > 0 else (a, self._step(step, Linear(Scale(NEGATIVE)), (over,), shape))
        number = self._step(step, Sum((1, 1)), end, shape)
        self.pairs[number] = sign, a, b
        return number, joined

    def _step(self, step: Step, what: What, sources: tuple[int, ...], shape: Shape, *key: object) -> int:
        """The number of such a step, which is written where there is none yet."""
        name = (type(what), sources, shape, *key)
        if name not in self._known:
            self._known[name] = len(self.steps)
            self.steps.append(Step(what, sources, shape, step.name, "compared", step.place))
        return self._known[name]


def comparisons(count: int) -> list[tuple[int, int]]:
    """Pairs of places that are compared, one after the other, until the entries at all of so many places are in order.

    Reference: Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M.
    """
    pairs, top = list[tuple[int, int]](), 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while d > 0:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            q, r, d = q // 2, p, q - p
        p //= 2
    return pairs


def _excess(never: Tensor | None = None, always: Tensor | None = None) -> Slope:
    """A ReLU of differences; some are never above 0, and of the others some never below."""
    low, high = (torch.zeros((), dtype=torch.bool) if given is None else given for given in (always, never))
    zero, same = high, low & ~high

    def within(a: Tensor, b: Tensor) -> OnInterval:
        above = torch.where(zero, False, same | (b > 0))
        least, most = (torch.where(same, end, torch.where(zero, 0.0, end.clamp_min(0.0))) for end in (a, b))
        return OnInterval((same | ((a >= 0) & above)).double(), above.double(), least, most)

    return Slope(
        0.0, 1.0, "the larger of two entries less the other", (0.0, INF), within=within, reach=lambda a, b: (max(a, 0.0), max(b, 0.0))
    )


# ---- activations and lines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A function f near c, entry by entry: `f(z) - f(c) = slope (z - c) + g` with g between `low` and `high`."""

    slope: Tensor
    low: Tensor
    high: Tensor


def line(what: Slope, low: Tensor, high: Tensor, middle: tuple[Tensor, Tensor]) -> Line | None:
    """The line with the slope of the chord, and how far the function is from it on [low, high]: theorem L2."""
    if what.within is None or not bool((low.isfinite() & high.isfinite()).all()):
        return None
    knots = _knots(low, high, CELLS)
    value = what.within(knots, knots)
    if value.least.shape != knots.shape:
        return None
    slope = _chord(value.most[0], value.most[-1], low, high)
    slope = torch.minimum(
        torch.maximum(slope, torch.as_tensor(what.low, dtype=torch.float64)), torch.as_tensor(what.high, dtype=torch.float64)
    )
    on = what.within(knots[:-1], knots[1:])
    falls, rises = (slope - on.low).clamp_min(0.0), (on.high - slope).clamp_min(0.0)  # how fast f - slope z falls and rises at most
    size = (value.least.abs() + value.most.abs()).amax(0)
    room = 2.0**-46 * (slope.abs() * torch.maximum(low.abs(), high.abs()) + size) + 64 * rd.TINY
    under, over = _between(value.least - slope * knots, value.most - slope * knots, falls, rises, knots)
    at, shift = what.within(*middle), torch.stack([slope * end for end in middle])
    base = at.least - shift.amax(0) - room, at.most - shift.amin(0) + room  # of f - slope z at the centre
    return Line(slope, round_down(under - room - base[1]), round_up(over + room - base[0]))


def _knots(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Points from low to high along a new first axis, 0 among them where it lies between: so many pieces on either side of it."""
    at_zero = torch.minimum(torch.maximum(torch.zeros_like(low), low), high)
    parts = torch.linspace(0, 1, cells + 1, dtype=torch.float64).reshape(-1, *(1,) * low.ndim)
    knots = torch.cat([low + (at_zero - low) * parts[:-1], at_zero + (high - at_zero) * parts]).clamp(low, high)
    knots[-1] = high
    return knots


def _chord(first: Tensor, last: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return ((last - first) / (high - low).clamp_min(rd.TINY)).nan_to_num(0.0, 0.0, 0.0)


def _between(least: Tensor, most: Tensor, falls: Tensor, rises: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest values of a function between knots from those at them and how fast it falls and rises."""
    width, lost = (falls + rises).clamp_min(rd.TINY), falls * rises * round_up(knots[1:] - knots[:-1])
    turns = falls * rises > 0
    dip = torch.where(turns, (least[:-1] * rises + least[1:] * falls - lost) / width, INF)
    peak = torch.where(turns, (most[:-1] * falls + most[1:] * rises + lost) / width, -INF)
    room = 2.0**-46 * ((lost / width).amax(0) + least.abs().amax(0) + most.abs().amax(0))
    return torch.minimum(least.amin(0), dip.amin(0)) - room, torch.maximum(most.amax(0), peak.amax(0)) + room


def drift(what: Slope, argument: Argument, rows: Tensor, stray: tuple[Tensor, Tensor], reach: Tensor) -> Drift | None:
    """The derivatives of an activation as linear functions of the input, where its argument is one up to `stray`: theorem L6.

    `rows @ (x - c)` is at most `reach` in modulus.
    """
    low, high = argument.low, argument.high
    if what.within is None or not bool((low.isfinite() & high.isfinite()).all()):
        return None
    knots = _knots(low, high, FINE)
    ends, on = what.within(torch.stack([low, high]), torch.stack([low, high])), what.within(knots[:-1], knots[1:])
    if on.low.shape != knots[1:].shape:
        return None
    bend = _chord(ends.low[0], ends.low[1], low, high)
    tilted = torch.stack([bend * knots[:-1], bend * knots[1:]])
    under, over = (on.low - tilted.amax(0)).amin(0), (on.high - tilted.amin(0)).amax(0)  # of f' - bend z
    moves = [bend * (end + far.reshape(low.shape)) for end in argument.middle for far in stray]
    under, over = (round_down(under + torch.stack(moves).amin(0)), round_up(over + torch.stack(moves).amax(0)))
    room = 2.0**-46 * (bend.abs() * torch.maximum(low.abs(), high.abs()) + under.abs() + over.abs()) + 64 * rd.TINY
    base, turned = (under + over) / 2, bend.reshape(-1, 1) * rows
    reach = bend.reshape(-1).abs() * reach * (1 + 2.0**-48)
    loose = round_up((over - under) / 2).reshape(-1) + room.reshape(-1) + 2.0**-48 * reach
    return (
        Drift(base, turned, reach, loose)
        if bool((loose < 0.35 * (torch.as_tensor(what.high, dtype=torch.float64) - what.low).reshape(-1)).any())
        else None
    )


# ---- values relaxed --------------------------------------------------------------------------------------------------------


class Relaxations:
    """The steps so far around the centre of a set, each as a linear function of what it reads, plus what it deviates from that."""

    def __init__(self, area: Region, budget: float) -> None:
        self._area, self._left = area, budget
        self._steps, self._actions = list[Step](), list[Action | None]()
        self._lines, self._linear = dict[int, Line](), dict[int, tuple[Tensor, tuple[Tensor, Tensor], Tensor]]()
        self._values, self._entries, self._work = list[Value](), 0, 0.0

    def add(self, step: Step, value: Value) -> Step:
        """One more step, with what is known of its value; the step with what lines know of its slopes."""
        i = len(self._steps)
        self._steps.append(step)
        self._values.append(value)
        self._entries += math.prod(step.shape)
        self._work += 2.0 * math.prod(step.shape) * (terms(step.what.op) if isinstance(step.what, Linear) else 1)
        what = step.what
        self._actions.append(action(self._steps, i))
        if isinstance(what, Slope) and isinstance(value.low, Tensor):
            source = self._values[step.sources[0]]
            if isinstance(source.low, Tensor) and source.middle is not None and tuple(source.low.shape) == step.shape:
                of_step = line(what, source.low, source.high, source.middle)
                if of_step is not None:
                    self._lines[i] = of_step
                what = replace(what, argument=Argument(source.low, source.high, source.middle))
                if (known := self._linear.pop(step.sources[0], None)) is not None and what.argument is not None:
                    what = replace(what, drift=drift(what, what.argument, *known))
                step = self._steps[i] = replace(step, what=what)
        return step

    def tighten(self, i: int, what: What) -> Value:
        """The value of step i, which a step is about to read, inside what lines say of it, where that pays and can be paid for."""
        value = self._values[i]
        if value.middle is None or not isinstance(value.low, Tensor) or isinstance(what, Linear | View | Sum | Join | Slice | Pad):
            return value
        open_ = torch.ones_like(value.low, dtype=torch.bool)
        if isinstance(what, Slope) and what.within is not None:
            on = what.within(value.low, value.high)
            open_ = (on.low < on.high).expand(value.low.shape)
        entries = open_.reshape(-1).nonzero()[:, 0]
        work = len(entries) * self._work
        if len(entries) == 0 or work > self._left or self._actions[i] is None:
            return value
        self._left -= work
        parts = [self._deviation(i, batch) for batch in entries.split(max(1, TOGETHER // self._entries))]
        under, over, *rest, rows, reach = (torch.cat(side) for side in zip(*parts, strict=True))
        if len(entries) == value.low.numel() and len(entries) * self._area.entries**2 <= THIRD:
            self._linear[i] = rows, (rest[0], rest[1]), reach
        low, high = value.low.reshape(-1).clone(), value.high.reshape(-1).clone()
        middle = [end.reshape(-1)[entries] for end in value.middle]
        low[entries] = torch.maximum(low[entries], round_down(middle[0] + under))
        high[entries] = torch.minimum(high[entries], round_up(middle[1] + over))
        ends = low.reshape(value.low.shape), high.reshape(value.low.shape)
        self._values[i] = replace(value, low=ends[0], high=ends[1], whole=whole_of(*ends, value.whole, self._steps[i].shape))
        return self._values[i]

    def _deviation(self, i: int, entries: Tensor) -> tuple[Tensor, ...]:
        """How far some entries (flat numbers) of a value are below and above those at the centre: theorem L3.

        The same without what is linear in the input, then the rows of that, and how much it is at most.
        """
        rows = torch.zeros(len(entries), math.prod(self._steps[i].shape), dtype=torch.float64)
        rows[torch.arange(len(entries)), entries] = 1.0
        rows = rows.reshape(-1, *self._steps[i].shape)
        by_step, gamma = {i: (rows, rows)}, rd.gamma(roundings(self._steps[: i + 1]))
        low, high = (torch.zeros(len(entries), dtype=torch.float64) for _ in range(2))
        inputs: list[tuple[int, Tensor, Tensor]] = []
        for j in range(i, -1, -1):
            if j not in by_step:
                continue
            rows, moduli = by_step.pop(j)
            if isinstance(self._steps[j].what, Input):
                inputs.append((j, as_rows(rows), as_rows(moduli)))
                continue
            under, over = self._through(j, rows, moduli, gamma, by_step)
            low, high = low + under, high + over
        ends, stray, rows = self._at_inputs(inputs, gamma, len(entries))
        low, high = low - stray - gamma * low.abs(), high + stray + gamma * high.abs()
        room = gamma * (low.abs() + high.abs() + ends[0].abs() + ends[1].abs())
        whole = round_down(low + ends[0] - room), round_up(high + ends[1] + room)
        return (*whole, low, high, rows, torch.maximum(-ends[0], ends[1]))

    def _through(
        self, j: int, rows: Tensor, moduli: Tensor, gamma: float, by_step: dict[int, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Rows handed on to what step j reads; what it may add to them below and above."""
        step, act, slopes = self._steps[j], self._actions[j], self._lines.get(j)
        if slopes is not None:
            handed = [(step.sources[0], rows * slopes.slope, moduli * slopes.slope.abs())]
            under, over = slopes.low, slopes.high
        elif act is not None:
            parts = [adjoint(self._steps, j, act, part, moduli=k > 0) for k, part in enumerate((rows, moduli))]
            handed = list(zip(act[0], *parts, strict=True))
            under = over = None
        else:
            under, over = self._apart(j)
            handed = []
        for s, centre, size in handed:
            before = by_step.get(s)
            by_step[s] = (centre, size) if before is None else (before[0] + centre, before[1] + size)
        flat = as_rows(rows)
        if under is None or over is None:
            error, zero = stray_of(self._steps, j), torch.zeros(len(rows), dtype=torch.float64)
            if error == 0.0:
                return zero, zero
            far = rd.hypot_up([self._distance(s) for s in step.sources])
            lost = (row_norms_up(flat) + gamma * row_norms_up(as_rows(moduli))) * rd.mul_up(error, far)
            return -lost, lost
        under, over = under.expand(step.shape).reshape(-1), over.expand(step.shape).reshape(-1)
        return _spanned(flat, as_rows(moduli) * gamma, under, over)

    def _apart(self, j: int) -> tuple[Tensor, Tensor]:
        """How far each entry of a value is from that at the centre, by its interval."""
        value, shape = self._values[j], self._steps[j].shape
        if value.middle is None or not isinstance(value.low, Tensor) or not isinstance(value.middle[0], Tensor):
            return torch.full(shape, -INF, dtype=torch.float64), torch.full(shape, INF, dtype=torch.float64)
        return round_down(value.low - value.middle[1]), round_up(value.high - value.middle[0])

    def _distance(self, j: int) -> float:
        under, over = self._apart(j)
        size = torch.maximum(under.abs(), over.abs()).reshape(1, -1)
        return min(self._values[j].far, float(row_norms_up(size)) if bool(size.isfinite().all()) else INF)

    def _at_inputs(
        self, inputs: list[tuple[int, Tensor, Tensor]], gamma: float, count: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """The sums of the rows over the inputs, by the box or the ball, whichever is less; the same for their errors; and the rows."""
        zero, by_input = torch.zeros(count, dtype=torch.float64), {j: (rows, moduli) for j, rows, moduli in inputs}
        low, high, stray, every, errors = zero, zero, zero, list[Tensor](), list[Tensor]()
        for j in (j for j, step in enumerate(self._steps) if isinstance(step.what, Input)):
            ends = [end.reshape(-1) for end in self._apart(j)]
            blank = torch.zeros(count, len(ends[0]), dtype=torch.float64)
            rows, moduli = by_input.get(j, (blank, blank))
            under, over = _spanned(rows, blank, *ends)
            low, high, stray = low + under, high + over, stray + torch.maximum(*_spanned(moduli * gamma, blank, *ends)[::-1])
            every, errors = [*every, rows], [*errors, moduli]
        rows = torch.cat(every, 1)
        if self._area.radius < INF:
            ball = round_up(row_norms_up(rows) * self._area.radius)
            low, high = torch.maximum(low, -ball), torch.minimum(high, ball)
            stray = torch.minimum(stray, round_up(gamma * row_norms_up(torch.cat(errors, 1)) * self._area.radius))
        return (low, high), stray, rows


def _spanned(rows: Tensor, error: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest products of rows, known up to an error, with vectors between `low` and `high`, before the rounding of sums."""
    known = low.isfinite() & high.isfinite()
    a, b = torch.where(known, low, 0.0), torch.where(known, high, 0.0)
    up, down = rows.clamp_min(0.0), rows.clamp_max(0.0)
    stray = error @ torch.maximum(a.abs(), b.abs())
    stray = stray + 2 * rd.gamma(float(rows.shape[1]) + 8.0) * (rows.abs() @ torch.maximum(a.abs(), b.abs())) + rows.shape[1] * 2.0**-1000
    if not bool(known.all()):
        stray = torch.where((rows[:, ~known] != 0).any(1) | (error[:, ~known] != 0).any(1), INF, stray)
    return up @ a + down @ b - stray, up @ b + down @ a + stray
