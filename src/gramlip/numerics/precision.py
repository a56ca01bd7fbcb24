"""Exact float64 copies of weights, and what dtypes, torch's settings and a device make of products."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gramlip.errors import InputError

# The dtypes of weights that are bounded.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)

# ---- settings ------------------------------------------------------------------------------------------------------------
#
# What the global settings make of float32 products: they are read, never changed, and no proof rests on them.


def full_products() -> bool:
    """Whether float32 products are float32 products: no TF32 and no bfloat16 behind them."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    modes = [getattr(backend, "fp32_precision", None) for backend in backends]
    if modes[0] is None:  # before torch 2.9 there was one switch
        return torch.get_float32_matmul_precision() == "highest"
    return all(mode in (None, "none", "ieee") for mode in modes)


def in_norm_precision(x: Tensor) -> Tensor:
    """A tensor in the precision that norms are computed in: at least float32, float64 where float32 products are cut short.

    Code that torch compiles cannot ask for that: there they are what the settings say.
    """
    full = torch.compiler.is_compiling() or full_products()
    x = x.float() if x.dtype.itemsize == 1 else x  # torch promotes no type of 8 bits
    return x.to(torch.promote_types(x.dtype, torch.float32 if full else torch.float64))


def real_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a norm of this tensor: float64 for double precision, otherwise float32."""
    return torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast on the tensor's device, where that has one."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


# ---- devices -------------------------------------------------------------------------------------------------------------
#
# What differs on a GPU: a call costs more than the arithmetic of many blocks, and no theorem on LAPACK holds.


def parallel(device: torch.device) -> bool:
    """Whether the device works on many blocks in the time of a call."""
    return device.type != "cpu"


def on_cpu() -> AbstractContextManager[object]:
    """New tensors on the CPU, whatever the default device; the context costs time, so only where it is needed."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


# ---- exact copies --------------------------------------------------------------------------------------------------------
#
# Exact float64 copies of weights: whatever the dtype, and whether or not this thread flushes denormals.

_LAYOUTS = {torch.float32: (torch.int32, 23, -149), torch.float64: (torch.int64, 52, -1074)}


def scaled_float64(x: Tensor, exponent: int | None) -> tuple[Tensor, int]:
    """The values of x divided by `2**exponent`, as float64 or complex128, to be read alone, and the exponent.

    With None the exponent is chosen so that the largest entry lies in [1/2, 1). The copy is exact but for entries below
    `2**-1022` of the scale, which lose less than that: docs/rounding.md#r1-weights. Denormal weights are decoded from their
    bits, since a thread that flushes them would read zeros.
    """
    wide, exponents = scaled_float64_each(x[None], None if exponent is None else [exponent])
    return wide[0], exponents[0]


def scaled_float64_each(x: Tensor, exponents: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
    """The same for each of the tensors along the first axis, with an exponent of its own."""
    if x.is_complex():
        parts, found = scaled_float64_each(torch.view_as_real(x.resolve_conj()), exponents)
        return torch.view_as_complex(parts), found
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
    """Real numbers of any dtype as float64, to be read alone: denormal ones too, whether or not this thread flushes them."""
    if x.is_floating_point():
        return scaled_float64(x.detach(), 0)[0]
    wide = x.detach().to(torch.float64)
    if x.dtype == torch.int64 and bool(((wide >= 2.0**63) | (wide.to(torch.int64) != x)).any()):
        largest = int(x.flatten()[wide.abs().argmax()])
        msg = f"an integer such as {largest} was given, which float64 does not hold; expected moduli of at most 2**53: type .double()"
        raise InputError(msg)
    return wide


def exponent_of(x: Tensor) -> int | None:
    """The exponent of the power of two above the largest entry; None where all entries are zero."""
    _, magnitude, width, least = _bits(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
    return _exponent(int(magnitude.max()), width, least)


def _exponent(top: int, width: int, least: int) -> int | None:
    field = top >> width  # from the bits: frexp itself may flush
    bias = 126 if width == 23 else 1022
    return (field - bias if field else top.bit_length() + least) if top else None


def _bits(x: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """A contiguous float32 or float64 copy of x, the bits of its moduli, the bits of a mantissa and the least exponent."""
    if x.dtype == torch.bfloat16:
        x = (x.contiguous().view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    elif x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32)
    x = x.contiguous()
    dtype, width, least = _LAYOUTS[x.dtype]
    return x, x.view(dtype) & torch.iinfo(dtype).max, width, least


def _scaled_in_place(x: Tensor, exponents: list[int]) -> Tensor:
    """Each tensor times a power of two, in two steps where the factor itself would over- or underflow."""
    halves = [[e // 2 for e in exponents], [e - e // 2 for e in exponents]] if max(map(abs, exponents)) >= 1000 else [exponents]
    for half in halves:
        factors = [2.0**e for e in half]
        x.mul_(factors[0] if len(factors) == 1 else x.new_tensor(factors).reshape(-1, *(1,) * (x.ndim - 1)))
    return x
