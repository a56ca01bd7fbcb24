"""A module is the map that its forward pass computes: what may make it another is read as it stands or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import gramlip as gl
from oracle import oracle


def older(register: Callable[..., nn.Module], *args: object) -> nn.Module:
    """A layer under one of torch's older hooks, its parameters changed since it was registered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = register(nn.Conv1d(3, 4, 3, padding=1), "weight", *args)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(torch.rand_like(parameter) * 5)
    return module


HOOKED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: older(weight_norm),
    "spectral_norm": lambda: older(spectral_norm),
    "prune": lambda: older(prune.random_unstructured, 0.5),
    "pruned twice": lambda: prune.l1_unstructured(older(prune.random_unstructured, 0.3), "weight", 0.3),
    "both": lambda: prune.random_unstructured(older(weight_norm), "bias", 0.5),
    "parametrized": lambda: parametrizations.spectral_norm(nn.Conv1d(3, 4, 3, padding=1)),
    "parametrized weight_norm": lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 3, padding=1)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", HOOKED)
def test_the_weight_is_that_of_the_next_forward_pass(name: str, training: bool) -> None:
    """In eval mode; and nothing of the module changes by being read."""
    module = HOOKED[name]().train(training)
    before = copy.deepcopy(module.state_dict())
    found = gl.bound(module, 6)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(part.training is training for part in module.modules())
    exact = module.eval()
    with torch.no_grad():
        exact(torch.zeros(1, 3, 6))  # hooks run
    truth = oracle(gl.Conv(exact.weight.detach(), 6, padding=1))  # type: ignore[arg-type,operator]
    assert found.lower <= truth * (1 + 1e-6)
    assert truth * (1 - 1e-6) <= found.upper <= truth * 1.02


def test_gradients_reach_what_a_hook_reads() -> None:
    module = older(weight_norm)
    gl.bound(module, 6, method="gram").upper.backward()  # type: ignore[union-attr]
    assert float(module.weight_g.grad.abs().sum()) > 0  # type: ignore[union-attr]


class Tenfold(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


class Standardised(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 10 * super().__call__(x)


class Named(nn.Linear):
    """Nothing of its own but its name."""


def changed(change: Callable[[nn.Module], object], kind: type[nn.Module] = nn.Linear) -> nn.Module:
    module = kind(3, 3)
    change(module)
    return module


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward": (lambda: Tenfold(3, 3), r"@gramlip\.describe\.register on a function \(module: Tenfold"),
    "inner part": (lambda: Standardised(3, 3, 1), "has a _conv_forward of its own"),
    "call": (lambda: Called(3, 3), "has a __call__ of its own"),
    "identity": (lambda: type("Double", (nn.Identity,), {"forward": lambda self, x: 2 * x})(), "has a forward of its own"),
    "instance": (lambda: changed(lambda m: setattr(m, "forward", lambda x: 2 * x)), "has a forward of its own"),
    "hook": (lambda: changed(lambda m: m.register_forward_hook(lambda m, i, o: 10 * o)), r"forward hook.*handle\.remove\(\)"),
    "pre-hook": (lambda: changed(lambda m: m.register_forward_pre_hook(lambda m, i: (10 * i[0],))), "has a forward hook"),
    "hook with keywords": (
        lambda: changed(lambda m: m.register_forward_hook(lambda m, i, k, o: 10 * o, with_kwargs=True)),
        "has a forward hook",
    ),
    "hook beside a known one": (
        lambda: changed(lambda m: m.register_forward_hook(print), lambda *_: older(weight_norm)),  # type: ignore[arg-type]
        "has a forward hook, print",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_map_is_refused(name: str) -> None:
    make, says = OTHERS[name]
    with pytest.raises(gl.UnsupportedError, match=says) as error:
        gl.bound(make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Named, NonDynamicallyQuantizableLinear])
def test_a_subclass_with_the_same_forward_pass_has_the_same_rule(kind: type[nn.Linear]) -> None:
    module = kind(3, 3)
    assert gl.bound(module) == gl.bound(module.weight)


def test_a_rule_of_its_own_is_taken() -> None:
    own = type("Own", (Tenfold,), {})
    gl.describe.register(own, lambda module, input_size=None: gl.Dense(10 * module.weight))
    base = type("Base", (nn.Module,), {})  # a rule of a class that computes nothing is one for its subclasses
    gl.describe.register(base, lambda module, input_size=None: gl.Bound(0.0, 2.0, "known"))
    module = own(3, 3)
    assert gl.bound(module) == gl.bound(10 * module.weight)
    assert gl.bound(type("Double", (base,), {"forward": lambda self, x: 2 * x})()).upper == 2.0


def test_an_audit_sees_hooks_and_forward_passes() -> None:
    """They are part of the graph."""
    model = nn.Sequential(Tenfold(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].register_forward_hook(lambda m, i, o: 7 * o)
    truth = 70 * oracle(gl.Dense((model[1].weight @ model[0].weight).detach()))
    assert gl.audit(model, torch.zeros(1, 3)).upper >= truth * (1 - 1e-6)
