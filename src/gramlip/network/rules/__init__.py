"""Rules: how a difference of two inputs passes through each operation of a graph."""

from __future__ import annotations

from gramlip.network.rules import (
    activations,
    affine,
    einsum,
    joins,
    normalisation,
    patterns,
    piecewise_linear,
    pooling,
    products,
    range_limited,
    shapes,
    statistics,
)
from gramlip.network.rules.lowering import Lowered, lower
from gramlip.network.rules.registry import RULES, Call, Rule, Var, register

__all__ = [
    "RULES",
    "Call",
    "Lowered",
    "Rule",
    "Var",
    "activations",
    "affine",
    "einsum",
    "joins",
    "lower",
    "normalisation",
    "patterns",
    "piecewise_linear",
    "pooling",
    "products",
    "range_limited",
    "register",
    "shapes",
    "statistics",
]
