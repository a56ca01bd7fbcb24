"""Measuring from outside: what ran where, and how long it took. Nothing that is measured knows of it."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from time import perf_counter
from typing import Generic, TypeVar

import numpy as np
import torch

T = TypeVar("T")
WARM_UP = 1  # runs dropped before the first that counts
LEAST, MOST = 0.1, 20  # seconds that a trial is to last, and runs that one may take for it


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


@dataclass(frozen=True)
class Timing(Generic[T]):
    """The last value that a function gave, and the seconds of a run in each trial that counts."""

    value: T
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the trials."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """The fastest trial."""
        return min(self.seconds)


def interleaved(functions: Mapping[str, Callable[[], T]], device: torch.device, trials: int) -> dict[str, Timing[T]]:
    """Time functions against each other: each trial runs all of them in turn, so that what else the machine does meets all alike.

    A short function runs several times in each trial, whose seconds are the mean. The warm-up runs are dropped; a GPU is
    waited for before and after each run, and keeps the time itself, by CUDA events.
    """
    values: dict[str, T] = {}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    runs = dict.fromkeys(functions, 1)
    for trial in range(WARM_UP + trials):
        for name, function in functions.items():
            passed = 0.0
            for _ in range(runs[name]):
                stop = _watch(device)
                values[name] = function()
                passed += stop()
            if trial >= WARM_UP:
                seconds[name].append(passed / runs[name])
            else:
                runs[name] = min(MOST, math.ceil(LEAST / max(passed, LEAST / MOST)))
    return {name: Timing(values[name], tuple(seconds[name])) for name in functions}


def timed(function: Callable[[], float], device: torch.device, trials: int) -> tuple[float, float]:
    """The function's value and the median seconds of `trials` runs after the warm-up; a GPU is waited for."""
    timing = interleaved({"": function}, device, trials)[""]
    return timing.value, timing.median


def _watch(device: torch.device) -> Callable[[], float]:
    """Start a clock; what is returned stops it and gives the seconds."""
    if device.type != "cuda":
        start = perf_counter()
        return lambda: perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record(torch.cuda.current_stream(device))

    def stop() -> float:
        last.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1e3

    return stop


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
