"""A finite layer's own interval: its block-banded certificate, and its matrix as a whole. docs/theory.md#finite-layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gramlip.norm.finite.layer import Certificate, Layer, start_like
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import widen
from gramlip.operators.linear_maps import Conv

FRESH = 3  # other start vectors that are tried before the interval stays wider than asked for
ENTRIES = 1 << 20  # of the largest matrices that are formed as a whole


def banded(layer: Layer, tap_norm_sums: Sequence[float], rtol: float, best: int, lower: float, x: Tensor) -> tuple[float, float, str]:
    """Both ends, group by group, from a vector x of the group `best` with its quotient `lower`; wider than `rtol` where rounding is."""
    top, floor, factorizations, width = lower, 0.0, 0, rtol * 0.98
    for group, tap_norm_sum in enumerate(tap_norm_sums):
        if rd.mul_up(tap_norm_sum, rd.sqrt_up(float(layer.shared))) <= top:
            continue
        certificate = Certificate(layer, group)
        certificate.prepare()
        # a map that cancels to nothing is closed to what rounding can tell from zero
        floor = max(floor, 2 * rd.sqrt_up(certificate.noise(tap_norm_sum)))
        width = max(width, certificate.attainable_rtol(top, tap_norm_sum))
        vector = leading = x if group == best else start_like(layer, x)
        fresh = 0
        while True:
            factorizations += 1
            if certificate.proves(max(top * (1 + width), floor), tap_norm_sum):
                break
            before = top
            vector, _ = layer.ascend(vector, group, steps=24)
            if (value := layer.lower(vector, group, tap_norm_sum)) > top:
                top, leading = value, vector
            if top > before * (1 + width / 50):
                continue
            fresh += 1  # the start may have had no part in the leading vector: others, before the interval stays wider than asked for
            vector = start_like(layer, x, fresh) if fresh <= FRESH else leading
            width *= 1.5 if fresh > FRESH else 1.0
    upper = max(rd.mul_up(top, rd.up(1 + width)), floor)
    return top, upper, f"block-banded Cholesky (theorem 11, R3), {factorizations} factorizations"


def small(op: Conv) -> bool:
    """Whether the matrices of all groups of a layer of given size are formed as a whole."""
    taps, sizes, outputs = op.weight.shape[2:], op.sizes or (), op.output_size or ()
    return math.prod(op.weight.shape[:2]) * math.prod(outputs) * max(math.prod(sizes), math.prod(taps)) <= ENTRIES


def rounded(layer: Layer, group: int, tap_norm_sum: float) -> tuple[Tensor, float]:
    """The matrix of one group, unscaled, and a bound of the norm of its error: zero where no two taps of an output read one input.

    `tap_norm_sum` bounds `sum_p ||K_p||_F`, unscaled too. docs/rounding.md#r8-the-matrix-of-a-layer.
    """
    kernel = widen(layer.source[group], 0)[0].flatten(2).permute(2, 0, 1)  # exact, denormals too
    taps, m, n = kernel.shape
    outputs, inputs = math.prod(layer.outputs), math.prod(layer.sizes)
    reads = layer.reads.reshape(outputs, taps)
    at = torch.arange(outputs, device=reads.device)[:, None].expand(-1, taps), reads
    met = torch.zeros(outputs, inputs + 1, dtype=torch.int64, device=reads.device)
    most = int(met.index_put_(at, torch.ones_like(reads), accumulate=True)[:, :-1].max())
    matrix = kernel.new_zeros(outputs, inputs + 1, m, n)
    matrix.index_put_(at, kernel.expand(outputs, -1, -1, -1), accumulate=most > 1)
    error = 0.0
    if most > 1:
        error = rd.mul_up(rd.mul_up(rd.gamma(2.0 * most), tap_norm_sum), rd.sqrt_up(float(layer.shared)))
        error = rd.add_up(error, rd.mul_up(2.0 * most * matrix.numel(), rd.TINY))
    return matrix[:, :-1].permute(0, 2, 1, 3).reshape(outputs * m, inputs * n), error
