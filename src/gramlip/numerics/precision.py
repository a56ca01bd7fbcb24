"""What the global settings make of float32 products: they are read, never changed, and no proof rests on them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_products() -> bool:
    """Whether float32 products are float32 products: no TF32 and no bfloat16 behind them."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    modes = [getattr(backend, "fp32_precision", None) for backend in backends]
    if modes[0] is None:  # before torch 2.9 there was one switch
        return torch.get_float32_matmul_precision() == "highest"
    return all(mode in (None, "none", "ieee") for mode in modes)


def wide(x: Tensor) -> Tensor:
    """A tensor in the precision that norms are computed in: at least float32, float64 where float32 products are cut short.

    Code that torch compiles cannot ask for that: there they are what the settings say.
    """
    full = torch.compiler.is_compiling() or full_products()
    x = x.float() if x.dtype.itemsize == 1 else x  # torch promotes no type of 8 bits
    return x.to(torch.promote_types(x.dtype, torch.float32 if full else torch.float64))


def real_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a norm of this tensor: float64 for double precision, otherwise float32."""
    return torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32


def uncast(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast on the tensor's device, where that has one."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
