"""gramlip: how much a layer or a network can stretch its input, as an interval with a proof."""

from __future__ import annotations

import gramlip.errors  # noqa: F401  # pyright: ignore[reportUnusedImport] (first of all, before torch)
from gramlip import distributed, nn, onnx, robust
from gramlip import rules as rules  # the public face of network.rules
from gramlip.errors import InputError, UnsupportedError
from gramlip.network.audit import audit
from gramlip.network.execution import execution_error
from gramlip.norm import formulas as paper  # the algorithms of arXiv 2305.16173, under its names
from gramlip.norm.formulas import conv_gram_norm
from gramlip.norm.methods import METHODS, bound
from gramlip.numerics.eigenvalues import gram_norm
from gramlip.operators.describe import describe
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, Diagonal, Separable

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
    "execution_error",
    "gram_norm",
    "nn",
    "onnx",
    "paper",
    "robust",
]
__version__ = "0.1.0"
