"""Gram blocks of a few frequencies as squares of their symbols, in single precision with a proved error."""

from __future__ import annotations

import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.exponents import Pair
from gramlip.tall import Tall
from gramlip.taps import HALF, STRIP, mirror, strips

ROWS = 64  # rows that one product adds up
BYTES = 24 << 20  # of symbols at once, about


def errors(tall: Tall, pairs: list[list[Pair]]) -> list[float]:
    """Upper bounds of `||fl(G) - G||` for any block of each group, beyond the error in double.

    `pairs` are the pairs of taps at each distance, whose inner products are the coefficients of the trace of G:
    docs/rounding.md#r2-symbol.
    """
    assert tall.wide is not None
    flat = tall.wide.flatten(2)
    inner = flat @ flat.mT
    trace, *others = ([float(sum(one[p, q] for p, q in some)) for one in inner] for some in pairs)
    most = [sum(abs(x) for x in column) for column in zip(trace, *others, *others, strict=True)]
    grow = 1 + rd.gamma(8.0 * tall.rows * tall.side * tall.count)
    per = rd.gamma(1.42 * (2.0 * ROWS + tall.rows / ROWS + 4) + 3, HALF)
    mass = [float(one.diagonal().sum()) * tall.count for one in inner]  # what rounding of the inner products is relative to
    return [rd.up(per * (m * grow + (grow - 1) * n) + 2.0**-100 * tall.rows * tall.side) for m, n in zip(most, mass, strict=True)]


def square(tall: Tall, group: int, waves: Tensor) -> Tensor:
    """`D(w)* D(w)` of a real kernel at the waves `exp(-i p.w)` (F, taps) of its taps: (F, c, c) in single precision.

    Complex products alone: no global setting cuts them short on a CPU. One block after the other, which caches hold.
    """
    c = tall.side
    out = torch.empty(len(waves), c, c, dtype=torch.complex64, device=waves.device)
    parts = strips(c, STRIP)
    each = max(1, len(waves) // max(1, round(len(waves) * 8 * tall.rows * c / BYTES)))
    for blocks, some in zip(out.split(each), waves.split(each), strict=True):
        for block, symbol in zip(blocks, _symbols(tall, group, some), strict=True):
            left = symbol.conj().resolve_conj().mT
            for i, j in parts:
                strip = block[i:j, :j]
                for k in range(0, tall.rows, ROWS):
                    torch.addmm(strip, left[i:j, k : k + ROWS], symbol[k : k + ROWS, :j], beta=float(k > 0), out=strip)
    mirror(out, parts)
    return out


def _symbols(tall: Tall, group: int, waves: Tensor) -> Tensor:
    """`D(w)`, formed in double and rounded: (F, r, c)."""
    assert tall.wide is not None
    count = len(waves)
    out = torch.empty(count, tall.rows, tall.side, dtype=torch.complex64, device=waves.device)
    both = torch.cat([waves.real, waves.imag])
    for rows, some in zip(tall.wide[group].split(ROWS, 1), torch.view_as_real(out).split(ROWS, 1), strict=True):
        found = (both @ rows.flatten(1)).reshape(2, count, -1, tall.side)
        some[..., 0], some[..., 1] = found[0], found[1]
    return out
