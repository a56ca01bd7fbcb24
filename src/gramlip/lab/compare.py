"""`compare`: every method on every layer, against the certified interval: value, side of the truth, error, time."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from gramlip.errors import InputError
from gramlip.norm.methods import METHODS, bound
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.output import aligned, printable
from gramlip.reports.pictures import figure, look
from gramlip.reports.report import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---- measuring from outside ----------------------------------------------------------------------------------------------

T = TypeVar("T")
WARM_UP = 1  # warm-up runs, which do not count
LEAST, MOST = 0.1, 20  # target duration of a trial in seconds, and the largest number of runs in it


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
    """The last value of a function, and the seconds per run in each trial that counts."""

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
    """Time functions against each other: each trial runs all of them in turn, so that other load affects all alike.

    A short function runs several times in each trial, and the trial takes the mean. Warm-up runs are dropped. A GPU is synchronised
    before and after each run, and measures the time by CUDA events.
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
    """The function's value and the median seconds of `trials` runs after the warm-up; a GPU is synchronised."""
    timing = interleaved({"": function}, device, trials)[""]
    return timing.value, timing.median


def _watch(device: torch.device) -> Callable[[], float]:
    """Start a clock; return a function that stops it and returns the seconds."""
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
    """The processor's name, if the system provides it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


# ---- compare -------------------------------------------------------------------------------------------------------------

_SIDES = {"exact": "exact", "upper": "upper", "lower": "lower", "estimate": "either", "interval": "both, proved"}


@dataclass(frozen=True)
class Value:
    """One method on one layer; if the method is not valid for it, `value` is None and `refused` says why.

    `error` is the proved part of its error: the relative distance to the certified interval [lower, upper], 0 inside.
    """

    layer: str
    weight_shape: tuple[int, ...]
    input_size: tuple[int, ...] | None
    method: str
    value: float | None
    seconds: float | None
    lower: float
    upper: float
    refused: str = ""

    @property
    def error(self) -> float | None:
        """Relative distance to the interval; None without a finite value or for a zero layer."""
        value = finite(self.value)
        return None if value is None or self.lower <= 0.0 else value / min(max(value, self.lower), self.upper) - 1

    @property
    def verdict(self) -> str:
        """The position of the value: "below", "inside" or "above" the certified interval."""
        if self.value is None:
            return ""
        return "below" if self.value < self.lower else "above" if self.value > self.upper else "inside"

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        side = METHODS[self.method].side
        return {
            "layer": self.layer,
            "weight_shape": list(self.weight_shape),
            "input_size": None if self.input_size is None else list(self.input_size),
            "method": self.method,
            "side": side,
            "value": finite(self.value),
            "error": self.error,
            "verdict": self.verdict or None,
            "seconds": self.seconds,
            "certified": {"lower": finite(self.lower), "upper": finite(self.upper)},
            "refused": self.refused or None,
        }


@dataclass(frozen=True)
class Comparison:
    """The results of all methods on all layers; `print` it for a table."""

    target: str
    values: tuple[Value, ...]
    header: dict[str, str | int] = field(default_factory=dict[str, str | int])

    @property
    def width(self) -> float:
        """The largest relative width of the certified intervals."""
        return max((v.upper / v.lower - 1 for v in self.values if v.lower > 0), default=0.0)

    def to_json(self) -> str:
        """Standard JSON text, schema 1."""
        rows = [value.to_dict() for value in self.values]
        return json.dumps({"schema": 1, "target": self.target, "header": self.header, "rows": rows}, indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "input", "method", "value", "side", "error", "stands", "time")]
        last = None
        for v in self.values:
            size = "any" if v.input_size is None else "x".join(map(str, v.input_size))
            head = (v.layer, size) if v.layer != last else ("", "")
            last = v.layer
            side = _SIDES[METHODS[v.method].side]
            if v.value is None:
                rows.append((*head, v.method, "-", side, "", "not valid here", ""))
            else:
                error = "" if v.error is None else f"{100 * v.error:+.3g} %" if v.error else "0"
                rows.append((*head, v.method, f"{v.value:.6g}", side, error, v.verdict, f"{1e3 * (v.seconds or 0):.3g} ms"))
        text = [self.target, aligned(rows, right=(3, 5, 7)), aligned(self._totals(), right=(2, 3, 4)), self._legend()]
        return "\n\n".join(text)

    def _totals(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("all layers", "side", "valid on", "product of 1 + error", "total time")]
        for name in dict.fromkeys(v.method for v in self.values):
            valid = [v for v in self.values if v.method == name and v.value is not None]
            if valid:
                known = [v.error for v in valid if v.lower > 0]  # a zero layer has no relative error
                ratio = "" if None in known else f"{math.prod(1 + error for error in known if error is not None):.6g}"
                seconds = sum(v.seconds or 0 for v in valid)
                layers = len({v.layer for v in self.values})
                rows.append((name, _SIDES[METHODS[name].side], f"{len(valid)} of {layers}", ratio, f"{1e3 * seconds:.3g} ms"))
        return rows

    def _legend(self) -> str:
        header = ", ".join(f"{key} {value}" for key, value in self.header.items())
        certify = "\ncertify: its upper side at the width that gramlip.bound asks for by default, 1e-2, in the time that this takes."
        return (
            "side: where the formula stands in exact arithmetic; error: distance to the certified interval, 0 inside;\n"
            f"stands: where the value lies against that interval, which is at most {self.width:.1g} wide."
            f"{certify if any(v.method == 'certify' for v in self.values) else ''}\n{header}"
        )


def compare(
    target: str,
    operators: Iterable[tuple[str, Dense | Conv]],
    methods: Sequence[str] = (),
    *,
    rtol: float = 1e-4,
    trials: int = 3,
    watch: Callable[[list[tuple[str, Dense | Conv]]], Iterable[tuple[str, Dense | Conv]]] = iter,
) -> Comparison:
    """Compute the published value of every method, beside the certified interval, for each operator.

    Args:
        target: the title.
        operators: (name, operator) pairs.
        methods: names in `METHODS`; all of them by default.
        rtol: relative width of the certified interval for the errors; the row of `certify` keeps its default.
        trials: timed runs of each method after a warm-up run; the median counts.
        watch: wraps the iteration, for instance to show progress.

    Raises:
        InputError: an unknown method, or nothing to compare.

    >>> import torch
    >>> table = compare("a matrix", [("weight", Dense(torch.eye(3)))], ["frobenius", "gram"], trials=1)
    >>> [round(v.value, 6) for v in table.values]
    [1.732051, 1.0]
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        msg = f"method={unknown[0]!r} is unknown; expected one of {sorted(METHODS)}"
        raise InputError(msg)
    pairs = list(operators)
    if not pairs:
        msg = f"{target} holds no linear layer; expected matrices or convolution kernels"
        raise InputError(msg)
    chosen = list(dict.fromkeys(methods)) or list(METHODS)
    values = [v for name, op in watch(pairs) for v in _of(name, op, chosen, rtol, trials)]
    dtypes = ", ".join(sorted({str(op.weight.dtype).removeprefix("torch.") for _, op in pairs}))
    return Comparison(target, tuple(values), environment(pairs[0][1].weight.device) | {"trials": trials, "dtype": dtypes})


