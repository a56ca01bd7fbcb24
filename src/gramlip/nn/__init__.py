"""Training with a Lipschitz constant: normalise, rescale, penalise, cap, watch, and bake what was learned into certified weights."""

from __future__ import annotations

from typing import Any

from gramlip.nn import monitor
from gramlip.nn.monitor import Monitor
from gramlip.nn.parametrizations import Residual, spectral_norm, spectral_norm_, spectral_rescaling, spectral_rescaling_
from gramlip.nn.parametrize import normalised, remove
from gramlip.nn.regularise import Cap, LipschitzPenalty, cap_

__all__ = [
    "Cap",
    "LipschitzPenalty",
    "Monitor",
    "Residual",
    "cap_",
    "normalised",
    "remove",
    "spectral_norm",
    "spectral_norm_",
    "spectral_rescaling",
    "spectral_rescaling_",
]


def __getattr__(name: str) -> Any:
    """`LightningMonitor` and `TrainerMonitor`, whose base classes stand in packages that are imported when they are asked for."""
    return getattr(monitor, name)
