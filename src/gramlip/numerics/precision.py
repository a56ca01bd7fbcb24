"""Precision: exact float64 copies of weights, the effect of global settings and devices on products, and accurate float32 sums."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gramlip.errors import InputError

# The dtypes of weights that are bounded.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)

# ---- settings ------------------------------------------------------------------------------------------------------------
# The effect of global settings on float32 products. They are read, never changed, and no proof depends on them.


def full_products() -> bool:
    """Whether float32 products are computed in float32, without TF32 or bfloat16."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    modes = [getattr(backend, "fp32_precision", None) for backend in backends]
    if modes[0] is None:  # torch before 2.9 has a single switch
        return torch.get_float32_matmul_precision() == "highest"
    return all(mode in (None, "none", "ieee") for mode in modes)


def in_norm_precision(x: Tensor) -> Tensor:
    """The tensor in the precision for norms: at least float32, and float64 if float32 products have a lower precision.

    Compiled code cannot query the settings: it uses float32 products as they are.
    """
    full = torch.compiler.is_compiling() or full_products()
    x = x.float() if x.dtype.itemsize == 1 else x  # torch does not promote 8-bit types
    return x.to(torch.promote_types(x.dtype, torch.float32 if full else torch.float64))


def real_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a norm of this tensor: float64 for double precision, otherwise float32."""
    return torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the tensor's device, if that has autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


# ---- devices -------------------------------------------------------------------------------------------------------------
# Differences on a GPU: a call costs more than the arithmetic of many blocks, and theorems on LAPACK do not apply.


def parallel(device: torch.device) -> bool:
    """Whether the device processes many blocks in the time of a call, as a GPU does."""
    return device.type != "cpu"


def on_cpu() -> AbstractContextManager[object]:
    """Create new tensors on the CPU, whatever the default device; the context costs time, so it is entered only if needed."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


# ---- exact copies --------------------------------------------------------------------------------------------------------
#
# Exact float64 copies of weights: whatever the dtype, and whether or not this thread flushes denormals.

_LAYOUTS = {torch.float32: (torch.int32, 23, -149), torch.float64: (torch.int64, 52, -1074)}


def scaled_float64(x: Tensor, exponent: int | None) -> tuple[Tensor, int]:
    """The values of x divided by `2**exponent`, as float64 or complex128, read-only, and the exponent.

    With None the exponent is chosen so that the largest entry lies in [1/2, 1). The copy is exact except for entries below `2**-1022`
    of the scale, whose error is smaller than that: docs/rounding.md#r1-weights. Denormal weights are decoded from their bits, since a
    thread that flushes denormals would read zeros.
    """
    wide, exponents = scaled_float64_each(x[None], None if exponent is None else [exponent])
    return wide[0], exponents[0]


