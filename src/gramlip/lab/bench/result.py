"""Results of the benchmark: entries, claims, table and JSON, and the operations of a certificate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gramlip.lab.compare import Timing, interleaved
from gramlip.norm import certify as engine
from gramlip.norm.branch_and_bound import BranchAndBound
from gramlip.norm.frequency_cells import Flags, Ints, Reals
from gramlip.norm.gram_symbol import GramSymbol, SharedProductsInSingle, SquaresInSingle
from gramlip.numerics import eigenvalues
from gramlip.operators.interval import Bound
from gramlip.reports.output import aligned

# ---- what a certificate took ---------------------------------------------------------------------------------------------

SIDE = {"cpu": 1024, "cuda": 8192}  # size of the matrices whose product gives the rate
DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


@dataclass(frozen=True)
class Counts:
    """Counts of the work in one certified bound.

    Attributes:
        blocks: symbols that were formed.
        tested: blocks that were tested against a threshold.
        gram_steps: blocks on which the two moments were tried.
        factorizations: Cholesky factorisations of a block.
        matvecs: products of a block with a vector.
        forming: the fewest real operations in double precision that form the tested blocks, shared products included.
        double: real operations of the factorisations in double precision.
        single: real operations in single precision, of both kinds.
    """

    blocks: int
    tested: int
    gram_steps: int
    factorizations: int
    matvecs: int
    forming: float
    double: float
    single: float

    def seconds(self, rates: Mapping[str, float]) -> float:
        """The shortest time of these proofs in seconds, at the rate of matrix products, without lower bounds, memory traffic or calls."""
        return (self.forming + self.double) / rates["complex128"] + self.single / rates["complex64"]


def count(work: Callable[[], object]) -> Counts:
    """Run the work once, and count searches and factorisations."""
    searches: list[_Booked] = []
    flops = {False: 0.0, True: 0.0}
    plain = eigenvalues.cholesky

    def search(*args: Any, **options: Any) -> _Booked:
        searches.append(_Booked(*args, **options))
        return searches[-1]

    def cholesky(g: Tensor, threshold: Tensor, noise: Tensor, *, single: bool = False, **options: Any) -> Tensor:
        flops[single] += len(g) * g.shape[-1] ** 3 / 3 * (4 if g.is_complex() else 1)
        return plain(g, threshold, noise, single=single, **options)

    with patch.object(engine, "BranchAndBound", search), patch.object(eigenvalues, "cholesky", cholesky):
        work()
    tallies, formed = [s.tally for s in searches], [s.forming() for s in searches]
    return Counts(
        sum(t.blocks for t in tallies),
        sum(s.tested for s in searches),
        sum(t.gram_steps for t in tallies),
        sum(t.factorizations for t in tallies),
        sum(t.matvecs for t in tallies),
        sum(double for double, _ in formed),
        flops[False],
        sum((single for _, single in formed), flops[True]),
    )


def proofs(work: Callable[[], object]) -> Callable[[], float]:
    """Repeat only the blocks that the work forms and the factorisations that it tries.

    A first run records them. Lower bounds and the search are left out.
    """
    calls: list[Callable[[], Tensor]] = []
    form, factorise = GramSymbol.at, eigenvalues.cholesky

    def at(self: GramSymbol, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        calls.append(partial(form, self, group, index, sizes))
        return form(self, group, index, sizes)

    def cholesky(g: Tensor, threshold: Tensor, noise: Tensor, *, single: bool = False, **options: Any) -> Tensor:
        calls.append(partial(factorise, g.clone(), threshold, noise, single=single))
        return factorise(g, threshold, noise, single=single, **options)

    with patch.object(GramSymbol, "at", at), patch.object(eigenvalues, "cholesky", cholesky):
        work()

    def again() -> float:
        for call in calls:
            call()
        return float(len(calls))

    return again


class _Booked(BranchAndBound):
    """A search that records how many blocks it tested."""

    tested = 0

    def prove_blocks(self, keys: Ints, thresholds: Reals) -> Flags:
        """Count the blocks."""
        self.tested += len(keys)
        return super().prove_blocks(keys, thresholds)

    def forming(self) -> tuple[float, float]:
        """The fewest real operations that form the tested blocks, in double and in single precision.

        A Hermitian product counts half, a complex one as four real ones.
        """
        g = self.symbol
        taps, field = math.prod(g.span), 4 if g.is_complex else 1
        if g.taps is not None:
            shared = float(g.groups * taps**2 * g.rows * g.side**2 * field)
            each = float(self.tested * 2 * len(g.offsets) * g.side**2 * (2 if g.is_complex else 1))
            return (shared, each) if isinstance(g.strategy, SharedProductsInSingle) else (shared + each, 0.0)
        square = 4 * g.rows * g.side**2 if g.axes else g.rows * g.side**2 * field
        symbol = 4 * taps * g.rows * g.side if g.axes else 0
        if isinstance(g.strategy, SquaresInSingle):
            return float(self.tested * symbol), float(self.tested * square)
        return float(self.tested * (symbol + square)), 0.0


def rates(device: torch.device, trials: int, quick: bool = False, dtypes: Sequence[torch.dtype] = DTYPES) -> dict[str, float]:
    """Real operations per second of a square matrix product, by dtype; the best of the trials."""
    side = 128 if quick else SIDE[device.type]
    generator = torch.Generator().manual_seed(0)
    rates: dict[str, float] = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, generator=generator, dtype=dtype).to(device) for _ in range(2))
        timing = interleaved({"": lambda a=a, b=b: a @ b}, device, max(trials, 5))[""]
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 * (4 if dtype.is_complex else 1) / timing.minimum
    return rates


# ---- entries and claims --------------------------------------------------------------------------------------------------

OURS = "gramlip"
Work = Callable[[], "Bound | list[Bound] | float"]


@dataclass(frozen=True)
class Options:
    """The options of a run; `dtype` is that of the weights, `models` a folder of trained ones.

    `quick` shrinks the rows to seconds, `full` adds rows that take minutes.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    trials: int = 3
    quick: bool = False
    full: bool = False
    models: Path = Path("../shared/models")
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Entry:
    """One contender on one case.

    Attributes:
        row: the row's name.
        case: the layer, or "total".
        contender: the name of the timed method; names that begin with `gramlip` are ours.
        minimum: the fastest trial in seconds; for a total, the sum over its cases.
        median: the median trial, likewise.
        ratio: median over that of `gramlip` in the same case: above 1 where `gramlip` is faster.
        value: the upper end of an interval, or the value of the method.
        width: `upper / lower - 1`, the largest of several; None without a certificate.
        gap: value over the truth minus 1 (of several: the one farthest from 0), if an SVD gave the truth.
        counts: counts of the work.
        limit: shortest time in seconds for the certificate's operations at the measured rate of products.
        memory: peak memory in bytes of a process that did only this.
    """

    row: str
    case: str
    contender: str
    minimum: float
    median: float
    ratio: float | None = None
    value: float | None = None
    width: float | None = None
    gap: float | None = None
    counts: Counts | None = None
    limit: float | None = None
    memory: int | None = None

    @property
    def over(self) -> float | None:
        """The time as a multiple of the limit."""
        return self.median / self.limit if self.limit else None


