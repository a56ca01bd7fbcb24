"""Exact float64 copies of weights: whatever the dtype, and whether or not this thread flushes denormals."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor, exponent: int | None) -> tuple[Tensor, int]:
    """The values of x divided by `2**exponent`, as float64 or complex128, and the exponent.

    With None the exponent is chosen so that the largest entry lies in [1/2, 1). The copy is exact but for entries below
    `2**-1022` of the scale, which lose less than that: docs/rounding.md#r1-weights. Denormal weights are decoded from their
    bits, since a thread that flushes them would read zeros.
    """
    if x.is_complex():
        parts, exponent = widen(torch.view_as_real(x.resolve_conj()), exponent)
        return torch.view_as_complex(parts), exponent
    if x.dtype == torch.bfloat16:
        x = (x.contiguous().view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    elif x.dtype == torch.float16:
        x = x.to(torch.float32)
    if x.dtype == torch.float32:
        bits, width, least, dtype = x.contiguous().view(torch.int32), 23, -149, torch.int32
    else:
        bits, width, least, dtype = x.contiguous().view(torch.int64), 52, -1074, torch.int64
    magnitude = bits & torch.iinfo(dtype).max
    if exponent is None:
        top = int(magnitude.max())
        field = top >> width  # from the bits: frexp itself may flush
        bias = 126 if width == 23 else 1022
        exponent = (field - bias if field else top.bit_length() + least) if top else 0
    small = magnitude < (1 << width)
    wide = _scale(x.to(torch.float64), -exponent)
    if bool((small & (magnitude > 0)).any()):
        tiny = _scale(magnitude.to(torch.float64), least - exponent)
        wide = torch.where(small, torch.where(bits < 0, -tiny, tiny), wide)
    return wide.reshape(x.shape), exponent


def _scale(x: Tensor, exponent: int) -> Tensor:
    """The tensor times a power of two, in two steps so that the factor itself never over- or underflows."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)
