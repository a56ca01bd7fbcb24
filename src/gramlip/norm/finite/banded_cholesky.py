"""A finite layer's own interval: its block-banded certificate, and its matrix as a whole. docs/theory.md#finite-layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gramlip.norm.finite.layer import FiniteLayer, start_like
from gramlip.numerics import rounding as rd
from gramlip.numerics.cholesky import shift

FRESH = 3  # other start vectors that are tried before the interval stays wider than asked for


def banded(layer: FiniteLayer, tap_norm_sums: Sequence[float], rtol: float, best: int, lower: float, x: Tensor) -> tuple[float, float, str]:
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


class Certificate:
    """`||T|| <= tau` for one group of a finite layer by a block-banded Cholesky factorisation along the first axis.

    The Gram matrix of the smaller side is banded in blocks of one row of the first axis (docs/theory.md#finite-layer); a
    factorisation of `tau^2 I - T* T`, shifted as in docs/rounding.md#r3-cholesky, proves the bound for the layer itself. It is
    done on the CPU wherever the layer is: the theorem on its error is one on LAPACK.
    """

    def __init__(self, layer: FiniteLayer, group: int) -> None:
        """The rows' products; `cost` estimates the operations of one factorisation with its preparation."""
        self.layer, self.group = layer, group
        m, n = layer.shape[1:3]
        rows, columns = m * math.prod(layer.outputs[1:]), n * math.prod(layer.sizes[1:])
        self.on_inputs = columns * layer.sizes[0] <= rows * layer.outputs[0]
        self.side, self.inner = (columns, rows) if self.on_inputs else (rows, columns)
        self.steps = layer.sizes[0] if self.on_inputs else layer.outputs[0]
        self.pairs = self._pairs()
        self.band = max((j - i for i, j in self.pairs), default=0)
        self.products = {pq for terms in self.pairs.values() for pq in terms}
        weight = 4.0 if layer.is_complex else 1.0
        band = self.band
        self.cost = weight * (2.0 * len(self.products) * self.side**2 * self.inner + self.steps * (1 / 3 + band + band**2) * self.side**3)
        scalar = 16 if layer.is_complex else 8
        slices = layer.shape[3] * rows * columns
        self.bytes = layer.bytes + scalar * (slices + (len(self.products) + (band + 1) ** 2 + 3) * self.side**2)

    def _pairs(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """For blocks i <= j of the Gram matrix the pairs of first-axis taps whose products make it up."""
        terms: dict[tuple[int, int], list[tuple[int, int]]] = {}
        reads = self.layer.maps[0].tolist()
        taps = range(len(reads))
        if self.on_inputs:
            found = ((reads[p][o], reads[q][o], p, q) for o in range(self.layer.outputs[0]) for p in taps for q in taps)
        else:
            by_input: dict[int, list[tuple[int, int]]] = {}
            for p in taps:
                for o, i in enumerate(reads[p]):
                    by_input.setdefault(i, []).append((p, o))
            by_input.pop(-1, None)
            found = ((o, r, p, q) for some in by_input.values() for p, o in some for q, r in some)
        for i, j, p, q in found:
            if 0 <= i <= j:
                terms.setdefault((i, j), []).append((p, q))
        return terms

    def _slices(self) -> list[Tensor]:
        """The layer on the other axes for each tap of the first: matrices (m * outputs, n * sizes)."""
        kernel = self.layer.kernel(self.group).cpu()
        m, n, first, *rest = kernel.shape
        outs, ins = math.prod(self.layer.outputs[1:]), math.prod(self.layer.sizes[1:])
        slices = []
        for p in range(first):
            matrix = kernel.new_zeros(outs, ins, m, n)
            for q in itertools.product(*map(range, rest)):
                to, source = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
                for at, table, size, out in zip(q, self.layer.maps[1:], self.layer.sizes[1:], self.layer.outputs[1:], strict=True):
                    reads = table[at]
                    source = torch.where((source[:, None] >= 0) & (reads >= 0), source[:, None] * size + reads, -1).flatten()
                    to = (to[:, None] * out + torch.arange(out)).flatten()
                keep = source >= 0
                tap = kernel[(slice(None), slice(None), p, *q)].expand(int(keep.sum()), m, n)
                matrix.index_put_((to[keep], source[keep]), tap, accumulate=True)
            slices.append(matrix.permute(0, 2, 1, 3).reshape(outs * m, ins * n))
        return slices

    def prepare(self) -> None:
        """Form the products of the slices, once for all thresholds."""
        slices = self._slices()
        if not self.on_inputs:
            slices = [s.mH for s in slices]
        self.gram = {(p, q): slices[p].mH @ slices[q] for p, q in self.products}

    def noise(self, tap_norm_sum: float) -> float:
        """Upper bound of the error of the Gram matrix that is factorised: what cannot be told from zero.

        An entry adds up taps that meet, a product's terms and a block's products: docs/rounding.md#r9-the-gram-matrix-of-a-layer.
        """
        bound = rd.mul_up(rd.mul_up(tap_norm_sum, tap_norm_sum), float(self.layer.shared))
        meeting, products = math.prod(self.layer.shape[4:]), max(map(len, self.pairs.values()), default=0)
        return rd.mul_up(rd.gamma(8.0 * (2 * meeting + self.inner + products + 64)), bound)

    def attainable_rtol(self, lower: float, tap_norm_sum: float) -> float:
        """The least relative width above a lower side that rounding lets be proved: docs/rounding.md#the-least-width."""
        return math.expm1(math.log1p(2 * shift(self.side * self.steps) + 4 * self.noise(tap_norm_sum) / max(lower, 1e-150) ** 2) / 2)

    def proves(self, target_norm: float, tap_norm_sum: float) -> bool:
        """Whether the factorisation for a target completes: then `||T|| <= target_norm`."""
        noise, total = self.noise(tap_norm_sum), self.side * self.steps
        t = (target_norm * target_norm - noise) * (1 - 2 * shift(total)) - 2 * shift(total) * noise
        if t <= 0:
            return False
        window: dict[tuple[int, int], Tensor] = {}
        eye = torch.eye(self.side, dtype=self.layer.dtype)
        for i in range(self.steps):
            row = [self._block(window, i, j, t, eye) for j in range(i, min(i + self.band + 1, self.steps))]
            factor, info = torch.linalg.cholesky_ex(row[0])
            if int(info):
                return False
            solved = [torch.linalg.solve_triangular(factor, b, upper=False) for b in row[1:]]
            for a, x in enumerate(solved):
                for b in range(a, len(solved)):
                    key = (i + 1 + a, i + 1 + b)
                    before = window.get(key)
                    if before is None:
                        before = self._block(window, *key, t, eye)
                    window[key] = before - x.mH @ solved[b]
        return True

    def _block(self, window: dict[tuple[int, int], Tensor], i: int, j: int, t: float, eye: Tensor) -> Tensor:
        """Block (i, j) of `t I - Gram`, less what earlier rows eliminated."""
        done = window.pop((i, j), None)
        if done is not None:
            return done
        total = t * eye if i == j else torch.zeros_like(eye)
        for pq in self.pairs.get((i, j), []):
            total = total - self.gram[pq]
        return total
