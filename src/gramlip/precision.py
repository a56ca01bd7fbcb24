"""What the global settings make of float32 products: they are read, never changed, and no proof rests on them."""

from __future__ import annotations

import torch


def full_products() -> bool:
    """Whether float32 products are float32 products: no TF32 and no bfloat16 behind them."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    modes = [getattr(backend, "fp32_precision", None) for backend in backends]
    if modes[0] is None:  # before torch 2.9 there was one switch
        return torch.get_float32_matmul_precision() == "highest"
    return all(mode in (None, "none", "ieee") for mode in modes)
