"""Small arrays of the search's bookkeeping, in numpy: torch takes several times as long for a call on a few numbers.

Products of any size stay in torch: numpy's threads would be in the way of torch's for a while.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Ints, Reals, Complexes, Flags = NDArray[np.int64], NDArray[np.float64], NDArray[np.complex128], NDArray[np.bool_]


def integers(values: ArrayLike) -> Ints:
    """Whole numbers of 64 bits."""
    return np.asarray(values, dtype=np.int64)


def frozen(values: Ints) -> Ints:
    """The array, which nobody can write to any more: what a cache may hand out."""
    values.flags.writeable = False
    return values


def on(device: torch.device, values: Ints | Reals | Complexes | NDArray[np.complex64]) -> Tensor:
    """A tensor on the device, to be read alone; torch takes no array that cannot be written, so that one is copied."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)


def named(keys: Ints) -> tuple[Ints, Ints]:
    """The distinct keys, sorted, and for each of the given ones where it is among them, in the same shape."""
    names, back = np.unique(keys, return_inverse=True)
    return names, back.reshape(keys.shape)


def segment_min(count: int, places: Ints, values: Reals) -> Reals:
    """The least of the values at each of so many places; infinite where there is none."""
    out = np.full(count, np.inf)
    np.minimum.at(out, places, values)
    return out


def segment_max(count: int, places: Ints, values: Reals) -> Reals:
    """The largest of the values at each of so many places, and at least 0."""
    out = np.zeros(count)
    np.maximum.at(out, places, values)
    return out


def leading(items: Ints, values: Reals) -> tuple[Ints, Ints]:
    """The order by items, in each the largest value first; and how many of the same item come before each."""
    order = np.lexsort((-values, items))
    sizes = np.bincount(items)
    return order, np.arange(len(items)) - (sizes.cumsum() - sizes)[items[order]]


def pieces(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover so many rows."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
