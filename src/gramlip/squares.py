"""Gram blocks of a few frequencies as squares of their symbols, in single precision with a proved error."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.arrays import Reals
from gramlip.exponents import Runs
from gramlip.tall import Tall
from gramlip.taps import HALF, STRIP, mirror, strips

ROWS = 64  # rows that one product adds up
BYTES, SMALL_BYTES = 24 << 20, 1 << 20  # of symbols at once, large ones and small ones


def errors(tall: Tall, runs: Runs) -> list[float]:
    """Upper bounds of `||fl(G) - G||` for any block of each group, beyond the error in double.

    `runs` are those of the pairs of taps at each distance, whose inner products are the coefficients of the trace of G:
    docs/rounding.md#r2-symbol.
    """
    assert tall.wide is not None
    flat = tall.wide.flatten(2)
    inner: Reals = (flat @ flat.mT).cpu().numpy()
    blocks = ((inner[:, p : p + n, q : q + n].trace(axis1=1, axis2=2) for p, q, n in some) for some in runs)
    trace, *others = (np.abs(sum(some, np.zeros(len(inner)))) for some in blocks)
    most = trace + 2 * sum(others, np.zeros(len(inner)))
    grow = 1 + rd.gamma(8.0 * tall.rows * tall.side * tall.count)
    rows = min(ROWS, tall.rows)
    per = rd.gamma(1.42 * (2.0 * rows + -(-tall.rows // rows) + 4) + 3, HALF)
    mass = np.trace(inner, axis1=1, axis2=2) * tall.count  # what rounding of the inner products is relative to
    # small symbols are formed in single precision, which errs by so much of the sum of the taps' norms, whose square `mass` is no less than
    more = per * (grow - 1) + (2.01 * rd.gamma(tall.count + 3.0, HALF) * grow if tall.side <= STRIP else 0.0)
    return [rd.up(per * m * grow + more * n + 2.0**-100 * tall.rows * tall.side) for m, n in zip(most, mass, strict=True)]


def square(tall: Tall, groups: slice, waves: Tensor) -> Tensor:
    """`D(w)* D(w)` of a real kernel at the waves `exp(-i p.w)` (F, taps) of its taps: (groups F, c, c) in single precision.

    Complex products alone: no global setting cuts them short on a CPU.
    """
    assert tall.wide is not None
    kernel, count, c = tall.wide[groups], len(waves), tall.side
    out = torch.empty(len(kernel), count, c, c, dtype=torch.complex64, device=waves.device)
    form, limit = (_small, SMALL_BYTES) if c <= STRIP else (_large, BYTES)
    size = 8 * count * tall.rows * c  # of the symbols of a group, of which some are formed at once or else a few of one
    some, few = max(1, limit // size) if c <= STRIP else 1, -(-count // -(-size // limit))
    for part, blocks in zip(kernel.split(some), out.split(some), strict=True):
        for wave, places in zip(waves.split(few), blocks.split(few, 1), strict=True):
            form(part, wave, places.flatten(0, 1))
    return out.flatten(0, 1)


def _small(kernel: Tensor, waves: Tensor, out: Tensor) -> None:
    """All at once, from symbols in single precision."""
    rows, side = kernel.shape[2:]
    symbols = (waves.to(torch.complex64) @ kernel.flatten(2).to(torch.complex64)).reshape(-1, rows, side)
    left, *lefts = symbols.mH.split(ROWS, 2)
    right, *rights = symbols.split(ROWS, 1)
    torch.bmm(left, right, out=out)
    for one, other in zip(lefts, rights, strict=True):
        out.baddbmm_(one, other)


def _large(kernel: Tensor, waves: Tensor, out: Tensor) -> None:
    """Those of one group one after the other, which caches hold, each below its diagonal; symbols formed in double and rounded."""
    count, rows, side = len(waves), *kernel.shape[2:]
    symbols = torch.empty(count, rows, side, dtype=torch.complex64, device=waves.device)
    both = torch.cat([waves.real, waves.imag])
    for part, some in zip(kernel[0].split(ROWS, 1), torch.view_as_real(symbols).split(ROWS, 1), strict=True):
        found = (both @ part.flatten(1)).reshape(2, count, -1, side)
        some[..., 0], some[..., 1] = found[0], found[1]
    parts = strips(side, STRIP)
    for block, symbol in zip(out, symbols, strict=True):
        left = symbol.mH
        for i, j in parts:
            strip = block[i:j, :j]
            for k in range(0, rows, ROWS):
                torch.addmm(strip, left[i:j, k : k + ROWS], symbol[k : k + ROWS, :j], beta=float(k > 0), out=strip)
    mirror(out, parts)
