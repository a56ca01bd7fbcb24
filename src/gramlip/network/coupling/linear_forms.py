"""Linear forms: each value of a segment as matrices acting on its anchors, in float64, with a bound of their rounding.

An anchor is the segment's input or a vector `v = D q` with `D` diagonal, entries within a radius of a centre, and `q` the form
of an earlier value. A map gives one matrix for each frequency (one matrix in all for `Entries`). docs/network.md#forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gramlip.network.steps import Join, Linear, Network, Slice, Slope, Step, Sum, View
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.linear_maps import Conv, Dense, Shape, matrix_of


def sizes_of(matrix: Tensor) -> Tensor:
    """Upper bounds of the norms of the matrices with their entries' moduli: Frobenius, or Schur's root of rows times columns.

    Of complex matrices, which there are many of, Frobenius alone: moduli would take longer than a factorisation.
    """
    if not matrix.numel():
        return torch.zeros(len(matrix), dtype=torch.float64)
    if matrix.is_complex():
        parts = torch.view_as_real(matrix.resolve_conj())
        return torch.linalg.vector_norm(parts, dim=(-3, -2, -1)) * (1.0 + rd.gamma(2.0 * matrix.shape[-1] * matrix.shape[-2] + 16.0))
    moduli = matrix.abs()
    schur = (moduli.sum(-1).amax(-1) * moduli.sum(-2).amax(-1)).sqrt()
    terms = float(matrix.shape[-1] * matrix.shape[-2])
    return torch.minimum(torch.linalg.vector_norm(moduli, dim=(-2, -1)), schur) * (1.0 + rd.gamma(terms + 16.0))


def size_of(matrix: Tensor) -> float:
    """The largest of `sizes_of`."""
    return float(sizes_of(matrix).max())


@dataclass(frozen=True)
class Form:
    """A value as the sum of `blocks[a] @ anchor a`; each block (F, m, n) is right up to `errors[a]` in norm.

    `clean` where the value is zero outside its true extent (the circulant carries more than the layer has).
    """

    blocks: dict[int, Tensor]
    errors: dict[int, float]
    clean: bool

    def mapped(self, matrix: Tensor, error: float, clean: bool) -> Form:
        """The form after a linear map known up to `error`."""
        size, blocks, errors = size_of(matrix), dict[int, Tensor](), dict[int, float]()
        for a, block in self.blocks.items():
            if self.errors[a] == 0.0 and is_identity(block):  # nothing to multiply, nothing to round
                blocks[a], errors[a] = matrix, error
                continue
            blocks[a] = matrix @ block
            moduli = size_of(block)
            rounding = rd.mul_up(rd.gamma(8.0 * (block.shape[-2] + 4)), rd.mul_up(size, moduli))
            errors[a] = rd.add_up(rounding, rd.mul_up(size, self.errors[a]), rd.mul_up(error, rd.add_up(moduli, self.errors[a])))
        return Form(blocks, errors, clean)

    def scaled(self, factors: Tensor) -> Form:
        """The form with its rows multiplied by constants."""
        top = float(factors.abs().max())
        blocks = {a: factors[:, None] * b for a, b in self.blocks.items()}
        errors = {
            a: rd.add_up(rd.mul_up(top, e), rd.mul_up(rd.gamma(4), rd.mul_up(top, size_of(self.blocks[a])))) for a, e in self.errors.items()
        }
        return Form(blocks, errors, self.clean)

    def __add__(self, other: Form) -> Form:
        blocks, errors = dict(self.blocks), dict(self.errors)
        for a, block in other.blocks.items():
            if a not in blocks:
                blocks[a], errors[a] = block, other.errors[a]
                continue
            rounding = rd.mul_up(rd.gamma(2), rd.add_up(size_of(blocks[a]), size_of(block)))
            errors[a] = rd.add_up(errors[a], other.errors[a], rounding)
            blocks[a] = blocks[a] + block
        return Form(blocks, errors, self.clean and other.clean)


def is_identity(block: Tensor) -> bool:
    """Whether a block is the identity at every frequency."""
    n = block.shape[-1]
    return block.shape == (1, n, n) and int(block.count_nonzero()) == n and bool((block.diagonal(dim1=-2, dim2=-1) == 1).all())


@dataclass(frozen=True)
class Slopes:
    """Of each entry of an anchor: its slope is within `radius` of `centre`; the radius is 0 where the entry is linear."""

    centre: Tensor
    radius: Tensor

    @staticmethod
    def between(low: Tensor, high: Tensor) -> Slopes:
        """The slopes in [low, high], the radius rounded upward; exactly 0 where both are the same."""
        centre = 0.5 * (low + high)
        radius = torch.maximum(high - centre, centre - low)
        above = torch.nextafter(radius, torch.full_like(radius, math.inf)).clamp_min(rd.TINY)
        return Slopes(centre, torch.where(low == high, 0.0, above))

    @cached_property
    def on(self) -> Tensor:
        """The entries that are not linear."""
        return (self.radius > 0).nonzero()[:, 0]

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Ratios k and multiples c with `v = c q + R z` for `z = w + k q`: c is 0, v reads z alone, but for steep or linear entries."""
        steep = self.centre.abs() > STEEP * self.radius
        return torch.where(steep, 0.0, self.centre / self.radius), torch.where(steep, self.centre, 0.0)


