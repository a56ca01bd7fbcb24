"""Convolutions on a common torus: one matrix for each frequency of the coarsest grid. docs/network.md#circulant-forms.

A value of level r has r^d phases on that grid: entry r m + j of an axis is phase j at m. Strides divide the level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gramlip.network.coupling.linear_forms import Form, block_of, sizes_of
from gramlip.network.steps import Join, Linear, Network, Slice, Slope, Step, Sum
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.linear_maps import Conv, Scale

Level = tuple[Fraction, ...]


class NotCirculantError(Exception):
    """The segment has a step that does not commute with shifts."""


@dataclass
class Circulant:
    """Maps of a segment on the torus of `points` coarse points an axis; `levels[i]` are the phases of value i on each axis."""

    shapes: list[tuple[int, ...]]
    levels: list[tuple[int, ...]]
    points: tuple[int, ...]

    def __post_init__(self) -> None:
        grid = torch.cartesian_prod(*(torch.arange(n) for n in self.points)).reshape(-1, len(self.points))
        self.kept = (self._flat(-grid) >= torch.arange(len(grid))).nonzero()[:, 0]  # real kernels: the other frequencies are conjugate
        self.grid = grid[self.kept]
        self.frequencies = len(self.grid)

    def _flat(self, frequencies: Tensor) -> Tensor:
        weights = torch.tensor([math.prod(self.points[j + 1 :]) for j in range(len(self.points))])
        return (frequencies % torch.tensor(self.points) * weights).sum(1)

    def find(self, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """For each frequency (n, d) its place in `grid`, and whether it is the mirrored one that stands there."""
        flat, mirrored = self._flat(frequencies), self._flat(-frequencies)
        least = torch.minimum(flat, mirrored)
        return torch.searchsorted(self.kept, least), flat != least

    def rows(self, i: int) -> int:
        """Rows of the forms of value i."""
        return self.shapes[i][1] * math.prod(self.levels[i])

    def identity(self, i: int) -> Form:
        """The value itself as an anchor: the identity."""
        return Form({0: torch.eye(self.rows(i), dtype=torch.complex128)[None]}, {0: 0.0}, True)

    def channels(self, i: int) -> Tensor:
        """For each row of the value's forms, the number of its multiplier."""
        return torch.arange(self.rows(i)) % self.shapes[i][1]

    def factors(self, i: int, value: Tensor | float) -> Tensor:
        """Constants as one factor for each row of the value's forms."""
        vector = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
        return vector.expand(self.shapes[i][1]).repeat(math.prod(self.levels[i]))

    def slopes(self, what: Slope) -> tuple[Tensor | float, Tensor | float]:
        """The slopes with 0 among them: outside the layer's extent the value is zero, whatever is read there."""
        low = what.low.clamp(max=0.0) if isinstance(what.low, Tensor) else min(what.low, 0.0)
        high = what.high.clamp(min=0.0) if isinstance(what.high, Tensor) else max(what.high, 0.0)
        return low, high

    def linear(self, i: int, step: Step, what: Linear) -> tuple[Tensor, float, bool, bool]:
        """Matrix, its error, whether it reads outside the value's extent, and whether zeros outside stay zeros."""
        source = step.sources[0]
        if isinstance(what.op, Scale):
            return torch.diag(self.factors(source, what.op.weight)).to(torch.complex128)[None], what.error, False, True
        op = what.op
        assert isinstance(op, Conv)
        fine, coarse = (i, source) if op.transposed else (source, i)
        taps, offsets = superkernel(op, self.levels[fine], self.levels[coarse])
        symbol = self._symbol(taps, offsets)
        # a product of real taps with waves as of docs/rounding.md#r2-symbol
        size = rd.mul_up(float(torch.linalg.vector_norm(taps, dim=(1, 2)).sum()), 1.0 + rd.gamma(taps.numel() + 16.0))
        error = rd.mul_up(rd.gamma(len(offsets) + 96.0), size)
        pointwise = all(k == 1 for k in op.weight.shape[2:]) and not any(map(any, op.padding)) and all(s == 1 for s in op.stride)  # type: ignore[arg-type,union-attr]
        needs_clean = op.transposed or any(map(any, op.padding))  # type: ignore[arg-type]
        return symbol.mH if op.transposed else symbol, rd.add_up(error, what.error), needs_clean, pointwise

    def _symbol(self, taps: Tensor, offsets: Tensor) -> Tensor:
        turns = torch.ones(self.frequencies, len(offsets), dtype=torch.complex128)
        for j, n in enumerate(self.points):
            angle = 2.0 * math.pi * torch.arange(n, dtype=torch.float64) / n
            roots = torch.polar(torch.ones_like(angle), angle)
            turns = turns * roots[(self.grid[:, j : j + 1] * offsets[None, :, j]) % n]
        return torch.einsum("fq,qmn->fmn", turns, taps.to(torch.complex128))

    def joined(self, step: Step, axis: int, parts: list[Form], sources: list[int]) -> Form:
        """The form of a concatenation."""
        assert axis == 1
        level, start, total = math.prod(self.levels[sources[0]]), 0, None
        for source, part in zip(sources, parts, strict=True):
            c = self.shapes[source][1]
            rows = torch.arange(level)[:, None] * step.shape[1] + start + torch.arange(c)
            at = block_of(level * step.shape[1], level * c, rows.reshape(-1), torch.arange(level * c)).to(torch.complex128)
            put = part.mapped(at, 0.0, part.clean)
            total = put if total is None else total + put
            start += c
        assert total is not None
        return total

    def sliced(self, step: Step, what: Slice, part: Form, source: int) -> Form:
        """The form of a slice."""
        level, c = math.prod(self.levels[source]), self.shapes[source][1]
        kept = (torch.arange(level)[:, None] * c + torch.arange(what.start, what.stop, what.step)).reshape(-1)
        return part.mapped(block_of(len(kept), level * c, torch.arange(len(kept)), kept).to(torch.complex128), 0.0, part.clean)


