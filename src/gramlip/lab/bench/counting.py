"""What a certificate took, and the least it could have taken: operation counts, and the machine's rate of matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gramlip.lab.timing import interleaved
from gramlip.norm import certify as engine
from gramlip.norm.search.branch_and_bound import BranchAndBound
from gramlip.norm.symbol.gram_symbol import GramSymbol, SharedProductsInSingle, SquaresInSingle
from gramlip.numerics import cholesky as certificates
from gramlip.numerics.segmented import Flags, Ints, Reals

SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product gives the rate
DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


@dataclass(frozen=True)
class Counts:
    """What one call of the engine computed.

    Attributes:
        blocks: symbols that were formed.
        tested: blocks whose norm was to be proved below a threshold.
        gram_steps: blocks on which the two moments were tried.
        factorizations: Cholesky factorisations of a block.
        matvecs: products of a block with a vector.
        forming: the fewest real operations in double precision that form the tested blocks, shared products included.
        double: real operations of the factorisations in double precision.
        single: real operations in single precision, of either.
    """

    blocks: int
    tested: int
    gram_steps: int
    factorizations: int
    matvecs: int
    forming: float
    double: float
    single: float

    def seconds(self, rates: dict[str, float]) -> float:
        """The least seconds of these proofs at the machine's rate of matrix products: no lower side, no data moved, no calls."""
        return (self.forming + self.double) / rates["complex128"] + self.single / rates["complex64"]


def count(work: Callable[[], object]) -> Counts:
    """Run the work once, with searches and factorisations that are booked."""
    searches: list[_Booked] = []
    flops = {False: 0.0, True: 0.0}
    plain = certificates.cholesky

    def search(*args: Any, **options: Any) -> _Booked:
        searches.append(_Booked(*args, **options))
        return searches[-1]

    def cholesky(g: Tensor, threshold: Tensor, noise: Tensor, *, single: bool = False, **options: Any) -> Tensor:
        flops[single] += len(g) * g.shape[-1] ** 3 / 3 * (4 if g.is_complex() else 1)
        return plain(g, threshold, noise, single=single, **options)

    with patch.object(engine, "BranchAndBound", search), patch.object(certificates, "cholesky", cholesky):
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
    """What the work's certificates take by themselves: the blocks that it forms and the factorisations that it tries, again.

    Run once to record them. No lower side, no search: what is left of the work is the way to these blocks.
    """
    calls: list[Callable[[], Tensor]] = []
    form, factorise = GramSymbol.at, certificates.cholesky

    def at(self: GramSymbol, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        calls.append(partial(form, self, group, index, sizes))
        return form(self, group, index, sizes)

    def cholesky(g: Tensor, threshold: Tensor, noise: Tensor, *, single: bool = False, **options: Any) -> Tensor:
        calls.append(partial(factorise, g.clone(), threshold, noise, single=single))
        return factorise(g, threshold, noise, single=single, **options)

    with patch.object(GramSymbol, "at", at), patch.object(certificates, "cholesky", cholesky):
        work()

    def again() -> float:
        for call in calls:
            call()
        return float(len(calls))

    return again


class _Booked(BranchAndBound):
    """A search that remembers how many blocks it tested."""

    tested = 0

    def prove_blocks(self, keys: Ints, thresholds: Reals) -> Flags:
        """Book the blocks."""
        self.tested += len(keys)
        return super().prove_blocks(keys, thresholds)

    def forming(self) -> tuple[float, float]:
        """The fewest real operations that form the tested blocks, in double and in single precision.

        Half of each Hermitian product, complex ones as four real ones.
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
    """Real operations a second of a square matrix product, by dtype: the best of the trials."""
    side = 128 if quick else SIDE[device.type]
    generator = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, generator=generator, dtype=dtype).to(device) for _ in range(2))
        timing = interleaved({"": lambda a=a, b=b: a @ b}, device, max(trials, 5))[""]
        found[str(dtype).removeprefix("torch.")] = 2 * side**3 * (4 if dtype.is_complex else 1) / timing.minimum
    return found