STEEP = 8.0  # centres of at most so many radii: larger ones would cancel digits


@dataclass(frozen=True)
class Anchor:
    """An anchor's `radius` and `ratio` (n,) of centre to radius, its query as `rows` (F or 1, n, m) of the anchors that are left.

    `at` are the columns of those among them that the form had before.
    """

    radius: Tensor
    ratio: Tensor
    rows: Tensor
    at: Tensor

    @staticmethod
    def fits(centre: Tensor, radius: Tensor) -> bool:
        """Whether no entry is linear, or nearly so."""
        return bool((centre.abs() <= STEEP * radius).all() and (radius > 0).all())

    @property
    def before(self) -> int:
        """Number of columns of the form before those of the anchor."""
        return len(self.at)

    def inner(self, matrix: Tensor, weights: Tensor) -> Tensor:
        """S = L - R H_vv R."""
        block = matrix[:, self.before :, self.before :]
        inner = -(self.radius[:, None] * block * self.radius)
        inner.diagonal(dim1=-2, dim2=-1).add_(weights)
        return inner

    def right(self, matrix: Tensor, weights: Tensor) -> Tensor:
        """D = R H_vr + L K A."""
        right = (self.ratio * weights)[:, None] * self.rows
        if self.before:
            right = right.expand(len(matrix), -1, -1).clone()
            right[:, :, self.at] += self.radius[:, None] * matrix[:, self.before :, : self.before]
        return right

    def rest(self, weights: Tensor) -> Tensor:
        """L (1 - K^2)."""
        return weights * (1.0 - self.ratio) * (1.0 + self.ratio)

    def whole(self, matrix: Tensor, gram: Tensor) -> Tensor:
        """`H_rr` added to what is left of the rest, in its place."""
        if self.before:
            gram[:, self.at[:, None], self.at] += matrix[:, : self.before, : self.before]
        return gram


@dataclass
class System:
    """A segment: anchor 0 is its input; anchor k > 0 is `D q[k]` with `slopes[k]`; `output` is the value whose size is asked for.

    `channels[k]` gives, for each entry of anchor k, the number of its multiplier (entries that share one commute with shifts).
    """

    queries: list[Form | None]
    channels: list[Tensor]
    output: Form
    frequencies: int
    slopes: list[Slopes]
    anchors: dict[int, tuple[Anchor, float]] = field(default_factory=dict[int, tuple[Anchor, float]], init=False, repr=False)


class Maps(Protocol):
    """How steps become matrices: `Entries` for small values, `Circulant` for convolutions."""

    frequencies: int

    def identity(self, i: int) -> Form:
        """The value itself as an anchor: the identity."""
        ...

    def channels(self, i: int) -> Tensor:
        """For each row of the value's forms, the number of its multiplier."""
        ...

    def linear(self, i: int, step: Step, what: Linear) -> tuple[Tensor, float, bool, bool]:
        """Matrix, its error, whether it reads outside the value's extent, and whether zeros outside stay zeros."""
        ...

    def factors(self, i: int, value: Tensor | float) -> Tensor:
        """Constants as one factor for each row of the value's forms."""
        ...

    def slopes(self, what: Slope) -> tuple[Tensor | float, Tensor | float]:
        """The slopes that the forms may use."""
        ...

    def joined(self, step: Step, axis: int, parts: list[Form], sources: list[int]) -> Form:
        """The form of a concatenation."""
        ...

    def sliced(self, step: Step, what: Slice, part: Form, source: int) -> Form:
        """The form of a slice."""
        ...


def system(network: Network, maps: Maps) -> System:
    """The forms of a segment whose first step is its input and whose last is its output."""
    builder = SystemBuilder(maps)
    for i, step in enumerate(network.steps[1:], start=1):
        builder.add(i, step)
    return builder.built()


