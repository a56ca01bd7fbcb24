"""What differs on a GPU: a call costs more than the arithmetic of many blocks, and no theorem on LAPACK holds."""

from __future__ import annotations

import torch


def parallel(device: torch.device) -> bool:
    """Whether the device works on many blocks in the time of a call."""
    return device.type != "cpu"
