"""`Report`: one row per layer, what was left out and why, and the network's interval; as text or JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from html import escape
from itertools import pairwise
from typing import Any

from gramlip.errors import InputError
from gramlip.operators.interval import Bound, decimals
from gramlip.operators.linear_maps import Operator
from gramlip.reports.output import Screen, padded, printable, shortened


@dataclass(frozen=True)
class LayerRow:
    """The row of a layer: the operator and its interval; `input_size` is None if the interval holds for every size.

    `share` is the layer's part of the logarithm of the network's constant by composition (docs/network.md#shares); `operator` is kept
    for pictures.

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
        """A lower bound of the operator's norm."""
        return float(self.bound.lower)

    @property
    def upper(self) -> float:
        """An upper bound of the operator's norm; infinite if nothing is known."""
        return float(self.bound.upper)

    def to_dict(self) -> dict[str, Any]:
        """The row in the JSON schema; an infinite `upper` is null."""
        size = None if self.input_size is None else list(self.input_size)
        row = {"name": self.name, "op": self.op, "weight_shape": list(self.weight_shape), "input_size": size}
        share = {} if self.share is None else {"share": self.share}
        return row | _interval(self.bound) | {"because": self.bound.because, "seconds": self.seconds} | share


@dataclass(frozen=True)
class LeftOut:
    """A tensor or call without a row, and the reason; `is_weight` if it acts on the input, so its layer has no bound."""

    name: str
    weight_shape: tuple[int, ...]
    reason: str
    is_weight: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The row in the JSON schema."""
        return {"name": self.name, "weight_shape": list(self.weight_shape), "reason": self.reason, "is_weight": self.is_weight}


VACUOUS = 1e4  # ratio of upper to lower bound above which the interval says little


@dataclass(frozen=True)
class Report:
    """The result of an audit: `print` it for a table, use `text(verbose=True)` for every reason, `to_dict` or `to_json` for programs.

    `network` is the interval of the whole network, None if only weights are known. `notes` apply to every row. `unsupported` lists the
    calls without a rule, each with its place in the source; the network then has no upper bound. Printed numbers are rounded outward;
    JSON numbers are exact, and null stands for infinity (no bound). `scope` says of which inputs, entries and results the network's
    interval is, where it is not of all; a domain is no scope.

    >>> row = LayerRow("fc", "Dense", (2, 3), None, Bound(1.0, 1.5, "a matrix"))
    >>> print(Report("w.safetensors", (row,)))
    w.safetensors
    <BLANKLINE>
    layer  shape  interval  width  proof
    fc     2x3    [1, 1.5]    50%  a matrix
    """

    target: str
    layers: tuple[LayerRow, ...]
    left_out: tuple[LeftOut, ...] = ()
    network: Bound | None = None
    notes: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    scope: tuple[str, ...] = ()

    @property
    def lower(self) -> float:
        """A lower bound of the network's Lipschitz constant; the rounding of its two forward passes is measured, not proved."""
        return float(self._whole().lower)

    @property
    def upper(self) -> float:
        """An upper bound of the network's Lipschitz constant, proved, rounding included."""
        return float(self._whole().upper)

    def _whole(self) -> Bound:
        if self.network is None:
            msg = f"{self.target} holds weights alone; expected a model where the network is bounded: type gramlip.audit(model, example)"
            raise InputError(msg)
        return self.network

    def above(self, limit: float | Decimal) -> list[str]:
        """(name, upper bound) of everything that is not proved to be at most `limit`.

        A weight that was left out counts as infinite.
        """
        rows = [(row.name, row.upper) for row in self.layers if row.weight_shape]
        rows += [(row.name, math.inf) for row in self.left_out if row.is_weight]
        if self.network is not None:
            rows.append(("the network", float(self.network.upper)))
        return [f"{name} (upper {decimals(upper, upward=True)})" for name, upper in rows if not upper <= limit]

    @property
    def advice(self) -> str:
        """If the upper bound is more than `VACUOUS` times the lower: the steps that cause it, and how to narrow it; otherwise empty."""
        whole = self.network
        if whole is None or not 0.0 < VACUOUS * whole.lower < float(whole.upper) < math.inf:
            return ""
        shared = [row for row in self.layers if row.share is not None and row.share > 0.0]
        weight = (lambda row: row.share) if shared else (lambda row: row.upper)
        most = sorted(shared or [row for row in self.layers if 1.0 < row.upper < math.inf], key=weight, reverse=True)[:3]
        parts = [decimals(row.upper, upward=True) if row.share is None else f"{100 * row.share:.0f}%" for row in most]
        shown = [f"{short_name(row.name)} ({part})" for row, part in zip(most, parts, strict=True)]
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
        """The report as standard JSON text, without NaN or Infinity tokens; floats survive a round trip exactly."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def text(self, screen: Screen | None = None, *, verbose: bool = False) -> str:
        """The report as text: a table and one line for each note; with `verbose` every reason and every name.

        `screen` says where the text is shown; without it the text is plain and no line of the table is cut.
        """
        screen = screen or Screen()
        parts = [[screen.styled(printable(self.target), "bold")], _table(self, screen, verbose=verbose)]
        parts += [*_verbose(self, screen)] if verbose else [_summary(self, screen)]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        """HTML for notebooks: the table, with reasons that open on click."""
        columns = _columns(self.layers, verbose=False)
        head = "".join(f"<th style='text-align:left'>{escape(column)}</th>" for column in columns)
        rows = [(row.bound, [_cell(column, row) for column in columns]) for row in self.layers]
        if self.network is not None:
            rows.append((self.network, [_cell(column, self.network_row()) for column in columns]))
        lines = "".join(f"<tr>{_html_cells(bound, cells)}</tr>" for bound, cells in rows)
        notes = "".join(f"<p>{escape(line)}</p>" for line in _summary(self, Screen()))
        return f"<p><b>{escape(printable(self.target))}</b></p><table><tr>{head}</tr>{lines}</table>{notes}"

    def network_row(self) -> LayerRow:
        """The network as the last row of the table."""
        return LayerRow("network", "", (), None, self._whole())


# ---- the table -----------------------------------------------------------------------------------------------------------

_PROOFS = (  # pattern in a reason -> short name of the theorem behind the upper bound
    (r"whose entries are rounded|finite layer itself at size \S+ \(R8\)", "this size (R8)"),
    (r"the finite layer itself", "this size (thm 11)"),
    (r"supremum over all frequencies \(theorem (\d+)\)", r"every size (thm \1)"),
    (r"restriction of a circulant", "circulant (thm 4)"),
    (r"rows of a circulant", "circular (thm 3)"),
    (r"\bcoupled\b", "layers coupled"),
    (r"^product of layers", "layer by layer"),
    (r"^averages over", "averages"),
    (r"Gram matrices of \d+ ranks, added", "matrix in parts (R11)"),
    (r"^a matrix; (?:Cholesky|Gram) \((?:theorems [^,]*, )?(R\d+)\)", r"matrix (\1)"),
)
_LONGEST_PROOF = 24
_LEAST_NAME = 24
_OPTIONAL = ("proof", "shape", "share")  # dropped in this order if the window is narrow
_RIGHT = ("width", "share")


def proof_name(because: str) -> str:
    """A short name of a proof: its main theorem, or the beginning of its first reason.

    >>> proof_name("softmax: at most 1/2 in the l2 norm"), proof_name("zero padding: the finite layer itself at size 8x8, ...")
    ('softmax', 'this size (thm 11)')
    """
    for pattern, name in _PROOFS:
        if (match := re.search(pattern, because)) is not None:
            return match.expand(name)
    return because.split("; ")[0].split(": ")[0].split(", ")[0]


def short_name(name: str) -> str:
    """The name of a folded layer, without repeating the common prefix of its parts.

    >>> short_name("block1.spatial.conv + block1.spatial.norm")
    'block1.spatial.conv + .norm'
    """
    parts = name.split(" + ")
    shown = parts[:1]
    for before, part in pairwise(parts):
        stem = before.rpartition(".")[0]
        shown.append(part.removeprefix(stem) if stem and part.startswith(f"{stem}.") else part)
    return " + ".join(shown)


def relative_width(bound: Bound) -> str:
    """The distance of the upper from the lower bound, rounded up: in per cent, or as a multiple if it is large.

    >>> relative_width(Bound(1.0, 1.01, "")), relative_width(Bound(1.0, 2.5, "")), relative_width(Bound(2.0, 50.0, ""))
    ('1.1%', '150%', '25x')
    """
    if bound.rtol == math.inf:
        return "-"
    if bound.rtol >= 10:
        return f"{math.ceil(bound.rtol + 1)}x" if bound.rtol < 1e7 else f"{decimals(bound.rtol + 1, upward=True, digits=2)}x"
    if bound.rtol > 1:
        return f"{math.ceil(100 * bound.rtol)}%"
    return f"{decimals(100 * bound.rtol, upward=True, digits=2)}%" if not 0 < bound.rtol <= 1e-4 else "0.01%"


def _number(x: float, *, upward: bool) -> str:
    """Five digits, rounded outward, without an exponent unless that is shorter."""
    text = decimals(x, upward=upward, digits=5)
    return f"{Decimal(text):f}" if 1e5 <= x < 1e9 else text


def _columns(rows: Iterable[LayerRow], *, verbose: bool) -> list[str]:
    share = ["share"] if any(row.share is not None for row in rows) else []
    return ["layer", *(["operator"] if verbose else []), "shape", *(["input"] if verbose else []), "interval", "width", *share, "proof"]


def _cell(column: str, row: LayerRow, *, verbose: bool = False) -> str:
    cells = {
        "layer": short_name(row.name),
        "operator": row.op,
        "shape": "x".join(map(str, row.weight_shape)) or ("" if verbose else row.op),
        "input": ("any" if row.op else "") if row.input_size is None else "x".join(map(str, row.input_size)),
        "interval": f"[{_number(row.lower, upward=False)}, {_number(row.upper, upward=True)}]",
        "width": relative_width(row.bound),
        "share": "" if row.share is None else f"{100 * row.share:.1f}%",
        "proof": shortened(proof_name(row.bound.because), _LONGEST_PROOF),
    }
    return cells[column]


def _table(report: Report, screen: Screen, *, verbose: bool) -> list[str]:
    """The lines of the table; columns are dropped and names shortened to fit the screen."""
    rows = [*report.layers, *([] if report.network is None else [report.network_row()])]
    texts = {column: [_cell(column, row, verbose=verbose) for row in rows] for column in _columns(rows, verbose=verbose)}
    if screen.width is not None:
        texts = _fitted(texts, screen.width)
    columns = list(texts)
    heads, *body = padded([columns, *zip(*texts.values(), strict=True)], [i for i, column in enumerate(columns) if column in _RIGHT])
    styles = [dict.fromkeys(columns, "bold"), *map(_styles, rows)]
    lines = []
    for cells, style in zip([heads, *body], styles, strict=True):
        cells[-1] = cells[-1].rstrip()
        styled = (screen.styled(cell, style.get(column, "")) for column, cell in zip(columns, cells, strict=True))
        lines.append("  ".join(styled).rstrip())
    return lines


def _fitted(texts: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """The columns that fit into the width, with layer names shortened to the remaining space."""
    widths = {column: max(len(column), *(len(printable(cell)) for cell in cells)) for column, cells in texts.items()}
    kept, optional = list(texts), [column for column in _OPTIONAL if column in texts]

    def room() -> int:
        return width - sum(widths[column] + 2 for column in kept if column != "layer")

    while optional and room() < min(widths["layer"], _LEAST_NAME):
        kept.remove(optional.pop(0))
    names = [shortened(printable(name), max(room(), 8)) for name in texts["layer"]]
    return {column: names if column == "layer" else texts[column] for column in kept}


def _styles(row: LayerRow) -> dict[str, str]:
    """Column -> style: no bound is red, an interval wider than `rtol` yellow, the network bold."""
    if row.upper == math.inf:
        return {"interval": "red", "proof": "dim"}
    if row.name == "network" and not row.op:
        return {"layer": "bold", "interval": "bold", "proof": "dim"}
    return {"width": "yellow" if "wider than asked for" in row.bound.because else "", "shape": "dim", "proof": "dim"}


def _html_cells(bound: Bound, cells: list[str]) -> str:
    *plain, proof = (escape(printable(cell)) for cell in cells)
    reasons = "".join(f"<li>{escape(printable(part))}</li>" for part in _parts(bound))
    shown = "".join(f"<td style='text-align:left'>{cell}</td>" for cell in plain)
    return f"{shown}<td style='text-align:left'><details><summary>{proof}</summary><ul>{reasons}</ul></details></td>"


# ---- what stands below the table -----------------------------------------------------------------------------------------

_SHOWN = 3  # number of names, calls or nodes before "and N more"


def _summary(report: Report, screen: Screen) -> list[str]:
    """One wrapped line for each note."""
    ranked = sorted((row for row in report.layers if row.share is not None), key=lambda row: -(row.share or 0.0))
    shares = ", ".join(f"{short_name(row.name)} {100 * (row.share or 0.0):.0f}%" for row in ranked[:_SHOWN])
    unbounded = [f"{row.name}, {row.reason}" for row in report.left_out if _is_unbounded(row)]
    weights = [f"{row.name} ({row.reason})" for row in report.left_out if row.is_weight]
    rest = Counter(row.reason.split(": ")[0] for row in report.left_out if not _is_unbounded(row) and not row.is_weight)
    facts = [
        ("largest shares", "bold", "" if report.advice else shares),
        ("wide", "yellow", report.advice),
        ("no finite constant", "red", _few(unbounded)),
        ("weights without a bound", "red", _few(weights)),
        ("no rule", "red", _few(list(report.unsupported))),
        ("left out", "bold", ", ".join(f"{count} x {reason}" for reason, count in rest.most_common())),
        *(("note", "dim", note) for note in report.notes),
    ]
    lines = [line for fact in facts for line in _titled(screen, *fact)]
    if report.left_out or report.unsupported:
        hint = screen.wrapped("every name and every reason: --verbose, or report.text(verbose=True)")
        lines += [screen.styled(line, "dim") for line in hint]
    return lines


def _titled(screen: Screen, title: str, style: str, text: str) -> list[str]:
    if not text:
        return []
    first, *more = screen.wrapped(text, f"{title}: ")
    return [screen.styled(title, style) + first[len(title) :], *more]


def _is_unbounded(row: LeftOut) -> bool:
    """A node of a network, not a tensor of a file."""
    return row.reason.startswith("unbounded: ")


def _few(items: list[str]) -> str:
    more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more


def _verbose(report: Report, screen: Screen) -> Iterable[list[str]]:
    """Notes, the reasons of each row, and every name that is left out: a block of lines each."""
    yield [line for note in report.notes for line in screen.wrapped(note, "  ", "    ")]
    yield from _reasons(report, screen)
    for title, is_weight in (("weights without a bound", True), ("left out", False)):
        names: dict[str, list[str]] = {}
        for row in report.left_out:
            if row.is_weight == is_weight:
                names.setdefault(row.reason, []).append(row.name)
        lines = [line for reason in names for line in screen.wrapped(f"{reason}: {', '.join(names[reason])}", "  ", "    ")]
        yield [screen.styled(title, "bold"), *lines] if lines else []
    calls = [line for call in report.unsupported for line in screen.wrapped(call, "  ", "    ")]
    yield [screen.styled("no rule", "bold"), *calls] if calls else []


def _reasons(report: Report, screen: Screen) -> Iterable[list[str]]:
    """The reasons of each row, then those that many rows share, which the rows only number."""
    bounds = [(row.name, row.bound) for row in report.layers] + ([] if report.network is None else [("network", report.network)])
    counts = Counter(part for _, bound in bounds for part in _parts(bound))
    common = [part for part, n in counts.items() if n > max(1, len(bounds) / 3)]
    marks = {part: f"[{i}]" for i, part in enumerate(common, 1)}
    lines = [screen.styled("reasons", "bold")]
    for name, bound in bounds:
        shared = "".join(marks[part] for part in _parts(bound) if part in marks)
        of_bound = "; ".join(part for part in _parts(bound) if part not in marks)
        lines += [screen.styled(f"  {printable(name)}", "bold"), *screen.wrapped(f"{shared} {of_bound}".strip(), "    ", "    ")]
    yield lines
    yield [line for part, mark in marks.items() for line in screen.wrapped(f"{mark} {part}", "  ", "      ")]


def _interval(bound: Bound) -> dict[str, float | None]:
    return {"lower": finite(bound.lower), "upper": finite(float(bound.upper))}


def finite(value: float | None) -> float | None:
    """The number for JSON: None if it is infinite or NaN.

    >>> finite(1.5), finite(math.inf)
    (1.5, None)
    """
    return value if value is not None and math.isfinite(value) else None


def _parts(bound: Bound) -> list[str]:
    return list(dict.fromkeys(bound.because.split("; ")))
