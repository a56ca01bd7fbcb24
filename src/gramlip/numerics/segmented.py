"""Small numpy arrays for the bookkeeping of the search: on a few numbers, a call of torch takes several times as long.

Large products stay in torch: the threads of numpy would compete with those of torch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Ints, Reals, Complexes, Flags = NDArray[np.int64], NDArray[np.float64], NDArray[np.complex128], NDArray[np.bool_]


def integers(values: ArrayLike) -> Ints:
    """The values as 64-bit integers."""
    return np.asarray(values, dtype=np.int64)


def frozen(values: Ints) -> Ints:
    """The array, made read-only, so that a cache can return it."""
    values.flags.writeable = False
    return values


def on(device: torch.device, values: Ints | Reals | Complexes | NDArray[np.complex64]) -> Tensor:
    """The array as a read-only tensor on the device; a read-only array is copied, since torch does not accept it."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)


def named(keys: Ints) -> tuple[Ints, Ints]:
    """The distinct keys, sorted, and the index of each given key among them, in the shape of `keys`."""
    names, back = np.unique(keys, return_inverse=True)
    return names, back.reshape(keys.shape)


def segment_min(count: int, places: Ints, values: Reals) -> Reals:
    """The minimum of the values of each segment; infinite for an empty segment."""
    out = np.full(count, np.inf)
    np.minimum.at(out, places, values)
    return out


def segment_max(count: int, places: Ints, values: Reals) -> Reals:
    """The maximum of the values of each segment, and at least 0."""
    out = np.zeros(count)
    np.maximum.at(out, places, values)
    return out


def leading(items: Ints, values: Reals) -> tuple[Ints, Ints]:
    """Sort by item, and by decreasing value within an item; return the order and the rank within the item."""
    order = np.lexsort((-values, items))
    sizes = np.bincount(items)
    return order, np.arange(len(items)) - (sizes.cumsum() - sizes)[items[order]]


def pieces(count: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover `count` rows."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
