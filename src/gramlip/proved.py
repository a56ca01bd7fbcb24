"""What was proved where: a table of frequencies and thresholds, so that a corner that cells share is factorised once."""

from __future__ import annotations

import numpy as np

from gramlip.arrays import Ints, Reals, named, smallest

Table = tuple[Ints, Reals]  # sorted keys and, for each, the least threshold that was proved there


def look_up(table: Table, keys: Ints) -> Reals:
    """The proved threshold of each key, infinite where there is none."""
    if not len(table[0]):
        return np.full(len(keys), np.inf)
    at = np.searchsorted(table[0], keys).clip(max=len(table[0]) - 1)
    return np.where(table[0][at] == keys, table[1][at], np.inf)


def merge(table: Table, new: Table) -> Table:
    """The table with new entries, the least of each key."""
    names, back = named(np.concatenate([table[0], new[0]]))
    return names, smallest(len(names), back, np.concatenate([table[1], new[1]]))