def _of(name: str, op: Dense | Conv, methods: Sequence[str], rtol: float, trials: int) -> list[Value]:
    truth = bound(op, rtol=rtol)
    size = op.input_size if isinstance(op, Conv) else None
    values: list[Value] = []
    for method in methods:
        value, seconds, refused = None, None, ""
        try:
            value, seconds = timed(lambda method=method: METHODS[method].value(op), op.weight.device, trials)
        except InputError as error:
            refused = str(error)
        place = (name, tuple(op.weight.shape), size)
        values.append(Value(*place, method, value, seconds, float(truth.lower), float(truth.upper), refused))  # type: ignore[arg-type]
    return values


def error_against_time(comparison: Comparison) -> Figure:
    """Each method on each layer: relative error (absolute value) against time; inside the interval, its width."""
    points: dict[str, list[tuple[float, float, bool]]] = {}
    for v in comparison.values:
        dots = points.setdefault(v.method, [])
        if v.seconds and v.error is not None and v.upper < math.inf:
            dots.append((1e3 * v.seconds, max(abs(v.error or v.upper / v.lower - 1), 1e-16), v.verdict == "below"))
    title = f"{printable(Path(comparison.target).name)} (hollow: below the truth; inside the interval: at its width)"
    return scattered({method: (method, dots) for method, dots in points.items()}, title, "relative distance to the certified interval")


def scattered(points: Mapping[str, tuple[str, Sequence[tuple[float, float, bool]]]], title: str, error: str) -> Figure:
    """Points (milliseconds, error, whether below the truth) by label, each label with its method; `error` is the name of the axis."""
    page, (ax,) = figure(width=7.2, height=4.2)
    for label, (method, dots) in points.items():
        text: str | None = label
        for below in (False, True):
            shown = [(time, size) for time, size, hollow in dots if hollow == below]
            if shown:
                style: dict[str, Any] = look(method) | {"linestyle": "none", "fillstyle": "none" if below else "full"}
                ax.plot(*zip(*shown, strict=True), label=text, **style)
                text = None  # one entry of the legend for each label
    ax.set(xscale="log", yscale="log", xlabel="time per layer (ms)", ylabel=error)
    ax.set_title(title, fontsize=10, parse_math=False)
    if ax.lines:
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return page