class SystemBuilder:
    """The forms of the values so far, one for each step, and the anchors that they act on."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self._forms: list[Form] = [maps.identity(0)]
        self._queries: list[Form | None] = [None]
        self._channels = [maps.channels(0)]
        self._slopes = [Slopes.between(*(torch.ones(len(self._channels[0]), dtype=torch.float64),) * 2)]

    def built(self) -> System:
        """The system whose output is the last value."""
        return System(self._queries, self._channels, self._forms[-1], self._maps.frequencies, self._slopes)

    def add(self, i: int, step: Step) -> None:
        """The form of the value of step i."""
        what, sources = step.what, [self._forms[s] for s in step.sources]
        if isinstance(what, Linear):
            form = self._linear(i, step, what)
        elif isinstance(what, Slope):
            form = self._activation(i, sources[0], what)
        elif isinstance(what, Sum):
            form = sum(sources[1:], start=sources[0])
        elif isinstance(what, Join):
            form = self._maps.joined(step, what.axis, sources, list(step.sources))
        elif isinstance(what, Slice):
            form = self._maps.sliced(step, what, sources[0], step.sources[0])
        else:
            assert isinstance(what, View)
            form = sources[0]
        self._forms.append(form)

    def _anchor(self, i: int, query: Form, slopes: Slopes) -> Form:
        """A new anchor `v = D q` for value i: its form is the identity on it."""
        self._queries.append(query)
        self._slopes.append(slopes)
        self._channels.append(self._maps.channels(i))
        number = len(self._queries) - 1
        return Form({number: self._maps.identity(i).blocks[0]}, {number: 0.0}, True)

    def _linear(self, i: int, step: Step, what: Linear) -> Form:
        matrix, error, needs_clean, keeps = self._maps.linear(i, step, what)
        at = step.sources[0]
        if needs_clean and not self._forms[at].clean:
            crop = [self._maps.factors(at, end) for end in (0.0, 1.0)]  # between two layers: a diagonal of zeros and ones
            self._forms[at] = self._anchor(at, self._forms[at], Slopes.between(crop[0], crop[1]))
        source = self._forms[at]
        return source.mapped(matrix, error, source.clean and keeps)

    def _activation(self, i: int, source: Form, what: Slope) -> Form:
        """The anchor itself, or the source times the slopes where all of them are known."""
        low, high = (self._maps.factors(i, end) for end in self._maps.slopes(what))
        slopes = Slopes.between(low, high)
        if len(slopes.on) == 0:
            return source.scaled(slopes.centre)
        return self._anchor(i, source, slopes)  # D may be chosen so that the value vanishes outside


def block_of(m: int, n: int, rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix (1, m, n) of zeros with ones at the given places."""
    matrix = torch.zeros(1, m, n, dtype=torch.float64)
    matrix[0, rows, columns] = 1.0
    return matrix


@dataclass
class Entries:
    """Every entry for itself: a value of n entries has forms of n rows, each with its own multiplier."""

    shapes: list[Shape]
    frequencies: int = 1

    def identity(self, i: int) -> Form:
        """The value itself as an anchor: the identity."""
        return Form({0: torch.eye(math.prod(self.shapes[i]), dtype=torch.float64)[None]}, {0: 0.0}, True)

    def channels(self, i: int) -> Tensor:
        """For each row of the value's forms, the number of its multiplier."""
        return torch.arange(math.prod(self.shapes[i]))

    def linear(self, i: int, step: Step, what: Linear) -> tuple[Tensor, float, bool, bool]:
        """Matrix, its error, whether it reads outside the value's extent, and whether zeros outside stay zeros."""
        op, shape, error = what.op, self.shapes[step.sources[0]], 0.0
        if isinstance(op, Dense) and math.prod(shape) == shape[-1]:
            return to_float64(op.weight.detach())[None], what.error, False, True
        if isinstance(op, Conv):  # entries in which taps meet may cancel: docs/rounding.md#r8-the-matrix-of-a-layer
            moduli = matrix_of(replace(op, weight=op.weight.detach().abs()), shape)
            error = rd.mul_up(rd.gamma(8.0 * (math.prod(op.weight.shape[2:]) + 8)), size_of(moduli[None]))
        return matrix_of(op, shape)[None], rd.add_up(what.error, error), False, True

    def factors(self, i: int, value: Tensor | float) -> Tensor:
        """Constants as one factor for each row of the value's forms."""
        return torch.as_tensor(value, dtype=torch.float64).expand(self.shapes[i]).reshape(-1)

    def slopes(self, what: Slope) -> tuple[Tensor | float, Tensor | float]:
        """The slopes that the forms may use."""
        return what.low, what.high

    def joined(self, step: Step, axis: int, parts: list[Form], sources: list[int]) -> Form:
        """The form of a concatenation."""
        places = torch.arange(math.prod(step.shape)).reshape(step.shape)
        pieces = places.split([self.shapes[s][axis] for s in sources], axis)
        total: Form | None = None
        for piece, part in zip(pieces, parts, strict=True):
            at = block_of(places.numel(), piece.numel(), piece.reshape(-1), torch.arange(piece.numel()))
            put = part.mapped(at, 0.0, True)
            total = put if total is None else total + put
        assert total is not None
        return total

    def sliced(self, step: Step, what: Slice, part: Form, source: int) -> Form:
        """The form of a slice."""
        places = torch.arange(math.prod(self.shapes[source])).reshape(self.shapes[source])
        kept = places[(slice(None),) * what.axis + (slice(what.start, what.stop, what.step),)].reshape(-1)
        return part.mapped(block_of(kept.numel(), places.numel(), torch.arange(kept.numel()), kept), 0.0, True)
