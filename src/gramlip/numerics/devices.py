"""What differs on a GPU: a call costs more than the arithmetic of many blocks, and no theorem on LAPACK holds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def parallel(device: torch.device) -> bool:
    """Whether the device works on many blocks in the time of a call."""
    return device.type != "cpu"


def on_cpu() -> AbstractContextManager[object]:
    """New tensors on the CPU, whatever the default device; the context costs time, so only where it is needed."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
