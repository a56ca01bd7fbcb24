"""Compiled, replicated and checkpointed modules are what the module inside is, in every verb; hooks on a wrapper are never lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import gramlip as gl
from gramlip import nn as gnn

WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "checkpoint": checkpoint_wrapper,
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}
pytestmark = pytest.mark.parametrize("name", WRAPS)


def layer() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(2, 3, 3, padding=1)


def net() -> nn.Sequential:
    return nn.Sequential(layer(), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))


def test_bound_and_audit_see_through(name: str) -> None:
    wrap = WRAPS[name]
    assert gl.bound(wrap(layer()), 4) == gl.bound(layer(), 4)
    torch.manual_seed(0)
    wrapped, plain = gl.audit(wrap(net()).eval(), (2, 4, 4)), gl.audit(net().eval(), (2, 4, 4))
    assert [row.name for row in wrapped.layers] == [row.name for row in plain.layers] == ["0", "3"]
    inner = gl.audit(nn.Sequential(wrap(layer())).eval(), (2, 4, 4))
    assert inner.upper == gl.audit(nn.Sequential(layer()).eval(), (2, 4, 4)).upper


@pytest.mark.parametrize("verb", [gnn.spectral_norm, gnn.spectral_rescaling], ids=lambda verb: verb.__name__)
def test_parametrizations_go_inside_and_come_off(name: str, verb: Callable[..., nn.Module]) -> None:
    module = WRAPS[name](layer())
    assert verb(module, target=0.5) is module
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    assert gl.bound(module).lower <= 0.5
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler to itself
        assert float((module(x) - module(0 * x)).norm() / x.norm()) <= 0.5
    gnn.remove(module)
    assert gl.bound(module).upper <= 0.5


def test_walks_and_residuals(name: str) -> None:
    wrap = WRAPS[name]
    model = gnn.spectral_norm_(wrap(net()), (2, 4, 4))
    assert [path for path, *_ in gnn.normalised(model)] == ["0", "3"]
    assert len(gnn.LipschitzPenalty(wrap(net()), (2, 4, 4)).certify()) == 2
    block = gnn.Residual(wrap(nn.Linear(3, 3)))
    assert block(torch.ones(1, 3)).shape == (1, 3)
    assert gnn.remove(nn.Sequential(wrap(gnn.spectral_norm(layer())))) is not None


def test_the_last_layer_of_a_classifier(name: str) -> None:
    last = nn.Linear(4, 3)
    given = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(gl.robust.radii(*given, 1.0, last=WRAPS[name](last)), gl.robust.radii(*given, 1.0, last=last))


def double(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return 2 * out


def test_a_hook_on_a_wrapper_counts(name: str) -> None:
    module = WRAPS[name](nn.Linear(2, 2, bias=False))
    module.register_forward_hook(double)
    with pytest.raises(gl.UnsupportedError, match=r"has a forward hook, double.*type handle\.remove"):
        gl.bound(module)
    assert_twice_the_identity(module)


def assert_twice_the_identity(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).copy_(torch.eye(2))
    try:
        report = gl.audit(module.eval(), (2,))
    except gl.InputError as error:  # torch exports no activation checkpointing of a whole model
        assert "expected a model that torch.export takes" in str(error)  # noqa: PT017
    else:
        assert report.upper >= 2.0


def test_what_changes_the_map_is_no_wrapper(name: str) -> None:
    class Doubled(nn.DataParallel):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(gl.UnsupportedError, match="Doubled has no rule"):
        gl.bound(WRAPS[name](Doubled(layer())))
    changed = WRAPS[name](layer())
    changed.forward = lambda x: 2 * x
    with pytest.raises(gl.UnsupportedError, match="has no rule"):
        gl.bound(changed)
    split = nn.DataParallel(layer())
    split.dim = 2  # without a GPU the constructor leaves it out
    with pytest.raises(gl.UnsupportedError, match="DataParallel has no rule"):
        gl.bound(WRAPS[name](split))
