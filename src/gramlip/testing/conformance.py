"""`conformance`: any library's norm function over the case table, judged against the oracle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gramlip.testing.cases import Case, cases

ROUNDING = 1e-12  # of the oracle: nothing closer than this to the truth is called false
VERDICTS = {
    "sound": "not below the truth and not too loose",
    "loose": "not below the truth, but too large",
    "open": "no upper bound claimed (infinite)",
    "below": "an upper bound below the truth",
    "above": "a lower bound above the truth",
    "nan": "not a number",
    "failed": "an exception",
}


@dataclass(frozen=True)
class Row:
    """One case: what was claimed, what is true, the verdict (a key of `VERDICTS`), the exception if there was one."""

    case: Case
    truth: float
    lower: float
    upper: float
    verdict: str
    note: str = ""

    @property
    def ratio(self) -> float:
        """Claimed upper bound over truth."""
        if self.truth == 0.0:
            return 1.0 if self.upper == 0.0 else math.inf
        return self.upper / self.truth


@dataclass(frozen=True)
class Conformance:
    """The table of all cases; prints its counts and the worst cases of each kind of failure."""

    rows: tuple[Row, ...]
    loose: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases for each verdict."""
        found = Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in VERDICTS}

    @property
    def sound(self) -> bool:
        """Whether no claim was false: nothing below, above or not a number (failures make no claim)."""
        return not any(self.counts[verdict] for verdict in ("below", "above", "nan"))

    def of(self, verdict: str) -> tuple[Row, ...]:
        """The rows with that verdict, the worst first."""
        rows = (row for row in self.rows if row.verdict == verdict)
        return tuple(sorted(rows, key=lambda row: row.ratio, reverse=verdict == "loose"))

    def __str__(self) -> str:
        lines = [", ".join(f"{n} {verdict}" for verdict, n in self.counts.items() if n) + f" of {len(self.rows)} cases"]
        for verdict in ("below", "above", "nan", "failed", "loose"):
            lines += [f"{verdict:>6}  {_claim(row):<28}  {row.case.name}" for row in self.of(verdict)[:5]]
        return "\n".join(lines)


def conformance(fn: Callable[..., object], table: Iterable[Case] | None = None, *, loose: float = 1.5) -> Conformance:
    """Runs a norm function over the table and judges each answer against the oracle, one-sidedly.

    Args:
        fn: called as `fn(module, input_size)` with a fresh torch layer (`nn.Linear`, `nn.Conv*d`, `nn.ConvTranspose*d`) and its
            spatial size, () for a linear layer. It returns an upper bound, a pair (lower, upper) or an object with these
            two attributes.
        table: cases to run; by default all of `cases()` that are one torch layer.
        loose: an upper bound above this multiple of the truth is called loose.

    Reference: docs/conformance.md.

    >>> print(conformance(lambda module, input_size: module.weight.detach().norm(), [Case("ones", (1, 1, 3), (5,))]))
    1 below of 1 cases
     below  1.73205 of 2.52434            ones 1x1x3 n=5 fp32
    """
    chosen = [case for case in cases() if case.plain] if table is None else table
    return Conformance(tuple(_judge(fn, case, loose) for case in chosen), loose)


def _judge(fn: Callable[..., object], case: Case, loose: float) -> Row:
    truth = case.truth
    try:
        lower, upper = _interval(fn(case.module(), case.size))
    except Exception as error:  # whatever a library raises is its answer
        return Row(case, truth, 0.0, math.inf, "failed", f"{type(error).__name__}: {error}")
    return Row(case, truth, lower, upper, _verdict(truth, lower, upper, loose))


def _verdict(truth: float, lower: float, upper: float, loose: float) -> str:
    if math.isnan(lower) or math.isnan(upper):
        return "nan"
    if upper < truth * (1 - ROUNDING):
        return "below"
    if lower > truth * (1 + ROUNDING):
        return "above"
    if upper == math.inf:
        return "open"
    return "loose" if upper > loose * truth else "sound"


def _interval(answer: Any) -> tuple[float, float]:
    if isinstance(answer, tuple):
        return _number(answer[0]), _number(answer[1])  # type: ignore[reportUnknownArgumentType]
    if hasattr(answer, "lower") and hasattr(answer, "upper"):
        return _number(answer.lower), _number(answer.upper)
    return 0.0, _number(answer)


def _number(x: Any) -> float:
    return float(x.detach() if isinstance(x, Tensor) else x)


def _claim(row: Row) -> str:
    if row.verdict == "failed":
        return row.note[:28]
    value = row.lower if row.verdict == "above" else row.upper
    return f"{value:.6g} of {row.truth:.6g}"
