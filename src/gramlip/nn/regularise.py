"""Norms held down without a parametrization: `LipschitzPenalty` adds a term to the loss, `Cap` and `cap_` scale weights down."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gramlip import distributed
from gramlip.errors import InputError
from gramlip.nn.monitor import Norms, weight_of
from gramlip.nn.parametrize import Where, layers, operator, positive, real, shrunk
from gramlip.nn.tracker import Tracker
from gramlip.norm.methods import check_rtol


def _paper(sigma: Tensor, threshold: float) -> Tensor:
    return torch.where(sigma <= threshold, 0.0, sigma)  # NaN stays NaN, so that it is seen


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
"""Name -> cost of a norm, or of the composed constant, above the threshold. Only "paper" jumps there."""

COMPOSE: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {"layers": _layers, "product": _product}
"""Name -> penalised quantity: the norm of every layer, or the Lipschitz constant of the chain of layers."""


class LipschitzPenalty(Norms):
    """Differentiable penalty on the norms of a network's linear and convolution layers, to be added to the loss.

    `penalty()` returns a scalar; by default `sum of (sigma if sigma > threshold else 0)`, as in the paper. The norms hold for every
    input size. They are tracked: the frequencies and singular vectors of each layer are kept from step to step, and searched again once
    in `every` calls, so a call costs a few products of the kernels with a vector. They are lower estimates, meant for minimisation;
    `penalty.certify()` returns certified intervals.

    Args:
        model: the network. The list of layers is fixed now; their weights are read at every call. After replacing a layer, make a new
            penalty.
        example: an input for one forward pass, which records input sizes (they decide how strides split), or None.
        threshold: norms up to it cost nothing.
        form: a name in `FORMS`: "paper", "hinge", "square" or "log".
        over: "layers", "product" (the constant of a chain), or a function from {path: sigma} to the tensor of constants to penalise.
        every: calls between two searches over all frequencies; 1 searches at every call.
        steps: tracking steps per call.
        peaks: number of frequencies tracked in each group.
        torus: grid points per axis in a search.
        where: keep only layers for which `where(path, module)` is true.
        shared: with several ranks, each computes the penalty of its share of the layers, times the number of ranks. Gradients that are
            averaged over the ranks, as `DistributedDataParallel` does, are then those of the whole penalty. Each rank has its own
            state: keep the penalty outside the wrapped module.

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


# ---- cap -----------------------------------------------------------------------------------------------------------------

FAR = 0.8  # of the target: a smaller norm does not reach the target in the few steps until it is read again
TURNS = 8  # calls between two readings of such a layer


class Cap(Norms):
    """A hook for after the optimizer's step: scales layers whose tracked norm exceeds the target down to it, in place.

    The layers keep their plain weights. The norms are tracked as in `LipschitzPenalty`, so a call costs a few products of the kernels
    with a vector. They are lower estimates: the norm of a layer can exceed the target by as much as it moves in a few steps. If all
    layers of one shape are below 0.8 of the target, they are read at one call in eight. For a certificate call `cap_`, at the end of
    training or at a checkpoint.

    Args:
        model: the network. The list of layers is fixed now.
        target: any positive number, for every layer.
        example: an input, a tuple of inputs, or the shape of one sample, for one forward pass that records input sizes; None: the norms
            hold for every size.
        where: keep only layers for which `where(path, module)` is true.
        every: calls between two searches of a layer over all frequencies.
        peaks: number of frequencies tracked in each group.
        torus: grid points per axis in a search.

    Raises:
        InputError: options that cannot be used, or a weight that is not a plain parameter.
        UnsupportedError: complex weights.

    Reference: docs/training.md#cap.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    >>> cap = Cap(model, target=1.0)
    >>> handle = optimizer.register_step_post_hook(cap)
    """

    def __init__(
        self,
        model: nn.Module,
        target: float = 1.0,
        example: Any = None,
        *,
        where: Callable[[str, nn.Module], bool] | None = None,
        every: int = 50,
        peaks: int = 4,
        torus: int = 8,
    ) -> None:
        self.target = positive("target", target)
        super().__init__(model, example, every=every, peaks=peaks, torus=torus, where=where)
        for path, module, _ in self._layers:
            _refuse(path, module)
        # a factor for what the padding does not attain: the upper bound for this padding shall come down to the target
        self._stretch = [math.sqrt(geometry.square) / geometry.attained for geometry in self.geometries]

    def _rests(self, tracker: Tracker, turn: int) -> bool:
        """Whether the layers are far below the target and not yet due."""
        geometry = tracker.geometry
        return turn % TURNS > 0 and float(tracker.last().amax()) * math.sqrt(geometry.square) / geometry.attained < FAR * self.target

    @torch.no_grad()
    def forward(self, *of_a_hook: Any) -> dict[str, float]:
        """Scale layers down where needed; return {path: factor} of these layers. The arguments of an optimizer's hook are ignored."""
        sigmas = self.sigmas()
        if not sigmas:
            return {}
        norms = torch.stack([sigma.to(torch.float64) for sigma in sigmas.values()]).tolist()
        factors = {
            path: self.target / (norm * stretch)
            for path, norm, stretch in zip(sigmas, norms, self._stretch, strict=True)
            if norm * stretch > self.target
        }
        modules = dict(zip(sigmas, self._tracked, strict=True))
        least: dict[int, tuple[Tensor, float]] = {}
        for path, factor in factors.items():  # a weight that several layers share is scaled once, for all of them
            weight = weight_of(modules[path])
            least[id(weight)] = weight, min(factor, least.get(id(weight), (weight, 1.0))[1])
        for weight, factor in least.values():
            weight.mul_(factor)
        return {path: least[id(weight_of(modules[path]))][1] for path in factors}


