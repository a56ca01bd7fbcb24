"""`Report`: one row a layer, what was left out and why, the network's interval; as text for people, as JSON for programs."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from html import escape
from typing import Any

from gramlip.errors import InputError
from gramlip.operators.interval import Bound, decimals
from gramlip.operators.linear_maps import Operator


def printable(text: str) -> str:
    """The text on one line, with escapes for what a terminal would act on (names come from files of unknown origin)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class LayerRow:
    """A layer's row: the operator that was bounded, and its interval; `input_size` is None where it holds for every size.

    `share` is the layer's part of the logarithm of the network's constant by composition (docs/network.md#shares);
    `operator` is what was bounded, for pictures.

    >>> print(LayerRow("fc", "Dense", (2, 3), None, Bound(1.0, 1.5, "a matrix")).upper)
    1.5
    """

    name: str
    op: str
    weight_shape: tuple[int, ...]
    input_size: tuple[int, ...] | None
    bound: Bound
    seconds: float | None = None
    share: float | None = None
    operator: Operator | None = field(default=None, repr=False, compare=False)

    @property
    def lower(self) -> float:
        """At most the norm of the operator."""
        return float(self.bound.lower)

    @property
    def upper(self) -> float:
        """At least the norm of the operator; infinite where nothing is known."""
        return float(self.bound.upper)

    def to_dict(self) -> dict[str, Any]:
        """The row in the JSON schema; an infinite `upper` is null."""
        size = None if self.input_size is None else list(self.input_size)
        row = {"name": self.name, "op": self.op, "weight_shape": list(self.weight_shape), "input_size": size}
        share = {} if self.share is None else {"share": self.share}
        return row | _interval(self.bound) | {"because": self.bound.because, "seconds": self.seconds} | share


