"""The benchmark: contenders timed against each other in one run. `gramlip bench`; docs/performance.md."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gramlip.errors import InputError
from gramlip.lab.bench import contenders
from gramlip.lab.bench.result import Options, Result, Row, rates
from gramlip.lab.compare import WARM_UP, environment

__all__ = ["ROWS", "Options", "Result", "bench"]

ROWS: dict[str, Callable[[Options], Row]] = {
    "resnet18-224": contenders.resnet18,
    "cifar-resnet": contenders.cifar,
    "any-size": contenders.any_size,
    "dense": contenders.dense,
    "orthogonal": contenders.orthogonal,
    "training": contenders.training,
    "audit": contenders.networks,
}
"""Name -> function that measures the row, in the order of the table. To add a row, write a function `Options -> Row` and a line here."""


def bench(rows: Sequence[str] = (), options: Options | None = None, keep: Callable[[Result], None] = lambda result: None) -> Result:
    """Time rows of `ROWS`, by default all, after measuring the machine's rate of matrix products.

    `keep` receives the result so far after every row. A quick run makes no claims: its layers are too small.

    Raises:
        InputError: an unknown row.
    """
    options = options or Options()
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        msg = f"row {unknown[0]!r} is unknown; expected one of {list(ROWS)}"
        raise InputError(msg)
    options.say("rates of matrix products")
    options = replace(options, rates=rates(options.device, options.trials, options.quick))
    own = {
        "dtype": str(options.dtype).removeprefix("torch."),
        "trials": options.trials,
        "warm_up_dropped": WARM_UP,
        "quick": options.quick,
        "commit": commit(),
    }
    measured = {"cuda": torch.version.cuda or "none"} if options.device.type == "cuda" else {"gpu": "not measured"}
    result = Result(environment(options.device) | own | measured | {"flops_per_second": dict(options.rates)}, {})
    for name in ROWS:
        if name in (rows or ROWS):
            row = ROWS[name](options)
            result.rows[name] = replace(row, claims=[]) if options.quick else row
            keep(result)
    return result


def commit() -> str:
    """The commit of the package's sources, with a + if they were changed since; empty outside a repository."""
    root = Path(__file__).parent.parent.parent

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(root), *words, "--", "."], capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:  # no git here
            return ""

    commit = git("log", "-1", "--format=%H")
    return commit + ("+" if commit and git("status", "--porcelain") else "")
