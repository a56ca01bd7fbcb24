"""`LipschitzPenalty`: one term of the loss that keeps a network's constant down, at a small fraction of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gramlip import distributed
from gramlip.errors import InputError
from gramlip.nn.monitor import Norms
from gramlip.nn.parametrize import positive


def _paper(sigma: Tensor, threshold: float) -> Tensor:
    return torch.where(sigma <= threshold, 0.0, sigma)  # what is no number stays one that is seen


def _hinge(sigma: Tensor, threshold: float) -> Tensor:
    return (sigma - threshold).clamp_min(0.0)


def _square(sigma: Tensor, threshold: float) -> Tensor:
    return _hinge(sigma, threshold).square()


def _log(sigma: Tensor, threshold: float) -> Tensor:
    return (sigma / threshold).clamp_min(1.0).log()


def _layers(sigmas: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(sigmas.values()))


def _product(sigmas: dict[str, Tensor]) -> Tensor:
    return _layers(sigmas).prod()


FORMS: dict[str, Callable[[Tensor, float], Tensor]] = {"paper": _paper, "hinge": _hinge, "square": _square, "log": _log}
"""Name -> what one norm, or the composed constant, costs above its threshold. "paper" jumps there, the others are continuous."""

COMPOSE: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {"layers": _layers, "product": _product}
"""Name -> what is penalised: every layer on its own, or the constant of a chain of them."""


class LipschitzPenalty(Norms):
    """Penalty of the norms of a network's linear and convolution layers, differentiable, to be added to the loss.

    `penalty()` returns a scalar: with the defaults `sum of (sigma if sigma > threshold else 0)`, the paper's. The norms hold for
    every input size. They are tracked: the frequency and singular vector of each layer are kept from step to step and found afresh
    every `every` calls, so that a call costs a few products of the kernels with a vector. They are lower estimates, made to be
    minimised; `penalty.certify()` gives the intervals that hold.

    Args:
        model: the network. Its layers are those that it has now, and their weights are read at every call: where a layer is replaced
            by another, make a new penalty.
        example: an input that one forward pass runs on to learn input sizes (they decide how strides split), or None.
        threshold: what costs nothing.
        form: a name in `FORMS`: "paper", "hinge", "square" or "log".
        over: "layers", "product" (the constant of a chain), or a function from {path: sigma} to the tensor of constants to penalise.
        every: calls between two searches over all frequencies; 1 searches at every call.
        steps: tracking steps per call.
        peaks: frequencies followed in each group.
        torus: grid points per axis in a search.
        where: keep only layers for which `where(path, module)` holds.
        shared: with several ranks each computes its share of the layers, times the number of ranks: gradients that are averaged over
            the ranks, as `DistributedDataParallel` does, are those of the whole penalty. The state is each rank's own: keep the penalty
            outside of the module that is wrapped.

    Raises:
        InputError: options that cannot be used, or a model without such layers.
        UnsupportedError: complex weights.

    Reference: arXiv 2305.16173, section 5.4; docs/training.md#penalise.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    >>> _ = model(torch.zeros(1, 3, 8, 8))
    >>> penalty = LipschitzPenalty(model, torch.zeros(1, 3, 8, 8), threshold=0.1, form="hinge")
    >>> penalty().backward()
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        threshold: float = 1.0,
        *,
        form: str = "paper",
        over: str | Callable[[dict[str, Tensor]], Tensor] = "layers",
        every: int = 50,
        steps: int = 1,
        peaks: int = 8,
        torus: int = 8,
        where: Callable[[str, nn.Module], bool] | None = None,
        shared: bool = False,
    ) -> None:
        if form not in FORMS:
            msg = f"form={form!r} is unknown; expected one of {sorted(FORMS)}"
            raise InputError(msg)
        if isinstance(over, str) and over not in COMPOSE:
            msg = f"over={over!r} is unknown; expected one of {sorted(COMPOSE)} or a function from {{path: sigma}} to a tensor"
            raise InputError(msg)
        if shared and over != "layers":
            msg = f"shared=True was given with over={over!r}; expected over='layers': a composed constant needs every layer"
            raise InputError(msg)
        at = positive("threshold", threshold)
        super().__init__(model, example, every=every, steps=steps, peaks=peaks, torus=torus, where=where, shared=shared)
        self.threshold, self._scale = at, distributed.world() if shared else 1
        self._cost, self._compose = FORMS[form], COMPOSE[over] if isinstance(over, str) else over

    def forward(self) -> Tensor:
        """The penalty, a scalar with its graph."""
        costs = self._cost(self._compose(self.sigmas()), self.threshold) if self._paths else torch.zeros(())
        return costs.sum() * self._scale
