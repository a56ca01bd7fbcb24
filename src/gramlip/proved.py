"""What was proved where: a table of frequencies and thresholds, so that a corner that cells share is factorised once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]  # sorted keys and, for each, the least threshold that was proved there


def look_up(table: Table, keys: Tensor) -> Tensor:
    """The proved threshold of each key, infinite where there is none."""
    if not len(table[0]):
        return torch.full((len(keys),), math.inf, dtype=torch.float64)
    at = torch.searchsorted(table[0], keys).clamp_max(len(table[0]) - 1)
    return torch.where(table[0][at] == keys, table[1][at], math.inf)


def merge(table: Table, new: Table) -> Table:
    """The table with new entries, the least of each key."""
    names, back = torch.cat([table[0], new[0]]).unique(return_inverse=True)
    least = torch.full((len(names),), math.inf, dtype=torch.float64)
    return names, least.scatter_reduce_(0, back, torch.cat([table[1], new[1]]), "amin")
