"""Steps: what each call of a network does to a difference of two inputs. Frozen data; nothing is bounded here.

A network is a list of steps; each reads earlier ones by number. A rule (`gramlip.rules`) writes them, folding rewrites
them, composition and coupling read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.numerics.rounding import frobenius_up, row_norms_up
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape, apply

RowLayout = Literal["", "rows", "columns"]
CopyEntries = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Input:
    """One of the network's inputs."""


Op = Conv | Dense | Scale


def rough_norm(op: Op) -> float:
    """A quick upper bound of the norm: Frobenius norms of the taps, times the root of the padding's repeats."""
    if isinstance(op, Scale):
        return float(op.weight.abs().max())
    weight = to_float64(op.weight)
    if isinstance(op, Dense):
        return frobenius_up(weight)
    taps = row_norms_up(weight.flatten(2).flatten(0, 1).mT)
    repeats = math.prod(1 + lo + hi for lo, hi in op.pads) if op.padding_mode != "zeros" else 1
    return rd.mul_up(rd.mul_up(float(taps.sum()), 1.0 + rd.gamma(len(taps) + 2.0)), rd.sqrt_up(float(repeats)))


def terms(op: Op) -> int:
    """Products that are added up in one entry of the result, at most."""
    if isinstance(op, Scale):
        return 1
    return op.weight.shape[1] if isinstance(op, Dense) else max(op.weight[0].numel(), op.weight[:, 0].numel())


@dataclass(frozen=True, eq=False)
class Pad:
    """Padding of the trailing spatial axes by `pairs` (before, after), a `torch.nn` padding mode."""

    pairs: tuple[tuple[int, int], ...]
    mode: str
    value: float = 0.0

    def repeats(self, shape: Shape) -> int:
        """The largest number of copies of one entry of a value of `shape` in the padded one; the norm of the padding is its root."""
        return math.prod(_repeats(n, pair, self.mode) for n, pair in zip(shape[2:], self.pairs, strict=True))


