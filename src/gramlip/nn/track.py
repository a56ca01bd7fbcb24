"""Warm starts: the highest frequencies and singular vectors of layers of one shape, followed from one training step to the next.

Between two searches only `|u* D(w) v|` is maximised, in turn over u, w and v: docs/training.md#tracking. It never falls in a step
while the weights stand still, and is a lower estimate of the supremum over all frequencies at any time. Several peaks are
followed, since a penalty pushes the highest one down until another takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramlip.blocks import transform
from gramlip.nn.sigma import Plan, power, real_dtype, unit

SEARCH_STEPS = 12  # power steps per grid point in a search
STRIDES = (0.0, 1.0, 4.0)  # multiples of the safe step along the gradient that are tried; 0 keeps the frequency


class Tracker(nn.Module):
    """Estimates of the norms of L layers whose weights have one shape and one plan, from `peaks` frequencies of each group.

    Buffers, which belong to the state_dict so that training resumes as it was, with B = L groups: `frequency` (B, peaks, axes),
    `vector` (B, peaks, n, 2), real and imaginary part.
    """

    positions: Tensor
    frequency: Tensor
    vector: Tensor

    def __init__(self, plan: Plan, weights: Sequence[Callable[[], Tensor]], steps: int, peaks: int) -> None:
        super().__init__()
        self.plan, self.steps, self._weights = plan, steps, tuple(weights)
        first = self._weights[0]().detach()
        shape, options = plan.kernel(first).shape, dict[str, Any](dtype=real_dtype(first), device=first.device)
        axes = [torch.arange(k, **options) - (k - 1) / 2 for k in shape[3:]]  # centred: a phase of D(w), which changes no norm
        grid = torch.cartesian_prod(*axes).reshape(-1, len(axes)) if axes else torch.zeros(1, 0, **options)
        batch, peaks = len(self._weights) * plan.groups, min(peaks, math.prod(plan.grid) // 2 + 1)
        self.register_buffer("positions", grid, persistent=False)
        self.register_buffer("frequency", torch.zeros(batch, peaks, len(axes), **options))
        self.register_buffer("vector", torch.zeros(batch, peaks, shape[2], 2, **options))

    def forward(self) -> Tensor:
        """Track, then the norm estimates (L,) with their graph: times the padding's factor, lower estimates of the suprema."""
        with torch.autocast(self.frequency.device.type, enabled=False):
            kernels = self.kernels()
            with torch.no_grad():
                for _ in range(self.steps):
                    self._step(kernels.detach())
                values = self._values(kernels.detach(), self._probes()).reshape(len(self._weights), -1)
                best = values.argmax(-1)
                chosen = best // self.frequency.shape[1] + self.plan.groups * torch.arange(len(best), device=best.device)
                probes = self._probes()[chosen, best % self.frequency.shape[1]][:, None]
            one = kernels if self.plan.groups == 1 else kernels[chosen]
            return self._values(one, probes)[:, 0] * math.sqrt(self.plan.square)

    def kernels(self) -> Tensor:
        """The kernels (B, m, n, taps) in float32 at least, with their graph."""
        parts = [self.plan.kernel(read()) for read in self._weights]
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
        return stacked.reshape(*stacked.shape[:3], -1).to(self.frequency.dtype)

    @torch.no_grad()
    def search(self) -> None:
        """Find the peaks afresh, by power iteration at every point of the grid; what was tracked stays where it is higher."""
        kernels = self.kernels()
        before = self._values(kernels, self._probes())
        kept = self.frequency.clone(), self.vector.clone()
        blocks = [transform(self.plan.kernel(read()).to(self.frequency.dtype), list(self.plan.grid)) for read in self._weights]
        for i, block in enumerate(blocks):
            self._find(block, slice(i * self.plan.groups, (i + 1) * self.plan.groups))
        after = self._values(kernels, self._probes())
        worse = after.amax(-1) < before.amax(-1)
        self.frequency[worse, -1] = kept[0][worse, before.argmax(-1)[worse]]
        self.vector[worse, -1] = kept[1][worse, before.argmax(-1)[worse]]

    def _find(self, blocks: Tensor, rows: slice) -> None:
        """Peaks of one layer's blocks (groups, *half grid, m, n): the highest points, none next to a higher one taken before."""
        groups, half, grid = blocks.shape[0], blocks.shape[1:-2], self.plan.grid
        values, vectors = power(blocks.reshape(-1, *blocks.shape[-2:]), SEARCH_STEPS)
        values, vectors = values.reshape(groups, -1), vectors.reshape(groups, -1, vectors.shape[-1])
        index = torch.arange(values.shape[1], device=values.device)
        turns = torch.stack(torch.unravel_index(index, half), -1) if half else index[:, None][:, :0]
        sides = torch.tensor(grid, device=values.device)
        left, line = values.clone(), torch.arange(groups, device=values.device)
        for peak in range(self.frequency.shape[1]):
            top = left.argmax(-1)
            self.frequency[rows, peak] = (turns[top] * (2 * math.pi / sides)).to(self.frequency.dtype)
            vector = vectors[line, top]
            self.vector[rows, peak] = torch.view_as_real(vector) if vector.is_complex() else torch.stack([vector, 0 * vector], -1)
            gap = (turns[None] - turns[top][:, None]).remainder(sides)
            near = (torch.minimum(gap, sides - gap) <= 1).all(-1) if half else torch.ones_like(left, dtype=torch.bool)
            left = torch.where(near, -1.0, left)

    def _waves(self, frequency: Tensor) -> Tensor:
        """exp(-i p.w): (..., taps)."""
        angle = frequency @ self.positions.mT
        return torch.polar(torch.ones_like(angle), -angle)

    def _probes(self) -> Tensor:
        """V exp(-i p.w): (B, peaks, n, taps), complex; a kernel times it is D(w) v."""
        return torch.view_as_complex(self.vector)[..., None] * self._waves(self.frequency)[..., None, :]

    @staticmethod
    def _image(kernels: Tensor, probes: Tensor) -> Tensor:
        """D(w) v: (B, m, peaks, 2)."""
        columns = torch.view_as_real(probes.flatten(2).mT.contiguous())  # (B, n taps, peaks, 2)
        return (kernels.flatten(2) @ columns.flatten(2)).unflatten(-1, columns.shape[2:])

    def _values(self, kernels: Tensor, probes: Tensor) -> Tensor:
        """||D(w) v||: (B, peaks)."""
        return torch.linalg.vector_norm(self._image(kernels, probes), dim=(1, 3))

    def _step(self, kernels: Tensor) -> None:
        """U from v, then w from (u, v), then v from (u, w): none of them lowers |u* D(w) v|."""
        waves, v = self._waves(self.frequency), torch.view_as_complex(self.vector)
        image = self._image(kernels, self._probes())
        back = (kernels.flatten(2).mT @ image.flatten(2)).unflatten(-1, image.shape[2:])
        back = torch.view_as_complex(back).mT.unflatten(-1, kernels.shape[2:])  # (B, peaks, n, taps): K* u
        if self.frequency.shape[-1]:
            self.frequency.copy_(self._climb((back.conj() * v[..., None]).sum(2), waves))
            waves = self._waves(self.frequency)
        self.vector.copy_(torch.view_as_real(unit((back * waves.conj()[:, :, None]).sum(-1)).contiguous()))

    def _climb(self, taps: Tensor, waves: Tensor) -> Tensor:
        """The frequencies moved along the gradient of `|sum_p c_p exp(-i p.w)|^2`, c_p = u* K_p v, as far as it grows."""
        terms = taps * waves
        slope = -1j * terms @ self.positions.to(terms.dtype)
        gradient = (terms.sum(-1).conj()[..., None] * slope).real
        curvature = (terms.abs() @ self.positions.abs()).square().sum(-1, keepdim=True)
        safe = gradient / torch.where(curvature > 0, curvature, 1.0)
        tried = self.frequency[..., None, :] + safe[..., None, :] * safe.new_tensor(STRIDES)[:, None]
        height = (taps[..., None, :] * self._waves(tried)).sum(-1).abs()
        return tried.take_along_dim(height.argmax(-1)[..., None, None], -2)[..., 0, :]
