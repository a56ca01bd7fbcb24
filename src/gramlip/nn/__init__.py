"""Training with a Lipschitz constant: normalise, rescale, penalise, cap or monitor weights, and bake certified plain weights."""

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
    """Return `LightningMonitor` or `TrainerMonitor`; the package of its base class is imported only now."""
    return getattr(monitor, name)
