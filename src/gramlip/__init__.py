"""gramlip: how much a layer or a network can stretch its input, as an interval with a proof."""

from __future__ import annotations

import gramlip.startup  # noqa: F401  # pyright: ignore[reportUnusedImport] (first of all, before torch)
from gramlip import distributed, nn, robust
from gramlip import fixed as fixed  # registers the layers without weights
from gramlip.bound import Bound
from gramlip.conv_gram import conv_gram_norm
from gramlip.errors import InputError, UnsupportedError
from gramlip.gram import gram_norm
from gramlip.layers import describe
from gramlip.methods import METHODS
from gramlip.network import audit
from gramlip.norm import bound
from gramlip.operators import Conv, Dense, Diagonal, Separable

__all__ = [
    "METHODS",
    "Bound",
    "Conv",
    "Dense",
    "Diagonal",
    "InputError",
    "Separable",
    "UnsupportedError",
    "audit",
    "bound",
    "conv_gram_norm",
    "describe",
    "distributed",
    "gram_norm",
    "nn",
    "robust",
]
__version__ = "0.1.0"
