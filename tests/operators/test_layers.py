"""A module is the map that its forward pass computes: what may make it another is read as it stands or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from fractions import Fraction

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


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", BATCH_NORMS, ids=lambda kind: kind.__name__)
def test_batch_norm_in_evaluation_mode(kind: type[nn.Module], dtype: torch.dtype, affine: bool) -> None:
    """Squares of both ends against exact arithmetic: the width is a few units of the last place."""
    generator = torch.Generator().manual_seed(0)
    for eps in (1e-5, 0.0, 1.0):
        module = kind(5, eps=eps, affine=affine, dtype=dtype).eval()
        module.running_var.copy_(torch.rand(5, generator=generator) + 0.01)  # type: ignore[operator,union-attr]
        weights = [1.0] * 5
        if affine:
            module.weight.data.copy_(torch.randn(5, generator=generator))  # type: ignore[operator,union-attr]
            weights = module.weight.tolist()  # type: ignore[operator,union-attr]
        variances = module.running_var.tolist()  # type: ignore[operator,union-attr]
        square = max(Fraction(w) ** 2 / (Fraction(v) + Fraction(eps)) for w, v in zip(weights, variances, strict=True))
        bound = gl.bound(module, 4)
        assert Fraction(bound.lower) ** 2 <= square <= Fraction(float(bound.upper)) ** 2
        assert bound.rtol <= 4e-15
        assert bound == gl.bound(module) == gl.bound(module, (4, 4, 4))


def test_batch_norm_at_the_ends_of_the_range() -> None:
    module = nn.BatchNorm1d(1, eps=0.0, dtype=torch.float64).eval()
    module.weight.data.zero_()
    assert gl.bound(module).lower == gl.bound(module).upper == 0.0
    module.weight.data.fill_(5e-324)
    assert gl.bound(module).lower == 0.0 < gl.bound(module).upper <= 1e-307
    module.weight.data.fill_(1e300)
    module.running_var.fill_(1e-100)  # type: ignore[operator,union-attr]
    assert gl.bound(module).lower >= 1e308
    assert gl.bound(module).upper == float("inf")


@pytest.mark.parametrize("kind", BATCH_NORMS, ids=lambda kind: kind.__name__)
def test_batch_norm_that_depends_on_the_batch_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(gl.UnsupportedError, match=r"type module\.eval\(\)"):
        gl.bound(kind(3), 4)
    with pytest.raises(gl.UnsupportedError, match="type track_running_stats=True"):
        gl.bound(kind(3, track_running_stats=False).eval(), 4)
    for variance in (-1.0, 0.0, float("nan"), float("inf")):
        module = kind(3, eps=0.0).eval()
        module.running_var.fill_(variance)  # type: ignore[operator,union-attr]
        with pytest.raises(gl.InputError, match="running_var"):
            gl.bound(module, 4)