def superkernel(op: Conv, fine: tuple[int, ...], coarse: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Taps (Q, rows, columns) and offsets (Q, d) of the convolution between phases: y_m = sum_q taps[q] x_(m + q).

    Of the convolution whose adjoint it is when transposed. Index `s (R m + i) + d t - p` of x is phase and offset by division by r.
    """
    single = _ungrouped(op)
    rows, columns = single.shape[:2]
    sides = zip(coarse, fine, single.shape[2:], op.stride, op.dilation, op.padding, strict=True)  # type: ignore[arg-type]
    blocks: dict[tuple[int, ...], Tensor] = {}
    for combination in itertools.product(*itertools.starmap(_taps_of_phases, sides)):  # type: ignore[arg-type]
        phase, tap, offset, source = zip(*combination, strict=True)
        block = blocks.setdefault(offset, torch.zeros(rows * math.prod(coarse), columns * math.prod(fine), dtype=torch.float64))
        i, j = _flat(phase, coarse) * rows, _flat(source, fine) * columns
        block[i : i + rows, j : j + columns] += single[(slice(None), slice(None), *tap)]
    return torch.stack(list(blocks.values())), torch.tensor(list(blocks))


def _ungrouped(op: Conv) -> Tensor:
    """The kernel between all channels: zero between groups."""
    weight, g = to_float64(op.weight), op.groups
    rows, columns = len(weight) // g, weight.shape[1]
    single = torch.zeros(len(weight), columns * g, *weight.shape[2:], dtype=torch.float64)
    for j in range(g):
        r = slice(j * rows, (j + 1) * rows)
        single[r, j * columns : (j + 1) * columns] = weight[r]
    return single


def _taps_of_phases(big: int, r: int, k: int, s: int, d: int, padding: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Along one axis, for each phase of the output and each tap: both, and the offset and the phase of the input that it reads."""
    return [(i, t, *divmod(s * i + d * t - padding[0], r)) for i in range(big) for t in range(k)]


def _flat(index: Sequence[int], sides: tuple[int, ...]) -> int:
    flat = 0
    for i, n in zip(index, sides, strict=True):
        flat = flat * n + i
    return flat


def circulant(network: Network) -> Circulant:
    """The torus of a segment: levels from the strides, and as many points as the paddings need.

    Raises:
        NotCirculantError: a step that does not commute with shifts, or values that do not fit one grid.
    """
    shapes = [step.shape for step in network.steps]
    d = len(shapes[0]) - 2
    if not 1 <= d <= 3:
        raise NotCirculantError
    levels: list[Level] = [(Fraction(1),) * d]
    least: list[list[int]] = [list(shapes[0][2:])]
    for step in network.steps[1:]:
        what, levels_in = step.what, [levels[s] for s in step.sources]
        level = levels_in[0]
        need = list(step.shape[2:])
        if len(step.shape) != d + 2 or any(x != level for x in levels_in):
            raise NotCirculantError
        if isinstance(what, Linear) and isinstance(what.op, Conv):
            level, need, read = _conv_level(what.op, level, need)
            least[step.sources[0]] = [max(a, b) for a, b in zip(least[step.sources[0]], read, strict=True)]
        elif not _pointwise(step):
            raise NotCirculantError
        levels.append(level)
        least.append(need)
    common = [math.lcm(*(x[j].denominator for x in levels)) for j in range(d)]
    whole = [tuple(int(x[j] * common[j]) for j in range(d)) for x in levels]
    points = tuple(max(-(-n[j] // r[j]) for n, r in zip(least, whole, strict=True)) for j in range(d))
    return Circulant(shapes, whole, points)


def _conv_level(op: Conv, level: Level, need: list[int]) -> tuple[Level, list[int], list[int]]:
    """Level and least size of the output, and least size of the input: docs/network.md#circulant-forms."""
    if op.padding_mode != "zeros" or op.input_size is None:
        raise NotCirculantError
    read: list[int] = []
    axes = zip(op.input_size, op.output_size, op.spans, op.stride, op.padding, strict=True)  # type: ignore[arg-type]
    for j, (n, m, span, s, (lo, _)) in enumerate(axes):  # type: ignore[misc]
        if op.transposed:
            read.append(max(n - (-(span - 1 - lo) // s), (m - 1 + lo) // s + 1, n))  # type: ignore[operator]
            need[j] = max(need[j], m)  # type: ignore[type-var]
        else:
            read.append(max(n + lo, s * (m - 1) + span - lo, n))  # type: ignore[operator]
    strides = [Fraction(s) for s in op.stride]  # type: ignore[union-attr]
    out = tuple(x * s if op.transposed else x / s for x, s in zip(level, strides, strict=True))
    return out, need, read


def _pointwise(step: Step) -> bool:
    what, c = step.what, step.shape[1]

    def shared(x: Tensor | float) -> bool:
        """Constant over all axes but the channels."""
        if not isinstance(x, Tensor) or x.numel() == 1:
            return True
        shape = [1] * (len(step.shape) - x.ndim) + list(x.shape)
        return shape[1] == c and x.numel() == c

    if isinstance(what, Slope):
        return shared(what.low) and shared(what.high)
    if isinstance(what, Linear):
        return isinstance(what.op, Scale) and shared(what.op.weight)
    return isinstance(what, Sum) or (isinstance(what, Join | Slice) and what.axis == 1)


def slopes_of_channels(network: Network) -> Network | None:
    """The network with slopes that all places of a channel share, which a torus takes: the least and the largest of each channel.

    None where no others are known.
    """
    steps = [_of_channel(step) for step in network.steps]
    changed = any(made is not step for made, step in zip(steps, network.steps, strict=True))
    return Network(steps, network.outputs) if changed else None


def _of_channel(step: Step) -> Step:
    what = step.what
    if not isinstance(what, Slope) or len(step.shape) < 3:
        return step
    low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (what.low, what.high))
    if low.shape != step.shape or high.shape != step.shape:
        return step
    places = (0, *range(2, low.ndim))
    return replace(step, what=replace(what, low=low.amin(places, keepdim=True), high=high.amax(places, keepdim=True)))


# ---- links ---------------------------------------------------------------------------------------------------------------
#
# Links: the form that one piece leaves on its input, as the form that the piece before it starts from on its output.
#
# docs/network.md#links. A torus of N points with r phases carries the same values as one of r N points; where a strided layer has mixed
# the frequencies f + N k, the form is replaced by one above it that does not.

Sides = tuple[int, ...]


class Link(Protocol):
    """From a form (F, n, n) of the later piece's input to one (F', m, m) of the earlier piece's output."""

    def __call__(self, form: Tensor, power: Tensor) -> tuple[Tensor, Tensor | float]:
        """A form above it up to the noise (each in norm) that is returned beside it; `power` shapes the weights of aliases."""
        ...


@dataclass
class Pooled:
    """`weight` times the sum over all places: on the torus, the frequency 0 times a constant; known up to `error` in norm."""

    torus: Circulant
    places: int
    weight: float
    error: float

    def __call__(self, form: Tensor, power: Tensor) -> tuple[Tensor, Tensor | float]:
        """`|w sum x|^2 = places w^2 |x(0)|^2`, x(0) the unitary transform at frequency 0 on the torus of all places."""
        factor = self.places * self.weight**2
        dtype = torch.promote_types(form.dtype, torch.complex64)
        wide = torch.zeros(self.torus.frequencies, *form.shape[1:], dtype=dtype)
        wide = wide.index_put((torch.zeros(1, dtype=torch.long),), (form * factor).to(dtype))
        # |w sum x + e|^2 with |e| <= error |x|, in the form: 2 |w sum| error + error^2 times its size.
        off = rd.mul_up(self.error, rd.add_up(rd.mul_up(2.0, rd.sqrt_up(factor * (1 + 1e-9))), self.error))
        size = float(sizes_of(form.detach()).max())
        return wide, rd.add_up(rd.mul_up(rd.gamma(8), rd.mul_up(factor, size)), rd.mul_up(off, size))


@dataclass
class Alias:
    """From phases `inner` on the torus `later` to phases `outer` on the torus `earlier`; both tori have the same fine points."""

    later: Circulant
    inner: Sides
    earlier: Circulant
    outer: Sides

    def __call__(self, form: Tensor, power: Tensor) -> tuple[Tensor, Tensor | float]:
        """Theorem N8: `P <= sum_k P_kk / t_k` over the aliases k, for weights t that add up to at most 1."""
        if self.later.points == self.earlier.points and self.inner == self.outer:
            return form, 0.0
        blocks, noise = self._aliases(form, power)
        index, alias, mirrored = self._sources
        fine = blocks[index, alias]
        fine = torch.where(mirrored[:, None, None], fine.conj(), fine)  # real weights: the form at -f is the conjugate
        spread = noise[index]
        count = math.prod(self.outer)
        if count == 1:
            return fine, spread
        pairs = self._outer_pairs.to(torch.promote_types(fine.dtype, torch.complex64))
        f, c = len(pairs), fine.shape[-1]
        joined = (pairs.mH @ fine.to(pairs.dtype).reshape(f, count, c * c)).reshape(
            f, count, count, c, c
        )  # phases j and i of entries c and d
        joined = joined.transpose(2, 3).reshape(f, count * c, count * c)
        spread = spread.reshape(f, count).amax(1)
        return joined, spread + rd.gamma(16.0 * count) * count * sizes_of(joined.detach())

    def _aliases(self, form: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """A block for each alias of each frequency of `later`: (F, K, C, C)."""
        count = math.prod(self.inner)
        f, c = len(form), form.shape[-1] // count
        if count == 1:
            return form[:, None], torch.zeros(f, dtype=torch.float64)
        dtype = torch.promote_types(form.dtype, torch.complex64)
        blocks = form.reshape(f, count, c, count, c).transpose(2, 3).reshape(f, count * count, c * c).to(dtype)
        parts = (self._inner_pairs.to(dtype) @ blocks).reshape(f, count, c, c)
        sizes = parts.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        sizes = sizes.clamp_min(1e-9 * float(sizes.detach().max()) + 1e-300)
        logs = power * sizes.log()
        shares = torch.softmax(logs, 1)
        shares = shares / (shares.sum(1, keepdim=True) * (1.0 + rd.gamma(count + 8.0)))  # their sum is at most 1
        noise = rd.gamma(32.0 * count) * count * sizes_of(form.detach()) / shares.detach().amin(1)
        return parts / shares[..., None, None], noise

    @cached_property
    def _inner_pairs(self) -> Tensor:
        return _pairs(_turns(self.later, self.inner))

    @cached_property
    def _outer_pairs(self) -> Tensor:
        return _pairs(_turns(self.earlier, self.outer))

    @cached_property
    def _sources(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each fine frequency that `earlier` needs: the frequency of `later`, the alias, and whether to conjugate."""
        n, m = torch.tensor(self.later.points), torch.tensor(self.earlier.points)
        whole = n * torch.tensor(self.inner)
        assert bool((whole == m * torch.tensor(self.outer)).all())
        steps = torch.cartesian_prod(*(torch.arange(r) for r in self.outer)).reshape(-1, len(self.outer))
        wanted = (self.earlier.grid[:, None] + m * steps).reshape(-1, len(n))
        index, mirrored = self.later.find(wanted % n)
        turned = torch.where(mirrored[:, None], (-wanted) % whole, wanted)
        alias = torch.zeros(len(wanted), dtype=torch.long)
        for j, r in enumerate(self.inner):
            alias = alias * r + turned[:, j] // n[j]
        return index, alias, mirrored


def _pairs(turns: Tensor) -> Tensor:
    """The products (F, K, K K) of the entries of each row of unitary matrices and their conjugates."""
    return (turns[..., None] * turns.conj()[..., None, :]).flatten(2)


def _turns(torus: Circulant, phases: Sides) -> Tensor:
    """The unitary matrices (F, K, K) from phases j to the frequencies f + N k of the fine torus."""
    turns = torch.ones(torus.frequencies, 1, 1, dtype=torch.complex128)
    for axis, (n, r) in enumerate(zip(torus.points, phases, strict=True)):
        k = torch.arange(r)
        fine = torus.grid[:, axis, None, None] + n * k[:, None]
        angle = -2.0 * math.pi * ((fine * k) % (n * r)).double() / (n * r)
        one = torch.polar(torch.full_like(angle, r**-0.5), angle)
        turns = torch.einsum("fkj,fli->fklji", turns, one).reshape(torus.frequencies, turns.shape[1] * r, -1)
    return turns
