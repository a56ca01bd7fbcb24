"""Linear forms: each value of a segment as matrices acting on its anchors, in float64, with a bound of their rounding.

An anchor is the segment's input or a vector `u = D q` with `D` diagonal, entries in [0, 1], and `q` the form of an
earlier value. A map gives one matrix for each frequency (one matrix in all for `Entries`). docs/network.md#forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from gramlip.network.steps import Join, Linear, Network, Slice, Slope, Step, Sum, View
from gramlip.numerics import rounding as rd
from gramlip.operators.geometry import matrix_of
from gramlip.operators.linear_maps import Conv, Shape


def sizes_of(matrix: Tensor) -> Tensor:
    """Upper bounds of the norms of the matrices with their entries' moduli: Frobenius, or Schur's root of rows times columns."""
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
            blocks[a] = matrix @ block
            own = size_of(block)
            rounding = rd.mul_up(rd.gamma(8.0 * (block.shape[-2] + 4)), rd.mul_up(size, own))
            errors[a] = rd.add_up(rounding, rd.mul_up(size, self.errors[a]), rd.mul_up(error, rd.add_up(own, self.errors[a])))
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


@dataclass
class System:
    """A segment: anchor 0 is its input; anchor k > 0 is `D q[k]`; `output` is the value whose size is asked for.

    `channels[k]` gives, for each entry of anchor k, the number of its multiplier (entries that share one commute with shifts).
    `ratios[k]` is where a search for the multiplier starts, against the largest eigenvalue of the anchor's own block.
    """

    queries: list[Form | None]
    channels: list[Tensor]
    output: Form
    frequencies: int
    ratios: list[float]


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
    forms: list[Form] = [maps.identity(0)]
    queries: list[Form | None] = [None]
    channels, ratios = [maps.channels(0)], [1.0]

    def anchor(i: int, query: Form, ratio: float = 1.0) -> Form:
        queries.append(query)
        ratios.append(ratio)
        channels.append(maps.channels(i))
        new = maps.identity(i)
        return Form({len(queries) - 1: new.blocks[0]}, {len(queries) - 1: 0.0}, True)

    for i, step in enumerate(network.steps):
        if i == 0:
            continue
        what, source = step.what, forms[step.sources[0]]
        if isinstance(what, Linear):
            matrix, error, needs_clean, keeps = maps.linear(i, step, what)
            if needs_clean and not source.clean:
                source = anchor(step.sources[0], source)  # the crop between two layers is a diagonal of zeros and ones
                forms[step.sources[0]] = source
            forms.append(source.mapped(matrix, error, source.clean and keeps))
        elif isinstance(what, Slope):
            low, high = maps.slopes(what)
            rest = maps.factors(i, high) - maps.factors(i, low)
            # On a multiple of the identity the best multiplier for slopes [low, high] is high / (high - low) of it.
            best = float((maps.factors(i, high) / rest.clamp_min(1e-12)).max())
            u = anchor(i, source, min(max(best, 0.51), 1.0))
            value = u.scaled(rest) if bool((rest != 1).any()) else u
            shift = maps.factors(i, low)
            total = value + source.scaled(shift) if bool((shift != 0).any()) else value
            forms.append(Form(total.blocks, total.errors, True))  # D may be chosen so that the value vanishes outside
        elif isinstance(what, Sum):
            total = source
            for s in step.sources[1:]:
                total = total + forms[s]
            forms.append(total)
        elif isinstance(what, Join):
            forms.append(maps.joined(step, what.axis, [forms[s] for s in step.sources], list(step.sources)))
        elif isinstance(what, Slice):
            forms.append(maps.sliced(step, what, source, step.sources[0]))
        else:
            assert isinstance(what, View)
            forms.append(source)
    return System(queries, channels, forms[-1], maps.frequencies, ratios)


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
