"""What differs on a GPU: a call costs more than the arithmetic of many blocks, and no theorem on LAPACK holds."""

from __future__ import annotations

import math

import torch

SWEEP_BYTES = 512 << 20  # a GPU starts from cells that close the interval while their blocks are smaller than this together
SWEEP_OPERATIONS = 4e11  # and take fewer operations
SURVEY_OPERATIONS = 6e10  # and finds vectors for all of them at once where this takes fewer
SWEEP_SLACK = 0.45  # part of the width that such cells may take
START = 8  # cells a side to start from, for each unit of degree


def parallel(device: torch.device) -> bool:
    """Whether the device works on many blocks in the time of a call."""
    return device.type != "cpu"


def resolution(axes: int, rtol: float) -> float:
    """Multiples of `START` cells for each unit of degree that take a part `SWEEP_SLACK` of the width: theorem 7."""
    return math.pi / START * math.sqrt(axes / (2 * SWEEP_SLACK * rtol))
