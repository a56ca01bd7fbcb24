"""Gram blocks of a few frequencies as squares of their symbols, in single precision with a proved error."""

from __future__ import annotations

import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.exponents import Pair
from gramlip.tall import Tall
from gramlip.taps import HALF, STRIP, mirror, strips

ROWS = 64  # rows that one product adds up
BYTES = 4 << 20  # of symbols at once


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

    Complex products alone: no global setting cuts them short on a CPU.
    """
    count, c = len(waves), tall.side
    out = torch.empty(count, c, c, dtype=torch.complex64, device=waves.device)
    parts = strips(c, STRIP)
    started = False
    assert tall.wide is not None
    for rows in tall.wide[group].split(max(ROWS, BYTES // (8 * count * c) // ROWS * ROWS), 1):
        flat = rows.flatten(1)
        symbol = torch.complex((waves.real @ flat).to(torch.float32), (waves.imag @ flat).to(torch.float32)).reshape(count, -1, c)
        left, right = symbol.conj().resolve_conj().mT, symbol
        for k in range(0, symbol.shape[1], ROWS):
            for i, j in parts:
                out[:, i:j, :j].baddbmm_(left[:, i:j, k : k + ROWS], right[:, k : k + ROWS, :j], beta=float(started))
            started = True
    mirror(out, parts)
    return out
