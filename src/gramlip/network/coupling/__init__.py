"""Coupled bounds: several layers at once, through the slopes of the activations between them. docs/network.md#coupling."""

from __future__ import annotations

from gramlip.network.coupling.segments import Segment, coupled

__all__ = ["Segment", "coupled"]
