"""`Monitor`: the norms and stable ranks of a network's layers as numbers to log, at a small fraction of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from gramlip.nn.norms import Norms, weight_of
from gramlip.nn.parametrize import evaluating
from gramlip.nn.tracker import Tracker


class Monitor(Norms):
    """Read a network's norms as it trains, without touching it.

    `monitor()` returns {path: {"sigma": ..., "stable_rank": ...}} of floats: a lower estimate of the layer's norm for every input size,
    tracked from call to call, and `||W||_F^2 / max ||D(w)||^2` with it, which for a matrix is its stable rank and for a convolution
    that of its operator, by position of the (strided) output. `monitor.certify(rtol)` gives the intervals that hold.

    Args:
        model: the network. Its layers are those that it has now, and their weights are read at every call, in eval mode.
        example: an input, a tuple of them, or the shape of one sample, that one forward pass runs on; None holds for every size.
        every: calls between two searches of a layer over all frequencies.
        where: keep only layers for which `where(path, module)` holds.
        peaks: frequencies followed in each group.
        torus: grid points per axis in a search.

    Raises:
        InputError: options that cannot be used, or a model without such layers.
        UnsupportedError: complex weights.

    Reference: docs/training.md#monitor.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> _ = nn.init.eye_(model[0].weight)
    >>> {name: round(value, 4) for name, value in Monitor(model)()["0"].items()}
    {'sigma': 1.0, 'stable_rank': 4.0}
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        every: int = 50,
        *,
        where: Callable[[str, nn.Module], bool] | None = None,
        peaks: int = 8,
        torus: int = 8,
    ) -> None:
        super().__init__(model, example, every=every, peaks=peaks, torus=torus, where=where)

    def forward(self) -> dict[str, dict[str, float]]:
        """{path: its numbers}, after one tracking step."""
        with evaluating(nn.ModuleList(self._tracked)):  # reading a normalised weight moves nothing
            sigmas = torch.stack([sigma.to(torch.float64) for sigma in self.sigmas().values()])
            sizes = [torch.linalg.vector_norm(weight_of(module).detach(), dtype=torch.float64) for module in self._tracked]
        trackers = cast("list[Tracker]", list(self.trackers))
        attained = [tracker.plan.attained for tracker in trackers for _ in range(len(tracker))]
        ranks = (torch.stack(sizes) / sigmas * sigmas.new_tensor(attained)).square()  # a ratio of zeros is no number
        both = zip(self._paths, *torch.stack([sigmas, ranks]).tolist(), strict=True)
        return {path: {"sigma": sigma, "stable_rank": rank} for path, sigma, rank in both}