@dataclass(frozen=True)
class LeftOut:
    """What no row covers, and why; `is_weight` where it acts on the input, so that nothing is known about that layer."""

    name: str
    weight_shape: tuple[int, ...]
    reason: str
    is_weight: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The row in the JSON schema."""
        return {"name": self.name, "weight_shape": list(self.weight_shape), "reason": self.reason, "is_weight": self.is_weight}


VACUOUS = 1e4  # the upper side over the lower, from where the interval says little


@dataclass(frozen=True)
class Report:
    """The answer of an audit: `print` it for a table, `to_dict` or `to_json` it for a program.

    `network` bounds the whole network, None where only weights are known. `notes` state what holds for every row.
    `unsupported` lists the calls that no rule covers, each with its place in the source; the network is unbounded then.
    Printed numbers are rounded outward; JSON numbers are exact, and null stands for infinity (no bound).

    >>> row = LayerRow("fc", "Dense", (2, 3), None, Bound(1.0, 1.5, "a matrix"))
    >>> print(Report("w.safetensors", (row,)))
    w.safetensors
    <BLANKLINE>
    layer  operator  shape  input  interval  width  why
    fc     Dense     2x3    any    [1, 1.5]   50 %  a matrix
    """

    target: str
    layers: tuple[LayerRow, ...]
    left_out: tuple[LeftOut, ...] = ()
    network: Bound | None = None
    notes: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()

    @property
    def lower(self) -> float:
        """At most the network's Lipschitz constant; the rounding of its two forward passes is measured, not proved."""
        return float(self._whole().lower)

    @property
    def upper(self) -> float:
        """At least the network's Lipschitz constant: proved, rounding included."""
        return float(self._whole().upper)

    def _whole(self) -> Bound:
        if self.network is None:
            msg = f"{self.target} holds weights alone; expected a model where the network is bounded: type gramlip.audit(model, example)"
            raise InputError(msg)
        return self.network

    def above(self, limit: float | Decimal) -> list[str]:
        """What is not proved to be at most `limit`, each with its upper side; empty where all of it is.

        A weight that was left out counts as infinite.
        """
        rows = [(row.name, row.upper) for row in self.layers if row.weight_shape]
        rows += [(row.name, math.inf) for row in self.left_out if row.is_weight]
        if self.network is not None:
            rows.append(("the network", float(self.network.upper)))
        return [f"{name} (upper {decimals(upper, upward=True)})" for name, upper in rows if not upper <= limit]

    @property
    def advice(self) -> str:
        """Where the upper side is more than `VACUOUS` times the lower: which steps make it so, and what narrows it; else nothing."""
        whole = self.network
        if whole is None or not 0.0 < VACUOUS * whole.lower < float(whole.upper) < math.inf:
            return ""
        shared = [row for row in self.layers if row.share is not None and row.share > 0.0]
        weight = (lambda row: row.share) if shared else (lambda row: row.upper)
        most = sorted(shared or [row for row in self.layers if 1.0 < row.upper < math.inf], key=weight, reverse=True)[:3]
        shown = [f"{row.name} ({f'{100 * row.share:.0f} %' if row.share is not None else decimals(row.upper, upward=True)})" for row in most]
        times = decimals(float(whole.upper) / whole.lower, upward=True, digits=2)
        return (
            f"the upper side is {times} times the lower and says little; it comes most from {', '.join(shown)}; "
            "narrower: around one input (--at FILE --radius R), on a domain (--domain LOW,HIGH), or more --effort"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, schema 1."""
        return {
            "schema": 1,
            "target": self.target,
            "layers": [row.to_dict() for row in self.layers],
            "network": None if self.network is None else _interval(self.network) | {"because": self.network.because},
            "left_out": [row.to_dict() for row in self.left_out],
            "notes": list(self.notes),
            "unsupported": list(self.unsupported),
        }

    def to_json(self) -> str:
        """The report as standard JSON text: no NaN or Infinity tokens; floats survive the round trip exactly."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        bounds = [row.bound for row in self.layers] + ([] if self.network is None else [self.network])
        counts = Counter(part for b in bounds for part in _parts(b))
        common = [part for part, n in counts.items() if n > max(1, len(bounds) / 3)]  # said once, below the table
        marks = {part: f"[{i}]" for i, part in enumerate(common, 1)}

        def shown(b: Bound) -> tuple[str, str, str]:
            lower, upper = decimals(float(b.lower), upward=False), decimals(float(b.upper), upward=True)
            shared = "".join(marks[part] for part in _parts(b) if part in marks)
            own = "; ".join(part for part in _parts(b) if part not in marks)
            return f"[{lower}, {upper}]", f"{decimals(100 * b.rtol, upward=True, digits=2)} %", f"{shared} {own}".strip()

        shared = any(row.share is not None for row in self.layers)

        def share(value: float | None) -> list[str]:
            return ([""] if value is None else [f"{100 * value:.1f} %"]) if shared else []

        rows = [("layer", "operator", "shape", "input", "interval", "width", *(["share"] if shared else []), "why")]
        for row in self.layers:
            size = "any" if row.input_size is None else _times(row.input_size)
            interval, width, why = shown(row.bound)
            rows.append((row.name, row.op, _times(row.weight_shape), size, interval, width, *share(row.share), why))
        if self.network is not None:
            interval, width, why = shown(self.network)
            rows.append(("network", "", "", "", interval, width, *share(None), why))
        parts = ["\n".join([self.target, *(_wrapped(note) for note in self.notes)]), aligned(rows, right=(5, 6) if shared else (5,))]
        if self.advice:
            parts.append(_wrapped(self.advice))
        if marks:
            parts.append("\n".join(f"{mark} {part}" for part, mark in marks.items()))
        for title, is_weight in (("weights without a bound", True), ("left out", False)):
            reasons = dict.fromkeys(row.reason for row in self.left_out if row.is_weight == is_weight)
            names = {
                reason: [row.name for row in self.left_out if (row.reason, row.is_weight) == (reason, is_weight)] for reason in reasons
            }
            if names:
                parts.append("\n".join([title, *(_wrapped(f"{reason}: {', '.join(names[reason])}") for reason in names)]))
        if self.unsupported:
            parts.append("\n".join(["no rule", *(_wrapped(call) for call in self.unsupported)]))
        return "\n".join(printable(line) for line in "\n\n".join(parts).split("\n"))


def aligned(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """The rows as text, columns two spaces apart, those in `right` aligned to the right."""
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    cells = [[c.rjust(w) if j in right else c.ljust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _interval(bound: Bound) -> dict[str, float | None]:
    return {"lower": finite(bound.lower), "upper": finite(float(bound.upper))}


def finite(value: float | None) -> float | None:
    """The number as JSON has it: null where it is infinite or not a number.

    >>> finite(1.5), finite(math.inf)
    (1.5, None)
    """
    return value if value is not None and math.isfinite(value) else None


def _parts(bound: Bound) -> list[str]:
    return list(dict.fromkeys(bound.because.split("; ")))


def _wrapped(text: str) -> str:
    return textwrap.fill(
        printable(text), 120, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
