"""Rules for operations of a graph: `RULES` holds those that exist, `register` adds one. docs/extending.md."""

from __future__ import annotations

from gramlip.network.rules import RULES, Call, Rule, Var, register

__all__ = ["RULES", "Call", "Rule", "Var", "register"]
