"""Rules: how a difference of two inputs passes through each operation of a graph."""

from __future__ import annotations

from gramlip.network.rules import activations, affine, piecewise_linear, shapes, statistics
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
    "lower",
    "piecewise_linear",
    "register",
    "shapes",
    "statistics",
]