def scaled_float64_each(x: Tensor, exponents: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
    """`scaled_float64` of each tensor along the first axis, each with its own exponent."""
    if x.is_complex():
        parts, exponents_used = scaled_float64_each(torch.view_as_real(x.resolve_conj()), exponents)
        return torch.view_as_complex(parts), exponents_used
    if exponents is not None and x.dtype == torch.float64 and not any(exponents):
        return x.contiguous(), list(exponents)
    x, magnitude, width, least = _bits(x)
    if exponents is None:
        exponents = [_exponent(top, width, least) or 0 for top in magnitude.flatten(1).amax(-1).tolist()]
    wide = _scaled_in_place(x.to(torch.float64, copy=True), [-e for e in exponents])
    small = magnitude < (1 << width)
    if bool(small.any()) and bool((small & (magnitude > 0)).any()):
        tiny = _scaled_in_place(magnitude.to(torch.float64), [least - e for e in exponents])
        wide = torch.where(small, torch.where(x.view(magnitude.dtype) < 0, -tiny, tiny), wide)
    return wide, list(exponents)


def to_float64(x: Tensor) -> Tensor:
    """Real numbers of any dtype as float64, read-only; denormals are kept even if this thread flushes them."""
    if x.is_floating_point():
        return scaled_float64(x.detach(), 0)[0]
    wide = x.detach().to(torch.float64)
    if x.dtype == torch.int64 and bool(((wide >= 2.0**63) | (wide.to(torch.int64) != x)).any()):
        largest = int(x.flatten()[wide.abs().argmax()])
        msg = f"an integer such as {largest} was given, which float64 cannot hold; expected moduli of at most 2**53: type .double()"
        raise InputError(msg)
    return wide


def exponent_of(x: Tensor) -> int | None:
    """The exponent of the smallest power of two above the largest entry; None if all entries are zero."""
    _, magnitude, width, least = _bits(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
    return _exponent(int(magnitude.max()), width, least)


def _exponent(top: int, width: int, least: int) -> int | None:
    field = top >> width  # from the bits: frexp may flush denormals
    bias = 126 if width == 23 else 1022
    return (field - bias if field else top.bit_length() + least) if top else None


def _bits(x: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """A contiguous float32 or float64 copy of x, the bits of its absolute values, the number of mantissa bits and the least exponent."""
    if x.dtype == torch.bfloat16:
        x = (x.contiguous().view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    elif x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32)
    x = x.contiguous()
    dtype, width, least = _LAYOUTS[x.dtype]
    return x, x.view(dtype) & torch.iinfo(dtype).max, width, least


def _scaled_in_place(x: Tensor, exponents: list[int]) -> Tensor:
    """Multiply each tensor by a power of two, in two steps if the factor itself would over- or underflow."""
    halves = [[e // 2 for e in exponents], [e - e // 2 for e in exponents]] if max(map(abs, exponents)) >= 1000 else [exponents]
    for half in halves:
        factors = [2.0**e for e in half]
        x.mul_(factors[0] if len(factors) == 1 else x.new_tensor(factors).reshape(-1, *(1,) * (x.ndim - 1)))
    return x


# ---- sums ----------------------------------------------------------------------------------------------------------------
#
# Norms and products of many float32 entries. On a CPU torch adds squares one after the other: after 2**24 equal terms a
# float32 sum stops growing. Here the entries are summed in pieces, and the norms of the pieces are combined in float64.
# `torch.sum` adds in pairs and needs no such care.

PIECE = 1 << 8  # number of entries whose squares are added in the tensor's own precision
ROWS = 1 << 12  # number of terms of an inner product in one matrix product; at least the number of columns


def norm(x: Tensor, axes: int = 1, keepdim: bool = False) -> Tensor:
    """The l2 norm over the last `axes` axes, in the precision of `x`, differentiable; the gradient at zero is zero.

    Args:
        x: real or complex, of any shape.
        axes: number of last axes that are reduced.
        keepdim: keep them as axes of length one.

    >>> norm(torch.full((2, 3, 4), 2.0), axes=2)
    tensor([6.9282, 6.9282])
    """
    rows = x.flatten(x.ndim - axes) if axes else x[..., None]
    rows = torch.view_as_real(rows.resolve_conj()).flatten(-2) if rows.is_complex() else rows
    plain = rows.shape[-1] <= PIECE or torch.compiler.is_compiling() or not torch.is_grad_enabled()
    size = _lengths(rows) if plain else _Lengths.apply(rows)
    return size.reshape(*size.shape, *(1,) * axes) if keepdim else size


def _lengths(rows: Tensor) -> Tensor:
    if rows.shape[-1] <= PIECE or rows.dtype == torch.float64:
        return torch.linalg.vector_norm(rows, dim=-1)
    whole = rows.shape[-1] - rows.shape[-1] % PIECE
    pieces = torch.linalg.vector_norm(rows[..., :whole].unflatten(-1, (-1, PIECE)), dim=-1)
    rest = torch.linalg.vector_norm(rows[..., whole:], dim=-1, keepdim=True)
    return torch.linalg.vector_norm(torch.cat([pieces, rest], -1).double(), dim=-1).to(rows.dtype)


class _Lengths(torch.autograd.Function):
    """`_lengths` with derivatives of any order. Without it, the second derivative of the nested norms is NaN if a piece is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return _lengths(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        rows, size = ctx.saved_tensors
        return rows * (grads[0] / torch.where(size > 0, size, 1.0))[..., None]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        rows, size = ctx.saved_tensors
        return (rows * tangents[0]).sum(-1) / torch.where(size > 0, size, 1.0)


def gram(tall: Tensor) -> Tensor:
    """`A* A` of matrices (..., m, n) in their own precision; with far more rows than columns, in pieces that are added in pairs.

    >>> gram(torch.ones(3, 2))
    tensor([[3., 3.],
            [3., 3.]])
    """
    rows, piece = tall.shape[-2], max(ROWS, tall.shape[-1])
    if rows < 2 * piece or tall.dtype in (torch.float64, torch.complex128):
        return tall.mH @ tall
    whole = rows - rows % piece
    pieces, rest = tall[..., :whole, :].unflatten(-2, (-1, piece)), tall[..., whole:, :]
    return (pieces.mH @ pieces).sum(-3) + rest.mH @ rest