def cap_(model: nn.Module, target: float = 1.0, example: Any = None, *, where: Where | None = None, rtol: float = 1e-2) -> dict[str, float]:
    """Scale every layer whose certified norm exceeds the target down, in place: then `gramlip.bound(...).upper <= target` for each.

    It certifies each layer, so it belongs at the end of training or at a checkpoint; use `Cap` at every step. If a layer cannot be
    capped, no layer is changed.

    Args:
        model: the network, with plain weights.
        target: any positive number, for every layer.
        example: an input, a tuple of inputs, or the shape of one sample; None: the norms hold for every size.
        where: keep only layers for which `where(path, module)` is true.
        rtol: another relative width at which the certificate shall hold, besides the default one.

    Returns:
        {path: factor} of the layers that were scaled down.

    Raises:
        InputError: options that cannot be used, a weight that is not a plain finite parameter, or a target below what the dtype holds.

    Reference: docs/training.md#cap.

    >>> from gramlip import bound
    >>> layer = nn.Linear(8, 8)
    >>> factors = cap_(layer, target=0.25)
    >>> sorted(factors), bound(layer).upper <= 0.25
    ([''], True)
    """
    check_rtol(rtol)
    goal, uses = positive("target", target), dict[int, list[tuple[str, nn.Module, Any]]]()
    for path, module, size in layers(model, example, where, stacklevel=3):
        _refuse(path, module)
        uses.setdefault(id(weight_of(module)), []).append((path, module, size))
    factors: dict[str, float] = {}
    scaled: list[tuple[Tensor, Tensor]] = []
    for members in uses.values():
        capped, factor = _capped(members, goal, rtol, type(model).__name__)
        if factor < 1.0:
            scaled.append((weight_of(members[0][1]), capped))
            factors |= {path: factor for path, *_ in members}
    with torch.no_grad():
        for weight, capped in scaled:
            weight.copy_(capped)
    return factors


def _capped(members: list[tuple[str, nn.Module, Any]], goal: float, rtol: float, model: str) -> tuple[Tensor, float]:
    """The weight that some layers share, scaled down for all of them, and the factor."""
    path, weight = members[0][0], weight_of(members[0][1])
    try:
        limits = [(operator(m, "weight", size), goal) for _, m, size in members]
        real(limits[0][0], "cap_")
        capped, factor = shrunk(weight.detach(), limits, rtol)
    except InputError as error:
        msg = f"{path or model}: {error}: nothing was capped"
        raise InputError(msg) from error
    if not bool(capped.any()) and bool(weight.any()):
        msg = f"target={goal:.6g} is below what {weight.dtype} can hold in {path!r}: all weights would be zero; expected a wider dtype"
        raise InputError(msg)
    return capped, factor


def _refuse(path: str, module: nn.Module) -> None:
    """Refuse a weight that is computed from others: scaling the result would change nothing."""
    if not any(name == "weight" for name, _ in module.named_parameters(recurse=False)):
        msg = f"{path or type(module).__name__}.weight is computed by a parametrization or a hook; expected a plain parameter: "
        raise InputError(msg + "type gramlip.nn.remove(module) or torch's own undoing first, or leave it out with where=")
