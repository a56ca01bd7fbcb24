"""From an operator to its blocks: padding theorems, and small matrices whose norms, times a factor, bound the operator's norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gramlip.norm.frequency_cells import Ints
from gramlip.numerics import precision
from gramlip.numerics.precision import exponent_of, scaled_float64
from gramlip.operators.linear_maps import Axis, Conv, Dense, axes, index_map

# ---- padding theorems --------------------------------------------------------------------------------------------------
#
# One axis of a convolution becomes points of a circle, a stride and a factor. Each entry of `PADDING` maps the
# geometry of an axis to a `Circle`: the layer's norm is at most `factor` times the largest norm of the polyphase
# symbol (stride `stride`, dilation 1) over the frequencies `2 pi j / points`, or over all frequencies if `points` is
# None. Proofs: docs/theory.md, the section named in each docstring.


@dataclass(frozen=True)
class Circle:
    """The circle for an axis; `exact` if the bound is attained, `norm_squared` is the square of the factor (an integer)."""

    points: int | None
    stride: int
    norm_squared: int
    exact: bool
    because: str


def zeros(axis: Axis) -> Circle:
    """Zero padding is a restriction of a circulant of size >= n + p. docs/theory.md#zero-padding."""
    stride = axis.stride // math.gcd(axis.stride, axis.dilation)
    if axis.size is None or axis.outputs is None:
        return Circle(None, stride, 1, True, "zero padding of every size: supremum over all frequencies (theorem 4)")
    reach = axis.span - 1
    last = (axis.outputs - 1) * axis.stride - axis.before + axis.span
    least = max(axis.size + min(axis.before, reach), min(last, axis.size + reach), 1)
    # Any larger circulant is valid too; a multiple of stride and dilation decouples their phases.
    points = -(-least // math.lcm(axis.stride, axis.dilation))
    because = f"zero padding: restriction of a circulant of size {points * math.lcm(axis.stride, axis.dilation)} >= n + p (theorem 4)"
    first = -(-axis.before // axis.stride)  # the first output that does not read padding before the input
    reads = first < axis.outputs and first * axis.stride - axis.before < axis.size
    return Circle(points, stride, 1, axis.kernel == 1 and reads, because)


def circular(axis: Axis) -> Circle:
    """Circular padding selects rows of a circulant, each as often as the outputs wrap around. docs/theory.md#circular-padding."""
    if axis.size is None or axis.outputs is None:
        square = max(_wraps(axis, n) for n in _small_sizes(axis))
        stride = axis.stride // math.gcd(axis.stride, axis.dilation) if axis.stride == 1 else 1
        return Circle(
            None,
            stride,
            square,
            axis.stride == 1 and square == 1,
            "circular padding of every size: supremum over all frequencies (theorem 3)",
        )
    step = math.gcd(axis.stride, axis.size)
    period = axis.size // step
    square = _wraps(axis, axis.size)
    shared = math.gcd(step, axis.dilation)
    points = period // math.gcd(period, axis.dilation // shared)
    because = f"circular padding: rows of a circulant of size {axis.size} (theorem 3)"
    if step != axis.stride:
        because += f" (stride {axis.stride} taken as {step}, which divides it)"
    if square > 1:
        because += f", each kept up to {square} times"
    alone = axis.kernel == 1 and not axis.before and not axis.after
    return Circle(points, step // shared, square, alone or axis.outputs == square * period, because)


def _wraps(axis: Axis, size: int) -> int:
    """The largest number of outputs that are the same row of the circulant of that size."""
    outputs = (size + axis.before + axis.after - axis.span) // axis.stride + 1
    return -(-outputs * math.gcd(axis.stride, size) // size)


def _small_sizes(axis: Axis) -> range:
    """The sizes that torch accepts, up to the size at which the number of wraps stops growing: docs/theory.md#circular-padding."""
    least = max(axis.before, axis.after, axis.span - axis.before - axis.after, 1)
    return range(least, least + axis.stride * (axis.before + axis.after + 2 * axis.stride) + 2)


def reflect(axis: Axis) -> Circle:
    """Reflect padding repeats inputs: the bound is its norm times the supremum of the symbol. docs/theory.md#reflect-and-replicate."""
    return _repeating(axis, "reflect")


def replicate(axis: Axis) -> Circle:
    """Replicate padding repeats the edge: the bound is its norm times the supremum of the symbol. docs/theory.md#reflect-and-replicate."""
    return _repeating(axis, "replicate")


def _repeating(axis: Axis, mode: str) -> Circle:
    lo, hi = axis.before, axis.after
    if axis.size == 1:
        square = _of_one_input(axis)
    elif axis.size is not None:
        square = int(index_map(Axis(axis.size, axis.size + lo + hi, 1, 1, 1, lo, hi), mode).flatten().bincount().max())
    elif mode == "replicate":  # with two or more inputs, each end is repeated only on its own side
        square = max(1 + max(lo, hi), _of_one_input(axis))
    else:  # an input that is reflected from both ends occurs three times
        square = 1 + (lo > 0) + (hi > 0)
    because = f"{mode} padding: supremum over all frequencies (theorem 12)"
    return Circle(None, axis.stride // math.gcd(axis.stride, axis.dilation), square, False, because)


def _of_one_input(axis: Axis) -> int:
    """The square of the factor on an axis with one input, which all taps read; not positive if the kernel exceeds the padded input."""
    stride = axis.stride // math.gcd(axis.stride, axis.dilation)
    outputs = (1 + axis.before + axis.after - axis.span) // axis.stride + 1
    return min(1 + axis.before + axis.after, outputs * min(stride, axis.kernel))


PADDING: dict[str, Callable[[Axis], Circle]] = {"zeros": zeros, "circular": circular, "reflect": reflect, "replicate": replicate}


# ---- blocks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Symbol:
    """A layer as the matrix trigonometric polynomial `D(w) = sum_p K[..., p] exp(-i p.w)`.

    `kernel` is (groups, m, n, *k), real or complex, polyphase for a stride. It is made from `plain`, the kernel without phases, and
    `strides` when it is read. The layer's norm is at most `sqrt(padding_norm_squared) max_w ||D(w)||` over the grid of `points[j]`
    equidistant frequencies on axis j, or over all frequencies if that is None.
    """

    plain: Tensor
    strides: tuple[int, ...]
    points: tuple[int | None, ...]
    padding_norm_squared: int
    exact: bool
    because: str

    @property
    def kernel(self) -> Tensor:
        """The polyphase kernel, with the weight's graph.

        For a stride it is a new copy at each access: a copy made under `no_grad` would have no graph.
        """
        kernel = self.plain
        for j, stride in enumerate(self.strides):
            kernel = polyphase(kernel, 3 + j, stride)
        return kernel

    @property
    def frequencies(self) -> int | None:
        """The number of blocks of the grid (a real kernel needs half of them); None for the torus."""
        known = [n for n in self.points if n is not None]
        count = math.prod(known) if len(known) == len(self.points) else None
        return count if count is None or self.plain.is_complex() else count // 2 + 1

    @property
    def degrees(self) -> tuple[float, ...]:
        """Half the range of exponents on each axis: `u* D(w) v` is, up to a phase, a polynomial of that degree."""
        return tuple((-(-k // s) - 1) / 2 for k, s in zip(self.plain.shape[3:], self.strides, strict=True))

    def at(self, frequencies: Tensor) -> Tensor:
        """The blocks D(w), shape (groups, F, m, n), complex, at `frequencies` of shape (F, axes)."""
        kernel = self.kernel.flatten(3)
        taps = (torch.arange(k, dtype=frequencies.dtype, device=frequencies.device) for k in self.kernel.shape[3:])
        places = torch.cartesian_prod(*taps).reshape(kernel.shape[-1], -1)
        angles = (frequencies[:, None] * places).sum(-1)  # elementwise, since global settings may lower the precision of matrix products
        waves = torch.polar(torch.ones_like(angles), -angles)
        return torch.einsum("gmnp,fp->gfmn", kernel.to(waves.dtype), waves)


@dataclass(frozen=True)
class Blocks:
    """Matrices of shape (groups, *frequencies, m, n): the norm is at most `factor * max ||block||`, equal where `exact`."""

    matrices: Tensor
    factor: float
    exact: bool
    because: str


def symbol(op: Dense | Conv) -> Symbol:
    """The symbol of an operator and the grid on which to bound it; keeps the weight's graph.

    >>> symbol(Conv(torch.ones(4, 2, 3, 3), input_size=8, padding=1, stride=2)).kernel.shape
    torch.Size([1, 4, 8, 2, 2])
    """
    if isinstance(op, Dense):
        return Symbol(op.weight[None], (), (), 1, True, op.because)
    circles = [PADDING[op.padding_mode](axis) for axis in axes(op)]
    reasons = list(dict.fromkeys(c.because for c in circles))
    if op.groups > 1:
        reasons.append(f"largest of {op.groups} groups (theorem 5)")
    if op.transposed:
        reasons.append("a transposed convolution is the adjoint of a convolution (theorem 5)")
    square = math.prod(c.norm_squared for c in circles)
    exact = all(c.exact for c in circles)
    strides = tuple(c.stride for c in circles)
    return Symbol(grouped(op), strides, tuple(c.points for c in circles), square, exact, "; ".join(reasons))


def grouped(op: Conv) -> Tensor:
    """The kernel as (groups, m, n, *k), of the convolution whose adjoint it is when transposed."""
    return op.weight.reshape(op.groups, op.weight.shape[0] // op.groups, *op.weight.shape[1:])


def polyphase(kernel: Tensor, axis: int, stride: int) -> Tensor:
    """Move the phases of the axis to the input channels; phases without a tap are left out."""
    return kernel if stride == 1 else split(kernel, axis, stride).movedim(axis + 1, 3).flatten(2, 3)


def split(kernel: Tensor, axis: int, stride: int) -> Tensor:
    """Split the axis into two, taps and phases, as a view."""
    k = kernel.shape[axis]
    taps, phases = -(-k // stride), min(stride, k)
    room = torch.zeros_like(kernel.narrow(axis, 0, 1)).repeat_interleave(taps * stride - k, axis) if taps * stride > k else None
    full = kernel if room is None else torch.cat([kernel, room], axis)
    taps_and_phases = full.unflatten(axis, (taps, stride))
    return taps_and_phases if phases == stride else taps_and_phases.narrow(axis + 1, 0, phases)


def blocks(op: Dense | Conv, torus: int = 32) -> Blocks:
    """The blocks on the padding theorem's grid, or on a `torus`-point grid with the cosine factor (theorem 6) for every size.

    Reference: docs/theory.md#from-a-grid-to-the-torus. For real kernels half of the grid stands for all of it.
    """
    sym = symbol(op)
    sides, factor, because = grid(sym, torus)
    return Blocks(transform(sym.kernel, sides), factor, sym.exact and None not in sym.points, because)


def grid(sym: Symbol, torus: int = 32) -> tuple[list[int], float, str]:
    """The points of each axis, the factor from their largest block to the operator's norm, and the reason."""
    sides, factor, because = [], math.sqrt(sym.padding_norm_squared), sym.because
    for points, degree in zip(sym.points, sym.degrees, strict=True):
        side = points if points is not None else torus * max(1, math.ceil(degree / 2)) if degree else 1
        sides.append(side)
        if points is None and degree:
            factor /= math.cos(math.pi * degree / side)
            because += f"; {side}-point grid with the cosine factor (theorem 6)"
    return sides, factor, because


def transform(kernel: Tensor, grid: list[int]) -> Tensor:
    """The symbol on a grid by FFT, (groups, *grid, m, n); the last axis is halved for real kernels. Small grids wrap."""
    if not grid:
        return kernel
    for j, n in enumerate(grid):
        kernel = _wrap(kernel, 3 + j, n)
    dims = list(range(3, kernel.ndim))
    wide = kernel.to(torch.float32) if kernel.dtype in (torch.float16, torch.bfloat16) else kernel
    spectrum = torch.fft.fftn(wide, s=grid, dim=dims) if wide.is_complex() else torch.fft.rfftn(wide, s=grid, dim=dims)
    return spectrum.movedim((1, 2), (-2, -1)).contiguous()


def _wrap(kernel: Tensor, axis: int, n: int) -> Tensor:
    """Add taps that are n apart: they coincide at every frequency of an n-grid (an FFT would crop them)."""
    k = kernel.shape[axis]
    if k <= n:
        return kernel
    pieces = [kernel.narrow(axis, start, min(n, k - start)) for start in range(0, k, n)]
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + torch.cat([piece, torch.zeros_like(total.narrow(axis, 0, n - piece.shape[axis]))], axis)
    return total


# ---- the taller side -----------------------------------------------------------------------------------------------------
#
# A layer's polyphase kernel on its taller side, read as exact float64 copies of row ranges; only small kernels are copied
# whole.

WIDE_BYTES = 32 << 20  # keep a float64 copy of the whole kernel if it is smaller than this
PIECE_BYTES = 8 << 20  # pieces of larger kernels have about this size,
GPU_PIECE_BYTES = 64 << 20  # or this on a GPU


class TallKernel:
    """The kernel (groups, taps, rows, side), `rows >= side`, of the symbol of `kernel` (groups, m, n, *k) at `strides`.

    Entries are divided by `2**exponent`, chosen so that the largest lies in [1/2, 1). Some rows of a taller kernel stay as they are
    (`upright`), and take the exponent of all its rows.
    """

    def __init__(
        self, kernel: Tensor, strides: tuple[int, ...] | None = None, *, exponent: int | None = None, upright: bool = False
    ) -> None:
        """Orient the kernel and compute its exponent; a small kernel is copied."""
        self.source = kernel.detach()
        self.device, self.parallel = kernel.device, precision.parallel(kernel.device)
        taps = kernel.shape[3:]
        self.strides = strides or (1,) * len(taps)
        self.span = tuple(-(-k // s) for k, s in zip(taps, self.strides, strict=True))
        phases = math.prod(min(s, k) for k, s in zip(taps, self.strides, strict=True))
        m, n = kernel.shape[1], kernel.shape[2] * phases
        self.flipped = m < n and not upright  # D D* instead of D* D; its conjugation only mirrors the frequencies
        self.groups, (self.rows, self.side) = kernel.shape[0], (n, m) if self.flipped else (m, n)
        self.count = math.prod(self.span)
        self.is_complex = kernel.is_complex()
        self._unit = phases if self.flipped else 1  # rows that stem from one row of the source
        scalar = 16 if self.is_complex else 8
        self._row_bytes = scalar * self._unit * self.side * self.count
        self.small = scalar * self.groups * self.rows * self.side * self.count <= WIDE_BYTES
        self.exponent = (exponent_of_all(self.source) or 0) if exponent is None else exponent
        self.wide = self._cast(0, self.rows // self._unit, slice(None)) if self.small else None

    def pieces(self, group: int | None = None, size: int | None = None) -> Iterator[Tensor]:
        """The rows of one group, or of all, in turn: (groups, taps, r, side) of about `size` bytes at most."""
        chosen = slice(None) if group is None else slice(group, group + 1)
        if self.wide is not None and (group is None or self.groups == 1):
            yield self.wide
            return
        total = self.rows // self._unit
        size = size or (GPU_PIECE_BYTES if self.parallel else PIECE_BYTES)
        step = max(1, size // (self._row_bytes * (self.groups if group is None else 1)))
        for start in range(0, total, step):
            stop = min(start + step, total)
            yield self.wide[chosen, :, start * self._unit : stop * self._unit] if self.wide is not None else self._cast(start, stop, chosen)

    def images(self, group: Ints, v: Tensor) -> Tensor:
        """All taps of the groups (I,) times one vector per group (I, side): (I, P, rows), complex."""
        rows: list[int] = group.tolist()
        if self.wide is not None:
            every = rows == list(range(self.groups))
            return _apply(self.wide if every else self.wide[rows], v)
        each = zip(rows, v[:, None], strict=True)
        return torch.cat([torch.cat([_apply(piece, vectors) for piece in self.pieces(at)], -1) for at, vectors in each])

    def _cast(self, start: int, stop: int, groups: slice) -> Tensor:
        """The exact copy of these rows of the source, conjugated if the sides were exchanged."""
        part = self.source[groups].narrow(2 if self.flipped else 1, start, stop - start)
        for j, stride in enumerate(self.strides):
            part = polyphase(part, 3 + j, stride)
        part = part.transpose(1, 2) if self.flipped else part
        part = (part.flatten(3) if self.span else part[..., None]).movedim(-1, 1)
        wide = scaled_float64(part.contiguous(), self.exponent)[0]
        return wide.conj().resolve_conj() if self.flipped and self.is_complex else wide


def exponent_of_all(kernel: Tensor) -> int | None:
    """The exponent of the largest entry of a kernel (groups, m, n, *k), read in pieces; None if all entries are zero."""
    each = 8 * kernel.numel() // kernel.shape[1]
    exponents = (exponent_of(part) for part in kernel.split(max(1, PIECE_BYTES // each), 1))
    return max((exponent for exponent in exponents if exponent is not None), default=None)


def symbols(waves: Tensor, taps: Tensor) -> Tensor:
    """`D(w)` from complex waves (F, P) and flat taps (..., P, n): a product for each part where the taps are real."""
    return waves @ taps if taps.is_complex() else torch.complex(waves.real @ taps, waves.imag @ taps)


def _apply(taps: Tensor, v: Tensor) -> Tensor:
    """All taps (I, P, rows, side), real or complex, times vectors (I, side): (I, P, rows), complex."""
    if taps.is_complex():
        return (taps @ v[:, None, :, None])[..., 0]
    return torch.view_as_complex((taps @ torch.view_as_real(v)[:, None]).contiguous())
