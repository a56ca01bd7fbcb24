"""The norm of a layer as a function of its weight alone: one opaque, differentiable operation for eager, compiled and exported code.

`NormGeometry` is the layer's geometry, computed once; `NormGeometry.sigma(weight)` is the upper bound, with the gradient of the largest
block. Eager code calls `_Sigma`, which supports the transforms of `torch.func`; code that torch compiles or traces calls the operation
itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.norm.polyphase import PADDING, split, symbol, transform
from gramlip.numerics.eigenvalues import gram_norm
from gramlip.numerics.precision import in_norm_precision, norm, real_dtype, without_autocast
from gramlip.operators.given import is_sharded
from gramlip.operators.linear_maps import Conv, Dense, axes

POWER_STEPS = 4  # cheap lower estimates that rule out blocks which cannot be the largest


@dataclass(frozen=True)
class NormGeometry:
    """Geometry of a layer without its weight: `norm <= factor * max over the grid of ||D(w)||`, for any weight of that shape.

    A lower estimate of the largest block, times `attained`, is a lower estimate of the layer's norm. `attained` is the factor of the
    padding theorem if that is exact, otherwise 1.
    """

    groups: int
    strides: tuple[int, ...]
    grid: tuple[int, ...]
    square: int
    factor: float
    attained: float
    because: str

    @staticmethod
    def of(op: Dense | Conv, torus: int = 16) -> NormGeometry:
        """The geometry of an operator: on each axis the grid of the padding theorem, or one of `torus` points if that is smaller.

        On a grid of N points the supremum over all frequencies costs the factor `1 / cos(pi (k - 1) / (2 N))`:
        docs/theory.md#from-a-grid-to-the-torus.

        >>> NormGeometry.of(Conv(torch.ones(4, 4, 3, 3), input_size=56, padding=1)).grid
        (16, 16)
        """
        if isinstance(torus, bool) or not isinstance(torus, int) or torus < 4:
            msg = f"torus={torus!r} was given; expected an integer of at least 4 grid points per axis, such as 16"
            raise InputError(msg)
        if isinstance(op, Dense):
            return NormGeometry(1, (), (), 1, 1.0, 1.0, "a matrix")
        sym = symbol(op)
        strides = tuple(PADDING[op.padding_mode](axis).stride for axis in axes(op))
        grid, factor, because = [], math.sqrt(sym.padding_norm_squared), sym.because
        for points, degree in zip(sym.points, sym.degrees, strict=True):
            side = torus * max(1, math.ceil(degree)) if degree else 1
            if points is not None and points <= side:
                grid.append(points)
                continue
            grid.append(side)
            if degree:
                factor /= math.cos(math.pi * degree / side)
                because += f"; {side}-point grid with the cosine factor"
        return NormGeometry(
            op.groups,
            strides,
            tuple(grid),
            sym.padding_norm_squared,
            factor,
            math.sqrt(sym.padding_norm_squared) if sym.exact else 1.0,
            because,
        )

    def kernel(self, weight: Tensor) -> Tensor:
        """The polyphase kernel (groups, m, n, *k) of a weight; a linear function of it."""
        return kernel(weight, self.groups, self.strides)

    def columns(self, shape: Sequence[int]) -> Tensor:
        """For each column (n, *k) of the polyphase kernel, its column in the plain weight (groups, m, -1); -1 for a zero column."""
        numbers = torch.arange(math.prod(shape[1:])).reshape(1, *shape[1:]) + 1
        return self.kernel(numbers.expand(self.groups, *shape[1:]))[0, 0] - 1

    def sigma(self, weight: Tensor, n_iter: int = 6) -> Tensor:
        """Upper bound (up to rounding) of the layer's norm, a scalar tensor with its gradient; float32 at least.

        The value depends on the weight alone. The gradient is that of the largest block. A sharded weight is gathered.
        """
        if (sharded := replicated(weight)) is not None:
            full, wrap = sharded
            return wrap(self.sigma(full, n_iter))
        opaque = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        largest_block = torch.ops.gramlip.largest_block if opaque else _Sigma.apply
        return largest_block(weight, self.groups, self.strides, self.grid, n_iter)[0] * self.factor


def replicated(weight: Tensor) -> tuple[Tensor, Any] | None:
    """For a DTensor, the full tensor and the function back to a replicated DTensor. None for a plain tensor."""
    if not is_sharded(weight):
        return None
    from torch.distributed.tensor import DTensor, Replicate

    whole = cast("DTensor", weight)
    mesh = whole.device_mesh
    return whole.full_tensor(), lambda x: DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim)


def kernel(weight: Tensor, groups: int, strides: Sequence[int]) -> Tensor:
    """The weight as (groups, m, n, *k): the phases of each strided axis become columns, and missing taps are zeros."""
    out = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    split_axes = [j for j, stride in enumerate(strides) if stride > 1]
    for j in reversed(split_axes):
        out = split(out, 3 + j, strides[j])
    if not split_axes:
        return out
    phases = [4 + j + i for i, j in enumerate(split_axes)]  # moved together: one copy of the weight, whatever the strides
    return out.movedim(phases, list(range(3, 3 + len(phases)))).flatten(2, 2 + len(phases))


@torch.library.custom_op("gramlip::largest_block", mutates_args=())
def _largest(weight: Tensor, groups: int, strides: list[int], grid: list[int], n_iter: int) -> tuple[Tensor, Tensor]:
    """The largest Gram bound over groups and frequencies, and its flat index."""
    with without_autocast(weight):
        blocks = transform(kernel(in_norm_precision(weight), groups, strides), grid)
        blocks = blocks.reshape(-1, *blocks.shape[-2:])
        value, index = max_gram_bound(blocks, n_iter)
    return value.to(real_dtype(weight)), index


def max_gram_bound(blocks: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """Largest `gram_norm` of blocks (F, m, n) and its index; blocks that a lower estimate rules out are dropped early."""
    keep = torch.arange(blocks.shape[0], device=blocks.device)
    floor = power(blocks, POWER_STEPS)[0].amax() * (1 - 1e-5)
    for steps in (0, *(t for t in (1, 3) if t < n_iter), n_iter):
        candidates = blocks[keep] if len(keep) < len(blocks) else blocks
        value = gram_norm(candidates, steps) if steps else norm(candidates, 2)
        # keep NaN, so that it is seen, and the largest block, which rounding may have put below an estimate
        alive = ~(value < torch.minimum(floor, value.amax()))
        keep, value = keep[alive], value[alive]
    top, where = value.max(0)  # pyright: ignore[reportPossiblyUnboundVariable]
    # if rounding put the estimate above the bound, take it: no dropped block is larger
    top = torch.where(floor.isfinite(), torch.maximum(top, floor), top)  # squares may have left the range
    return top, keep[where].clone()  # not a view into the middle of `keep`: compiled code asks for aligned storage


def power(blocks: Tensor, steps: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lower estimates (F,) of the norms of blocks (F, m, n) and their unit right vectors (F, n), by power iteration."""
    if start is None:  # start from the longest row: only a zero block maps it to zero
        rows = norm(blocks).argmax(-1)
        start = blocks.take_along_dim(rows[:, None, None], 1)[:, 0].conj()
    v = unit(start)
    for _ in range(steps):
        v = unit((blocks.mH @ (blocks @ v[..., None]))[..., 0])
    return norm((blocks @ v[..., None])[..., 0]), v


