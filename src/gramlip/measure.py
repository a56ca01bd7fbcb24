"""Measuring from outside: what ran where, and how long it took. Nothing that is measured knows of it."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from time import perf_counter

import numpy as np
import torch

WARM_UP = 1  # runs dropped before the first that counts


def environment(device: torch.device) -> dict[str, str | int]:
    """The header of a measurement: device, versions, threads."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {_processor()}",
        "threads": torch.get_num_threads(),
        "gramlip": version("gramlip"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def timed(function: Callable[[], float], device: torch.device, trials: int) -> tuple[float, float]:
    """The function's value and the median seconds of `trials` runs after the warm-up; a GPU is waited for."""
    value = 0.0
    for _ in range(WARM_UP):
        value = function()
    seconds: list[float] = []
    for _ in range(trials):
        _wait(device)
        start = perf_counter()
        value = function()
        _wait(device)
        seconds.append(perf_counter() - start)
    return value, statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