@dataclass(frozen=True)
class Claim:
    """A claim that a ratio is at least, or at most, a number."""

    row: str
    text: str
    measured: float
    bound: float
    least: bool

    @property
    def met(self) -> bool:
        """Whether the claim holds in this run."""
        return self.measured >= self.bound if self.least else self.measured <= self.bound


@dataclass
class Row:
    """The result of a row: entries, claims, and notes on what was left out."""

    name: str = ""
    entries: list[Entry] = field(default_factory=list["Entry"])
    claims: list[Claim] = field(default_factory=list["Claim"])
    notes: list[str] = field(default_factory=list[str])

    def of(self, case: str, contender: str) -> Entry:
        """The entry of a contender on a case."""
        return next(e for e in self.entries if e.case == case and e.contender == contender)

    def at_least(self, text: str, measured: float, bound: float) -> None:
        """Add the claim that a ratio is at least a number."""
        self.claims.append(Claim(self.name, text, measured, bound, True))

    def at_most(self, text: str, measured: float, bound: float) -> None:
        """Add the claim that a ratio is at most a number."""
        self.claims.append(Claim(self.name, text, measured, bound, False))

    def contest(
        self,
        case: str,
        works: Mapping[str, Work],
        options: Options,
        *,
        truths: Mapping[str, float] | None = None,
        counted: Iterable[str] = (),
    ) -> None:
        """Time the contenders against each other and add their entries; those in `truths` get a gap, those `counted` a limit."""
        options.say(f"{self.name}: {case}")
        counts = {who: count(works[who]) for who in counted}
        times = interleaved(works, options.device, options.trials)
        base = times[OURS].median if OURS in times else None
        for who, time in times.items():
            entry = replace(_timed(time), row=self.name, case=case, contender=who, ratio=time.median / base if base else None)
            if truths and who in truths and entry.value is not None:
                entry = replace(entry, gap=entry.value / truths[who] - 1)
            if who in counts:
                entry = replace(entry, counts=counts[who], limit=counts[who].seconds(options.rates))
            self.entries.append(entry)


