"""`python tools/conformance.py`: writes docs/conformance.md, the table of every method over the cases, to standard output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gramlip
from gramlip.errors import InputError
from gramlip.testing.cases import KERNELS, TRAPS, VERDICTS, Conformance, Row, cases, conformance

Norm = Callable[[nn.Module, tuple[int, ...]], Any]

HEAD = """# Conformance

`gramlip.testing` holds the case table that this library is tested on, with its oracle, for any library's norm of a layer:

```python
from gramlip.testing import cases, conformance


def my_norm(module, input_size):  # nn.Linear, nn.Conv*d, nn.ConvTranspose*d; () for a linear layer
    return module.weight.detach().flatten(1).norm()  # an upper bound, or a pair (lower, upper)


table = conformance(my_norm, cases()[::300])  # without cases: all of them
print(table.counts["below"] > 0, len(table.of("below")) == table.counts["below"])
```

```text
True True
```

`print(table)` shows the counts and the worst cases of each kind.

The oracle pushes a basis through the real torch layer in float64 and takes the largest singular value; it uses nothing of
this library's mathematics. A claim is judged one-sidedly, with an allowance of 1e-12 relative for the oracle's own rounding:
"""


def reshaped(module: nn.Module, input_size: tuple[int, ...]) -> float:
    """The norm of the weight reshaped to a matrix: what torch's `spectral_norm` estimates and divides by."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[assignment]
    wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
    axis = 1 if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0
    return float(torch.linalg.matrix_norm(wide.movedim(axis, 0).flatten(1), 2))


def spectral_norm(module: nn.Module, input_size: tuple[int, ...]) -> float:
    """The number that `torch.nn.utils.parametrizations.spectral_norm`, freshly applied, divides the weight by."""
    before = float(module.weight.detach().abs().max())  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(module)
        after = float(module.weight.detach().abs().max())  # type: ignore[operator]
    return before / after if after else float("nan")


def method(name: str) -> Norm:
    """One of `gramlip.METHODS` as a function of a layer."""
    return lambda module, input_size: gramlip.bound(module, input_size=input_size or None, method=name)


def every_size(module: nn.Module, input_size: tuple[int, ...]) -> float:
    """The bound that holds for every input size."""
    return float(gramlip.bound(module).upper)


def _row(name: str, table: Conformance) -> str:
    refused = sum(InputError.__name__ in row.note for row in table.of("failed"))
    numbers = [str(table.counts[verdict]) for verdict in VERDICTS if verdict != "failed"]
    worst = min((row.ratio for row in table.rows if row.verdict != "failed" and row.truth), default=1.0)
    return f"| {name} | {' | '.join(numbers)} | {table.counts['failed'] - refused} | {refused} | {_short(worst)} |"


def _short(ratio: float) -> str:
    return "" if ratio >= 1 else f"{ratio:.3g}"


def _claim(row: Row | None) -> str:
    if row is None:
        return ""
    if row.verdict == "failed":
        return "refused" if InputError.__name__ in row.note else "fails"
    text = "inf" if row.upper == float("inf") else f"{row.upper:.4g}"
    return f"**{text}**" if row.verdict in ("below", "nan") else text


def page() -> str:
    """The whole page, from all cases that are one torch layer."""
    table = [case for case in cases() if case.plain]
    functions: dict[str, Norm] = {f"`{name}`": method(name) for name in gramlip.METHODS}
    functions["`bound(layer)`, every size"] = every_size
    functions["torch `spectral_norm`"] = spectral_norm
    functions["the reshaped weight"] = reshaped
    results = {name: conformance(fn, table) for name, fn in functions.items()}
    lines = [HEAD, *(f"- **{verdict}**: {meaning}" for verdict, meaning in VERDICTS.items()), ""]
    lines += [
        f"All {len(table)} cases that are one torch layer ({len(TRAPS)} of them named traps and known answers) in 0 to 3 dimensions,",
        f"with {len(KERNELS)} named kernels, all paddings, strides, dilations, groups and dtypes that torch takes. *Refused*: the",
        "method says that it does not hold for this layer. *Worst*: the least ratio of claim and truth, where below 1. Written by",
        "`python tools/conformance.py > docs/conformance.md` in a few minutes.",
        "",
        "| method | " + " | ".join(verdict for verdict in VERDICTS if verdict != "failed") + " | failed | refused | worst |",
        "|---|" + "---:|" * (len(VERDICTS) + 2),
        *(_row(name, found) for name, found in results.items()),
        "",
        "## Traps",
        "",
        "Each of these broke a published library, or has an answer known beforehand. Upper bounds; **bold** where below the truth",
        "or not a number.",
        "",
    ]
    shown = ["`certify`", "`gram`", "`singla2021`", "torch `spectral_norm`", "the reshaped weight"]
    lines += ["| trap | truth | " + " | ".join(shown) + " |", "|---|" + "---:|" * (len(shown) + 1)]
    for label, case in TRAPS.items():
        found = [next((row for row in results[name].rows if row.case == case), None) for name in shown]
        lines.append(f"| {label} | {case.truth:.4g} | {' | '.join(map(_claim, found))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