def unit(v: Tensor) -> Tensor:
    """Unit vectors along the last axis; zero stays zero. The peak is divided out first, so that squares neither over- nor underflow."""
    peak = v.abs().amax(-1, keepdim=True)
    v = v / torch.where(peak > 0, peak, 1.0)
    length = norm(v, keepdim=True)
    return v / torch.where(length > 0, length, 1.0)


@_largest.register_fake
def _(weight: Tensor, groups: int, strides: list[int], grid: list[int], n_iter: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty((), dtype=real_dtype(weight)), weight.new_empty((), dtype=torch.int64)


def slope(weight: Tensor, index: Tensor, groups: int, strides: Sequence[int], grid: Sequence[int], n_iter: int) -> Tensor:
    """Gradient of the Gram bound of one block with respect to the weight; it is differentiable again."""
    with without_autocast(weight):
        _, pull = cast("Any", torch.func.vjp)(
            lambda w: gram_norm(block_at(kernel(w, groups, strides), index, grid), n_iter), in_norm_precision(weight)
        )
        (gradient,) = pull(torch.ones((), dtype=real_dtype(in_norm_precision(weight)), device=weight.device))
    return gradient.to(weight.dtype).contiguous()


@torch.library.custom_op("gramlip::largest_block_slope", mutates_args=())
def _slope(weight: Tensor, index: Tensor, groups: int, strides: list[int], grid: list[int], n_iter: int) -> Tensor:
    """`slope` as one operation."""
    return slope(weight, index, groups, strides, grid, n_iter)


@_slope.register_fake
def _(weight: Tensor, index: Tensor, groups: int, strides: list[int], grid: list[int], n_iter: int) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def block_at(kernel: Tensor, index: Tensor, grid: Sequence[int]) -> Tensor:
    """The block (m, n) at a flat index of the grid that `transform` returns: the last axis is halved for real kernels."""
    if not grid:
        return kernel.index_select(0, index.reshape(1))[0]  # nothing waits for the index, and meta tensors pass
    half = [*grid[:-1], grid[-1] if kernel.is_complex() else grid[-1] // 2 + 1]
    turns: list[Tensor] = []
    for side in reversed(half):
        turns.append(index % side)
        index = index // side
    phase = torch.zeros((), dtype=kernel.real.dtype if kernel.is_complex() else kernel.dtype, device=kernel.device)
    for turn, n, k in zip(reversed(turns), grid, kernel.shape[3:], strict=True):
        step = (turn * torch.arange(k, device=kernel.device)) % n
        phase = phase[..., None] + step.to(phase.dtype) * (2 * math.pi / n)
    wave = torch.polar(torch.ones_like(phase), -phase).flatten()
    taps = kernel.flatten(3).index_select(0, index.reshape(1))[0]
    return (taps.to(wave.dtype) * wave).sum(-1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, *ctx.geometry = inputs
    ctx.save_for_backward(weight, output[1])


def _pull(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    weight, index = ctx.saved_tensors
    return _times(grads[0], torch.ops.gramlip.largest_block_slope(weight, index, *ctx.geometry)), None, None, None, None


def _times(grad: Tensor | None, direction: Tensor) -> Tensor | None:
    """The gradient of a scalar times a direction, in the precision of the direction."""
    return None if grad is None else grad.to(direction.real.dtype if direction.is_complex() else direction.dtype) * direction


_largest.register_autograd(_pull, setup_context=_save)


class _Sigma(torch.autograd.Function):
    """`largest_block` with derivatives of any order, forward mode, and `torch.vmap` over weights."""

    @staticmethod
    def forward(weight: Tensor, groups: int, strides: Sequence[int], grid: Sequence[int], n_iter: int) -> tuple[Tensor, Tensor]:
        top, index = torch.ops.gramlip.largest_block(weight, groups, strides, grid, n_iter)
        return top, index

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, *ctx.geometry = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, output[1])
        ctx.save_for_forward(weight, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _times(grads[0], slope(*ctx.saved_tensors, *ctx.geometry)), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        weight, index = ctx.saved_tensors
        return (slope(weight, index, *ctx.geometry).conj() * tangents[0]).real.sum().to(real_dtype(weight)), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        weights, *geometry = inputs
        each = [_Sigma.apply(weight, *geometry) for weight in weights.unbind(in_dims[0] or 0)]
        return tuple(torch.stack(part) for part in zip(*each, strict=True)), (0, 0)