def _timed(time: Timing[Bound | list[Bound] | float]) -> Entry:
    """The entry of a contender without its place: its times, the value and the width of its interval."""
    result = time.value
    bounds = result if isinstance(result, list) else [result] if isinstance(result, Bound) else []
    value = result if isinstance(result, float) else float(bounds[0].upper) if len(bounds) == 1 else None
    width = max((float(b.upper) / b.lower - 1 if b.lower else math.inf for b in bounds), default=None)
    return Entry("", "", "", time.minimum, time.median, value=value, width=width)


def total(entries: Sequence[Entry], case: str = "total") -> list[Entry]:
    """For each contender the sum of times, counts and limits over the cases, and the largest width and gap."""
    sums: list[Entry] = []
    base = sum(e.median for e in entries if e.contender == OURS)
    for who in dict.fromkeys(e.contender for e in entries):
        rows = [e for e in entries if e.contender == who]
        median = sum(e.median for e in rows)
        booked = [e.counts for e in rows if e.counts]
        counts = Counts(*(sum(values) for values in zip(*(asdict(c).values() for c in booked), strict=True))) if booked else None
        gaps, widths = [e.gap for e in rows if e.gap is not None], [e.width for e in rows if e.width is not None]
        limits = [e.limit for e in rows if e.limit is not None]
        sums.append(
            Entry(
                rows[0].row,
                case,
                who,
                sum(e.minimum for e in rows),
                median,
                median / base if base else None,
                None,
                max(widths, default=None),
                max(gaps, key=abs, default=None),
                counts,
                sum(limits) if limits else None,
            )
        )
    return sums


@dataclass(frozen=True)
class Result:
    """The result of a run: its header, and each row; `print` it for tables."""

    header: dict[str, Any]
    rows: dict[str, Row]

    def to_json(self) -> str:
        """Standard JSON text, schema 1; infinite numbers are null."""
        rows = {
            name: {
                "entries": [{key: _finite(value) for key, value in asdict(e).items()} | {"over_limit": e.over} for e in row.entries],
                "claims": [{key: _finite(value) for key, value in asdict(c).items()} | {"met": c.met} for c in row.claims],
                "notes": row.notes,
            }
            for name, row in self.rows.items()
        }
        return json.dumps({"schema": 1, "header": self.header, "rows": rows}, indent=1, allow_nan=False) + "\n"

    def __str__(self) -> str:
        parts = [", ".join(f"{key} {value}" for key, value in self.header.items() if not isinstance(value, dict))]
        for name, row in self.rows.items():
            parts.append(
                "\n\n".join([name, *([aligned(_table(row.entries), right=tuple(range(2, 9)))] if row.entries else []), *row.notes])
            )
        claims = [c for row in self.rows.values() for c in row.claims]
        if claims:
            lines = [("claim", "measured", "wanted", "")]
            lines += [
                (f"{c.row}: {c.text}", f"{c.measured:.3g}", f"{'>=' if c.least else '<='} {c.bound:g}", "met" if c.met else "NOT met")
                for c in claims
            ]
            parts.append(aligned(lines, right=(1, 2)))
        return "\n\n".join(parts)


def _table(entries: list[Entry]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("case", "contender", "min ms", "median ms", "ratio", "width", "gap", "factorised", "times limit")]
    for e in entries:
        numbers = [f"{1e3 * e.minimum:.4g}", f"{1e3 * e.median:.4g}", *(_short(x) for x in (e.ratio, e.width, e.gap))]
        rows.append((e.case, e.contender, *numbers, str(e.counts.factorizations) if e.counts else "", _short(e.over)))
    return rows


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
