"""The finite layer itself: its action, a lower bound from its own Rayleigh quotient, and its own certificate.

Every geometry is exact here: one index map for each axis says which input each tap of each output reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.blocks import axes, grouped
from gramlip.certificates import shift
from gramlip.operators import Conv
from gramlip.padding import index_map
from gramlip.widen import widen

WIDE_BYTES = 48 << 20  # the float64 copy of a kernel is kept while it is smaller than this
PIECE_BYTES = 2 << 20  # else pieces of about this size, which caches hold, are cast when they are used


class Layer:
    """One group's finite linear map in float64, scaled by `2**-exponent`: the convolution, or the one whose adjoint it is."""

    def __init__(self, op: Conv, exponent: int, modes: Sequence[str] | None = None) -> None:
        """Index maps of all axes, each with its own padding mode where `modes` are given.

        The kernel (groups, m, n, *k) is copied where it is small, else cast piece by piece.
        """
        self.geometry = axes(op)
        self.source, self.exponent = grouped(op).detach(), exponent
        self.shape, self.is_complex, self.device = self.source.shape, self.source.is_complex(), self.source.device
        self.dtype = torch.complex128 if self.is_complex else torch.float64
        scalar = 16 if self.is_complex else 8
        self.bytes = scalar * self.source[0].numel()
        self._step = max(1, PIECE_BYTES * self.shape[1] // self.bytes)
        self._wide = widen(self.source, exponent)[0] if scalar * self.source.numel() <= WIDE_BYTES else None
        modes = modes or (op.padding_mode,) * op.dims
        self.maps = [index_map(a, mode).to(self.device) for a, mode in zip(self.geometry, modes, strict=True)]
        self.sizes = tuple(a.size or 0 for a in self.geometry)
        self.outputs = tuple(a.outputs or 0 for a in self.geometry)
        self.shared = math.prod(max(int(row[row >= 0].bincount().max()) if bool((row >= 0).any()) else 0 for row in m) for m in self.maps)

    def kernel(self, group: int) -> Tensor:
        """The exact float64 kernel of one group, (m, n, *k)."""
        return self._wide[group] if self._wide is not None else widen(self.source[group], self.exponent)[0]

    def _pieces(self, group: int) -> list[tuple[slice, Callable[[], Tensor]]]:
        """Rows of the kernel and how to get them, (r, n k): whole where it is kept."""
        if self._wide is not None:
            whole = self._wide[group].flatten(1)
            return [(slice(None), lambda: whole)]
        rows = [slice(start, start + self._step) for start in range(0, self.shape[1], self._step)]
        return [(some, lambda some=some: widen(self.source[group, some], self.exponent)[0].flatten(1)) for some in rows]

    def forward(self, x: Tensor, group: int) -> Tensor:
        """The layer on x (n, *sizes), zeros where a tap reads padding; (m, *outputs)."""
        for j, (m, taps) in enumerate(zip(self.maps, self.shape[3:], strict=True)):
            axis = 1 + 2 * j  # gather the taps of this axis: (n, k_0, o_0, ..., size_j, ...) -> (..., k_j, o_j, ...)
            picked = x.index_select(axis, m.clamp_min(0).flatten())
            picked = picked * (m >= 0).flatten().to(x.dtype).reshape(-1, *(1,) * (x.ndim - axis - 1))
            x = picked.unflatten(axis, (taps, m.shape[1]))
        d = len(self.maps)
        order = (*(2 + 2 * j for j in range(d)), 0, *(1 + 2 * j for j in range(d)))
        columns = x.permute(order).reshape(math.prod(self.outputs), -1)  # few rows: a product of rows is the faster one
        out = columns.new_empty(columns.shape[0], self.shape[1])
        for rows, piece in self._pieces(group):
            out[:, rows] = columns @ piece().mT
        return out.mT.reshape(-1, *self.outputs)

    def adjoint(self, y: Tensor, group: int) -> Tensor:
        """The adjoint on y (m, *outputs); (n, *sizes)."""
        d, flat = len(self.maps), y.flatten(1).mT.contiguous()
        x = torch.zeros(flat.shape[0], math.prod(self.shape[2:]), dtype=self.dtype, device=self.device)
        for rows, piece in self._pieces(group):
            x.addmm_(flat[:, rows], piece().conj())
        x = x.reshape(*self.outputs, self.shape[2], *self.shape[3:])
        x = x.permute(d, *itertools.chain.from_iterable((d + 1 + j, j) for j in range(d)))
        for j in reversed(range(d)):
            axis = 1 + 2 * j
            m = self.maps[j]
            x = x.flatten(axis, axis + 1)
            x = x * (m >= 0).flatten().to(x.dtype).reshape(-1, *(1,) * (x.ndim - axis - 1))
            out = x.new_zeros(*x.shape[:axis], self.sizes[j], *x.shape[axis + 1 :])
            x = out.index_add_(axis, m.clamp_min(0).flatten(), x)
        return x

    def lower(self, x: Tensor, group: int, mass: float) -> float:
        """Lower bound `||T x|| / ||x||` less the rounding of T x, at most `gamma mass ||x||`: docs/rounding.md#r6-rayleigh-quotients."""
        length = math.prod(self.shape[2:]) + 8
        error = rd.mul_up(rd.mul_up(rd.gamma(8.0 * length), mass), rd.sqrt_up(float(self.shared)))
        size = rd.gamma(4.0 * (x.numel() + math.prod(self.outputs) * self.shape[1]) + 64)
        quotient = float(torch.linalg.vector_norm(self.forward(x, group)) / torch.linalg.vector_norm(x))
        return max(0.0, rd.down(quotient * rd.down(1 - 4 * size) - error))

    def ascend(self, x: Tensor, group: int, steps: int) -> tuple[Tensor, float]:
        """The leading Ritz vector of `T* T` after Lanczos steps from x, and what the last two of them added, relative to the norm."""
        basis, diagonal, beside = [x / torch.linalg.vector_norm(x)], [], []
        for j in range(steps):
            w = self.adjoint(self.forward(basis[-1], group), group)
            diagonal.append(torch.vdot(basis[-1].flatten(), w.flatten()).real)
            flat = torch.stack([b.flatten() for b in basis])
            for _ in range(2):
                w = w - (flat.mT @ (flat.conj() @ w.flatten())).reshape(w.shape)
            size = torch.linalg.vector_norm(w)
            if j + 1 == steps or float(size) <= 1e-13 * float(diagonal[0]):
                break
            beside.append(size)
            basis.append(w / size)
        small = torch.diag(torch.stack(diagonal))
        if beside:
            small = small + torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
        values, vectors = torch.linalg.eigh(small)
        earlier = torch.linalg.eigvalsh(small[:-2, :-2])[-1] if len(small) > 2 else values[-1]
        weights = vectors[:, -1].to(x.dtype)
        total = sum((w * b for w, b in zip(weights, basis, strict=True)), torch.zeros_like(x))
        return total, float(1 - (earlier / values[-1]).clamp_min(0).sqrt()) if float(values[-1]) > 0 else 0.0


class Certificate:
    """`||T|| <= tau` for one group of a finite layer by a block-banded Cholesky factorisation along the first axis.

    The Gram matrix of the smaller side is banded in blocks of one row of the first axis (docs/theory.md#finite-layer); a
    factorisation of `tau^2 I - T* T`, shifted as in docs/rounding.md#r3-cholesky, proves the bound for the layer itself.
    """

    def __init__(self, layer: Layer, group: int) -> None:
        """The rows' products; `cost` estimates the operations of one factorisation with its preparation."""
        self.layer, self.group = layer, group
        m, n = layer.shape[1:3]
        rows, columns = m * math.prod(layer.outputs[1:]), n * math.prod(layer.sizes[1:])
        self.on_inputs = columns * layer.sizes[0] <= rows * layer.outputs[0]
        self.side, other = (columns, rows) if self.on_inputs else (rows, columns)
        self.steps = layer.sizes[0] if self.on_inputs else layer.outputs[0]
        self.pairs = self._pairs()
        self.band = max((j - i for i, j in self.pairs), default=0)
        self.products = {pq for terms in self.pairs.values() for pq in terms}
        weight = 4.0 if layer.is_complex else 1.0
        band = self.band
        self.cost = weight * (2.0 * len(self.products) * self.side**2 * other + self.steps * (1 / 3 + band + band**2) * self.side**3)
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
        kernel = self.layer.kernel(self.group)
        m, n, first, *rest = kernel.shape
        outs, ins = math.prod(self.layer.outputs[1:]), math.prod(self.layer.sizes[1:])
        slices = []
        for p in range(first):
            matrix = kernel.new_zeros(outs, ins, m, n)
            for q in itertools.product(*map(range, rest)):
                to, source = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
                for tap, table, size, out in zip(q, self.layer.maps[1:], self.layer.sizes[1:], self.layer.outputs[1:], strict=True):
                    reads = table[tap].cpu()
                    source = torch.where((source[:, None] >= 0) & (reads >= 0), source[:, None] * size + reads, -1).flatten()
                    to = (to[:, None] * out + torch.arange(out)).flatten()
                keep = source >= 0
                where = (to[keep].to(kernel.device), source[keep].to(kernel.device))
                matrix.index_put_(where, kernel[(slice(None), slice(None), p, *q)].expand(int(keep.sum()), m, n), accumulate=True)
            slices.append(matrix.permute(0, 2, 1, 3).reshape(outs * m, ins * n))
        return slices

    def prepare(self) -> None:
        """Form the products of the slices, once for all thresholds."""
        slices = self._slices()
        if not self.on_inputs:
            slices = [s.mH for s in slices]
        self.gram = {(p, q): slices[p].mH @ slices[q] for p, q in self.products}

    def proves(self, tau: float, mass: float) -> bool:
        """Whether the factorisation for tau completes: then `||T|| <= tau`."""
        bound = rd.mul_up(rd.mul_up(mass, mass), float(self.layer.shared))
        length = 8.0 * (math.prod(self.layer.shape[1:]) * math.prod(self.layer.sizes[1:]) + 64)
        noise = rd.mul_up(rd.gamma(length), bound)
        total = self.side * self.steps
        t = (tau * tau - noise) * (1 - 2 * shift(total))
        if t <= 0:
            return False
        window: dict[tuple[int, int], Tensor] = {}
        eye = torch.eye(self.side, dtype=self.layer.dtype, device=self.layer.device)
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