def _repeats(size: int, pair: tuple[int, int], mode: str) -> int:
    if mode == "zeros":
        return int(size + min(pair[0], 0) + min(pair[1], 0) > 0)  # 0 where a crop leaves no entry
    index = torch.nn.functional.pad(torch.arange(size, dtype=torch.float64).reshape(1, 1, -1), pair, mode=mode)
    return int(torch.bincount(index.reshape(-1).long()).max())


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear map and a constant: `op`, up to an error of norm at most `error`, plus `bias`, up to `bias_error` in each entry.

    A `Conv` acts on (batch, channels, *space), a `Dense` on the last axis, a `Scale` entry by entry. `bias` is broadcast to
    the value's shape; only ranges read it. `known` is the norm where a rule knows it, `copy_entries` as in `View`.

    Whatever changes a map goes through `after`, `after_padding` or `plus`, which carry `error` along (docs/network.md#folding), and
    the constant where they are asked to; where they are not, its error becomes infinite, and with it the range.

    Raises:
        InputError: an error that is negative or NaN.
    """

    op: Op
    error: float = 0.0
    bias: Tensor | float = 0.0
    known: Bound | None = None
    bias_error: float = 0.0
    copy_entries: CopyEntries | None = None

    def __post_init__(self) -> None:
        for name, value in (("error", self.error), ("bias_error", self.bias_error)):
            if not value >= 0.0:
                msg = f"{name}={value!r} was given for a linear step; expected an upper bound of an error, at least 0"
                raise InputError(msg)

    @property
    def constant(self) -> bool:
        """Whether anything is added to the linear map."""
        return self.bias_error > 0.0 or bool(torch.as_tensor(self.bias).count_nonzero())

    def after(self, inner: Linear, op: Op, roundings: float, shape: Shape | None = None) -> Linear:
        """This map after another: `op` is their product, each entry of it computed with at most so many roundings.

        `shape` is that of the value between them where the constant is wanted.
        """
        a, b = rough_norm(self.op), rough_norm(inner.op)
        error = rd.add_up(
            _underflow(op, roundings) if a and b else 0.0,
            rd.mul_up(a, inner.error),
            rd.mul_up(self.error, rd.add_up(b, inner.error)),
            rd.mul_up(rd.gamma(roundings), rd.mul_up(a, b)),
        )
        if shape is None:
            return _unknown(op, error, self.constant or inner.constant)
        if not inner.constant:
            return Linear(op, error, self.bias, bias_error=self.bias_error)
        between = torch.as_tensor(inner.bias, dtype=torch.float64).expand(shape)
        return _known(op, error, *self._image(between, inner.bias_error))

    def after_padding(self, pad: Pad, shape: Shape, op: Op, biases: bool = False) -> Linear:
        """This map after a padding of values of `shape`, together exactly `op` plus a constant, which `biases` asks for."""
        error = rd.mul_up(self.error, rd.sqrt_up(float(pad.repeats(shape))))
        if not biases:
            return _unknown(op, error, self.constant or bool(pad.value))
        if not pad.value:
            return Linear(op, error, self.bias, bias_error=self.bias_error)
        pads = [p for pair in reversed(pad.pairs) for p in pair]
        padded = torch.nn.functional.pad(torch.zeros(shape, dtype=torch.float64), pads, value=pad.value)
        return _known(op, error, *self._image(padded, 0.0))

    def _image(self, given: Tensor, stray: float) -> tuple[Tensor, float]:
        """The image of a constant that is known up to `stray` in each entry, and the error of its entries."""
        count, own = terms(self.op) + 8.0, torch.as_tensor(self.bias, dtype=torch.float64)
        moduli = replace(self.op, weight=to_float64(self.op.weight).abs())
        size = float(apply(moduli, given.abs()).max()) + float(own.abs().max())
        grown = rd.mul_up(float(apply(moduli, torch.ones_like(given)).max()) * (1.0 + rd.gamma(8.0 * count)), stray)
        lost = rd.add_up(self.bias_error, grown, rd.mul_up(rd.gamma(8.0 * count), size), count * rd.TINY)
        return apply(self.op, given) + own, rd.add_up(lost, rd.mul_up(self.error, frobenius_up(given)))

    def plus(self, other: Linear, op: Op, biases: bool = False) -> Linear:
        """The sum of two maps of one value: `op`, each entry of it computed with one rounding; `biases` asks for the constant."""
        rounding = rd.mul_up(rd.gamma(2), rd.add_up(rough_norm(self.op), rough_norm(other.op)))
        error = rd.add_up(self.error, other.error, rounding, _underflow(op, 1.0) if rounding else 0.0)
        if not biases:
            return _unknown(op, error, self.constant or other.constant)
        one, two = (torch.as_tensor(m.bias, dtype=torch.float64) for m in (self, other))
        size = float(one.abs().max()) + float(two.abs().max())
        return _known(op, error, one + two, rd.add_up(self.bias_error, other.bias_error, rd.mul_up(rd.gamma(8.0), size)))


def _unknown(op: Op, error: float, constant: bool) -> Linear:
    """A folded map whose constant, where there is one, is not worked out."""
    return Linear(op, error, bias_error=math.inf if constant else 0.0)


def _known(op: Op, error: float, bias: Tensor, stray: float) -> Linear:
    """A folded map and its constant, known up to `stray`, unless that overflows or is no number."""
    sure = stray < math.inf and bool(bias.isfinite().all())
    return Linear(op, error, bias, bias_error=stray) if sure else _unknown(op, error, True)


def _underflow(op: Op, roundings: float) -> float:
    """The norm of what is lost where every term of every entry is flushed to zero."""
    return rough_norm(replace(op, weight=torch.full_like(op.weight, roundings * rd.TINY, dtype=torch.float64)))


class OnInterval(NamedTuple):
    """An entrywise function on an interval of each entry: all its slopes are in [low, high], all its values in [least, most]."""

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor


Within = Callable[[Tensor, Tensor], OnInterval]


@dataclass(frozen=True, eq=False)
class Drift:
    """How the derivatives of an entrywise function move with the network's input x in a set around c, entry by entry.

    They are `base + rows @ (x - c)` up to `loose`, with `rows @ (x - c)` at most `reach` in modulus.
    """

    base: Tensor
    rows: Tensor
    reach: Tensor
    loose: Tensor


@dataclass(frozen=True, eq=False)
class Argument:
    """What an activation reads, where the network's input is in a set: an interval for each entry, and for each entry at its centre."""

    low: Tensor
    high: Tensor
    middle: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Slope:
    """An entrywise function whose slopes lie in [low, high]; tensors where channels differ, broadcast to the shape.

    `image` is an interval that all its values lie in, `at_zero` an interval that its value at 0 lies in; `reach` gives an
    interval for its values from one for its arguments, `within` slopes and values from an interval for each argument. Where
    the network's input is in a set, `argument` says what is read, and `drift` how the derivatives move with the input.
    `sharp` says that no smaller interval holds all slopes (up to 2**-40 of it): only then is its constant known from below too.
    """

    low: float | Tensor
    high: float | Tensor
    because: str
    image: tuple[float, float] = (float("-inf"), float("inf"))
    at_zero: tuple[float, float] = (0.0, 0.0)
    reach: Callable[[float, float], tuple[float, float]] | None = None
    sharp: bool = False
    within: Within | None = None
    drift: Drift | None = None
    argument: Argument | None = None


@dataclass(frozen=True, eq=False)
class LinearAction:
    """A map that is linear in its sources joined: `run` applies it in float64, to tensors of their shapes.

    `moduli` is at least the norm of the matrix of the moduli of its entries; `error` at least that of what `run` differs by from the real
    map, beside the rounding of its sums. `averages` where no entry is negative and nothing is added: means, sums, pooling.
    """

    run: Callable[..., Tensor]
    moduli: float
    error: float = 0.0
    averages: bool = False


@dataclass(frozen=True, eq=False)
class Compared:
    """Groups of `count` entries that are compared: the result holds the largest (1) or the least (-1) of each, or (0) all in order.

    `members` gives the numbers of the entries in the flat source, (count, *shape of the result); a group may name an entry twice. It is
    None for the entries of two sources, pair by pair. Entries in order lie along `axis` of the result, which has one place for each
    group in `members`; the largest comes first where they are `descending`.
    """

    sign: int
    count: int
    members: Callable[[], Tensor] | None = None
    axis: int = 0
    descending: bool = False


@dataclass(frozen=True, eq=False)
class Lipschitz:
    """Any map with Lipschitz constant at most `upper` in all its sources together (l2 norm of the joined differences).

    `image` and `reach` as in `Slope`; `same_range` where each entry of the result is `times` an entry of the sources, of
    `others`, or between; `row` is at least the l2 norm of the result's rows along the last axis; `row_layout` and
    `copy_entries` as in `View`; `linear` where the map is linear up to a constant.
    `extremum` is 1 for the largest and -1 for the least entries of groups of two or more, and says along which axes they lie.
    `within` gives the constant and the values from an interval for each entry of the one source; `monotone`, exactly the map
    itself, where it rises in every entry of its sources; `compared` says which entries a map compares.
    """

    upper: float
    because: str
    image: tuple[float, float] = (float("-inf"), float("inf"))
    reach: Callable[[float, float], tuple[float, float]] | None = None
    same_range: bool = False
    others: tuple[float, float] | None = None
    times: float = 1.0
    assumed: bool = False
    row: float = float("inf")
    row_layout: RowLayout = ""
    copy_entries: CopyEntries | None = None
    extremum: tuple[int, tuple[int, ...]] | None = None
    linear: LinearAction | None = None
    within: Callable[[Tensor, Tensor], tuple[float, Tensor, Tensor]] | None = None
    monotone: Callable[..., Any] | None = None
    compared: Compared | None = None


@dataclass(frozen=True, eq=False)
class View:
    """A rearrangement of all entries: an isometry; `flat` where their order stays the same and only the shape changes.

    `row_layout` says which lines of the result, its rows along the last axis or its columns along the one before, are rows of
    the source or parts of such. `copy_entries`, where a step only copies entries, does the same to a tensor of their numbers.
    """

    flat: bool = False
    row_layout: RowLayout = ""
    copy_entries: CopyEntries | None = None


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of the sources, each at most `repeats` times repeated by broadcasting (1 where shapes agree)."""

    repeats: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Join:
    """Concatenation of the sources along `axis`."""

    axis: int


@dataclass(frozen=True, eq=False)
class Slice:
    """Entries start, start + step, ... < stop of `axis`; `copy_entries` as in `View`."""

    axis: int
    start: int
    stop: int
    step: int = 1
    copy_entries: CopyEntries | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """A bilinear map of two sources: entry by entry, or the matrix product over the last two axes.

    `scale` is at least the modulus of a constant factor. `caps` are upper bounds of the size of the factors (largest entry,
    or norm as matrices) where intervals know them: without them there is no finite constant.
    """

    kind: Literal["entries", "matrix"]
    scale: float = 1.0
    caps: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """`softmax(scale Q K' + constants) V` of the sources Q, K, V over their last two axes; K as it is, or already transposed.

    `rows` are upper bounds of the l2 norms of the rows of Q, K and V where intervals know them: without them there is no
    finite constant. `empty` where the constants may forbid a query every key: its row of the result is zero.
    """

    scale: float
    transposed: bool = False
    rows: tuple[float, float, float] | None = None
    empty: bool = False


@dataclass(frozen=True, eq=False)
class Unbounded:
    """A map without a finite Lipschitz constant, and why.

    `within` gives the slopes of an entrywise function on an interval, None where they have no finite bound there.
    """

    reason: str
    within: Callable[[float, float], Slope | None] | None = None


What = Input | Linear | Pad | Slope | Lipschitz | View | Sum | Join | Slice | Product | Attention | Unbounded


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A known bound of a value v beside its step, and the reason: `|d v|^2 <= sum_k (factors[k] |d s_k|)^2` for earlier values s_k.

    `within` gives, for each of these, the factor from an interval for each entry of s_k, or is None.
    """

    factors: tuple[float, ...]
    sources: tuple[int, ...]
    because: str = ""
    within: tuple[Callable[[Tensor, Tensor], float] | None, ...] = ()

    def on(self, intervals: Sequence[tuple[Tensor, Tensor]]) -> Shortcut:
        """The same with the factors that hold on intervals of the sources."""
        found = [f if on is None else min(f, on(*ends)) for f, on, ends in zip(self.factors, self.within, intervals, strict=True)]
        return replace(self, factors=tuple(found))


@dataclass(frozen=True, eq=False)
class Step:
    """One step: what it is, the numbers of the steps it reads, the result's shape, the layer's name and its place in the source.

    A `shortcut` is about the value, so it stays true where the step is rewritten.
    """

    what: What
    sources: tuple[int, ...]
    shape: Shape
    name: str
    op: str
    place: str = ""
    shortcut: Shortcut | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """The steps that it or its shortcut reads."""
        return self.sources if self.shortcut is None else self.sources + self.shortcut.sources

    def moved(self, number: Callable[[int], int]) -> Step:
        """The step where the others have new numbers."""
        short = self.shortcut
        if short is not None:
            short = replace(short, sources=tuple(map(number, short.sources)))
        return replace(self, sources=tuple(map(number, self.sources)), shortcut=short)


@dataclass
class Network:
    """The steps in order; `outputs` are the numbers of the results."""

    steps: list[Step]
    outputs: tuple[int, ...]

    def users(self) -> list[list[int]]:
        """For each step the numbers of the steps that read it."""
        read: list[list[int]] = [[] for _ in self.steps]
        for i, step in enumerate(self.steps):
            for source in step.reads:
                read[source].append(i)
        return read

    def tuples(self) -> set[int]:
        """Numbers of the steps whose value is several tensors, of which later steps take one each."""
        return {source for step in self.steps if step.op == "getitem" for source in step.sources}


def numbering(steps: Sequence[Step | None], outputs: Sequence[int], moved: Mapping[int, int]) -> dict[int, int]:
    """New numbers of the inputs and of what these outputs depend on; `moved` maps a dropped step to the one that stands for it."""
    alive, stack = set[int](), [_final(i, moved) for i in outputs]
    while stack:
        i = stack.pop()
        if i in alive:
            continue
        alive.add(i)
        step = steps[i]
        assert step is not None
        stack += [_final(s, moved) for s in step.reads]
    kept = [i for i, step in enumerate(steps) if step is not None and (i in alive or isinstance(step.what, Input))]
    return {old: new for new, old in enumerate(kept)}


def _final(i: int, moved: Mapping[int, int]) -> int:
    while i in moved:
        i = moved[i]
    return i


def renumbered(steps: Sequence[Step | None], outputs: Sequence[int], moved: Mapping[int, int]) -> Network:
    """The network without the steps that are None or unread; `moved` maps a dropped step to the one that stands for it."""
    number = numbering(steps, outputs, moved)
    fresh: list[Step] = []
    for i in number:
        step = steps[i]
        assert step is not None
        fresh.append(step.moved(lambda s: number[_final(s, moved)]))
    return Network(fresh, tuple(number[_final(i, moved)] for i in outputs))


def selected(network: Network, inputs: Tensor | None, outputs: Tensor | None) -> Network:
    """The network from some entries of its inputs, joined and flat, to some of its results: those that are True; None is all."""
    steps, number = list[Step](), dict[int, int]()
    for i, step in enumerate(network.steps):
        steps.append(step.moved(number.__getitem__))
        number[i] = len(steps) - 1
        if inputs is not None and isinstance(step.what, Input):
            kept, inputs = inputs.tensor_split([math.prod(step.shape)])
            steps.append(_kept(len(steps) - 1, step, kept, "inputs"))
            number[i] = len(steps) - 1
    ends = [number[i] for i in network.outputs]
    for j, i in enumerate(network.outputs if outputs is not None else ()):
        assert outputs is not None
        kept, outputs = outputs.tensor_split([math.prod(network.steps[i].shape)])
        steps.append(_kept(ends[j], network.steps[i], kept, "outputs"))
        ends[j] = len(steps) - 1
    return Network(steps, tuple(ends))


def _kept(source: int, step: Step, kept: Tensor, name: str) -> Step:
    """The entries of a value that are kept, and zero for the others."""
    what = Linear(Scale(kept.double().reshape(step.shape)))
    return Step(what, (source,), step.shape, name, f"the {name} chosen")
