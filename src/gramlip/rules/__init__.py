"""Rules: how a difference of two inputs passes through each operation of a graph."""

from __future__ import annotations

from gramlip.rules import activations, affine, attention, curves, einsum, joins, normalisation, patterns, pooling, shapes, statistics, steep
from gramlip.rules.lower import Lowered, lower
from gramlip.rules.registry import RULES, Call, Rule, Var, register

__all__ = [
    "RULES",
    "Call",
    "Lowered",
    "Rule",
    "Var",
    "activations",
    "affine",
    "attention",
    "curves",
    "einsum",
    "joins",
    "lower",
    "normalisation",
    "patterns",
    "pooling",
    "register",
    "shapes",
    "statistics",
    "steep",
]
