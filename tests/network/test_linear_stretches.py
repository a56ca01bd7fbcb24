"""Linear stretches and sums of entrywise functions: against a basis pushed through the modules themselves, and against pairs of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramlip.network import fold, linear_stretches
from gramlip.network.audit import audit
from test_rules import Map


def exact(model: nn.Module, shape: tuple[int, ...]) -> float:
    """The norm of an affine model, from its values at a basis."""
    wide = model.double().eval()
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        shift = wide(zero)
        columns = [(wide(x.reshape(1, *shape)) - shift).flatten() for x in torch.eye(zero.numel(), dtype=torch.float64)]
    return float(torch.linalg.matrix_norm(torch.stack(columns), 2))


class Calls(nn.Module):
    """A function of the input and of layers."""

    def __init__(self, call: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.call, self.layers = call, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.layers)


RAMP = torch.linspace(-1, 1, 16).reshape(2, 8)
PLACES = torch.tensor([0, 1, 1, 3, 3, 3])
STEEP = torch.arange(8) > 3
C1, C2 = (lambda **how: nn.Conv1d(2, 4, 3, padding=1, **how)), (lambda **how: nn.Conv2d(2, 3, 3, padding=1, **how))


def low(x: Tensor, mode: str = "nearest", **how: object) -> Tensor:
    """What is left of an image without its coarse part."""
    return x - F.interpolate(F.avg_pool2d(x, 2), x.shape[2:], mode=mode, **how)  # type: ignore[arg-type]


AFFINE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution, flattened, matrix": (lambda: nn.Sequential(C1(), nn.Flatten(), nn.Linear(32, 5)), (2, 8)),
    "a matrix with more rows": (lambda: nn.Sequential(C1(), nn.Flatten(), nn.Linear(32, 40)), (2, 8)),
    "coarse part removed": (lambda: Calls(low), (3, 8, 8)),
    "coarse part removed, bilinear": (lambda: Calls(lambda x: low(x, "bilinear")), (2, 8, 8)),
    "coarse part removed, corners": (lambda: Calls(lambda x: low(x, "bilinear", align_corners=True)), (2, 6, 10)),
    "coarse part removed, bicubic": (lambda: Calls(lambda x: low(x, "bicubic")), (2, 8, 8)),
    "coarse part removed, antialias": (lambda: Calls(lambda x: low(x, "bilinear", antialias=True)), (1, 8, 8)),
    "slices joined again": (
        lambda: Calls(lambda x, c: torch.cat([c(x)[:, :, ::2] / 2, c(x)[:, :, 1::2].flip(2)], 1).sum(1), C1()),
        (2, 8),
    ),
    "mean of a convolution": (lambda: Calls(lambda x, c, d: d(c(x).mean((2, 3))), C2(), nn.Linear(3, 4)), (2, 8, 8)),
    "a value less its mean": (lambda: Calls(lambda x, c: x - x.mean(1, keepdim=True) + 0.3 * c(x), nn.Linear(8, 8)), (3, 8)),
    "split and stacked": (lambda: Calls(lambda x, c: torch.stack(c(x).split(2, 1)).sum(0), C1(padding_mode="reflect")), (2, 8)),
    "unbound": (lambda: Calls(lambda x, c: sum((i + 1) * y for i, y in enumerate(c(x).unbind(1))), C1()), (2, 8)),  # type: ignore[arg-type, return-value]
    "adaptive pooling": (lambda: Calls(lambda x, c: F.adaptive_avg_pool2d(c(x), 3), C2(padding_mode="circular")), (2, 8, 8)),
    "masked, then a running sum": (
        lambda: Calls(lambda x, c: torch.where(STEEP, c(x), torch.tensor(2.0, dtype=x.dtype)).cumsum(1), nn.Linear(8, 8)),
        (8,),
    ),
    "sums at places, then a running sum": (
        lambda: Calls(lambda x, c: torch.zeros(1, 4).to(x).index_add(1, PLACES, c(x), alpha=-2).cumsum(1), nn.Linear(6, 6)),
        (6,),
    ),
    "einsum": (lambda: Calls(lambda x, c: torch.einsum("bij,kj->bik", c(x), RAMP.to(x)).sum(1), nn.Linear(8, 8)), (3, 8)),
    "matrices from the left": (
        lambda: Calls(lambda x, c: (RAMP.to(x) @ c(x).mT).unflatten(2, (1, 3)).mean(1), nn.Linear(8, 8)),
        (3, 8),
    ),
    "windows": (lambda: Calls(lambda x, c: c(F.unfold(x, 3)), nn.Linear(36, 8)), (2, 8, 8)),
    "in place": (lambda: Calls(lambda x, c: c(x).masked_fill_(STEEP, 0.0).triu_(), nn.Linear(8, 8)), (3, 8)),
    "padding by a constant": (lambda: Calls(lambda x, c: c(F.pad(x, (1, 1, 1, 1), value=2.0)), nn.Linear(10, 8)), (2, 8, 8)),
    "padding, not folded": (lambda: Calls(lambda x, c: c(F.pad(x, (2, 3), mode="replicate")), nn.Linear(13, 8)), (2, 8)),
    "joined with a constant": (lambda: Calls(lambda x, c: c(torch.cat([x, torch.ones_like(x)], 1)), nn.Linear(8, 8)), (4,)),
    "a difference that vanishes": (lambda: Calls(lambda x, c: c(x).flatten(1) - c(x).reshape(1, -1), nn.Linear(8, 8)), (2, 8)),
    "axes turned": (lambda: Calls(lambda x, c, d: d(c(x).mT).mT.mean(1), nn.Linear(6, 6), nn.Linear(5, 7)), (5, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 4, 2, 1), nn.AvgPool1d(3), nn.Flatten(), nn.Linear(15, 3)), (2, 8)),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_models_are_exact(name: str) -> None:
    torch.manual_seed(0)
    make, shape = AFFINE[name]
    model = make()
    report = audit(model, shape, effort=-1)
    truth = exact(model, shape)
    assert truth * (1 - 1e-12) <= report.upper <= truth * (1 + 2e-6) + 1e-9


def test_the_example_of_the_page() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(16, 4))
    report = audit(model, (1, 8), effort=-1)
    assert "theorem N18" in report.network.because


@pytest.mark.parametrize("batch", [1, 3])
def test_samples_and_channels_are_parts(batch: int) -> None:
    """An image of 3072 entries is three matrices of 1024, and three samples do not change that."""
    found = audit(Calls(low), torch.zeros(batch, 3, 32, 32), rtol=1e-3, effort=-1)
    assert 1.0 - 1e-12 <= found.upper <= 1.0011
    assert "1024x1024" in found.network.because


def test_channels_that_differ_count_with_the_largest() -> None:
    gains = torch.tensor([0.5, -3.0, 1.0]).reshape(1, 3, 1, 1)
    found = audit(Calls(lambda x: gains.to(x) * low(x)), (3, 8, 8), effort=-1)
    assert 3.0 - 1e-12 <= found.upper <= 3.0 * (1 + 2e-6)


def test_between_activations() -> None:
    """Stretches inside a network: pieces of rank one whose parts are each of norm above 1."""
    torch.manual_seed(1)
    model = nn.Sequential(
        C1(), nn.Flatten(), nn.Linear(32, 32), nn.Tanh(), nn.Unflatten(1, (4, 8)), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(16, 4)
    )
    halves = exact(model[:3], (2, 8)) * exact(model[4:], (32,))
    assert audit(model, (2, 8), effort=-1).upper <= halves * (1 + 1e-5)


def test_a_matrix_that_is_too_large_leaves_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(C1(), nn.Flatten(), nn.Linear(32, 5))
    monkeypatch.setattr(linear_stretches, "SIDE", 4)
    report = audit(model, (2, 8), effort=-1)
    assert "N18" not in report.network.because
    assert report.upper > exact(model, (2, 8)) * 1.001


class TwoHalves(nn.Module):
    """Two linear maps, whose result is unbound into two tensors, as the queries and keys of windowed attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.second(self.first(x)).reshape(3, 2, 12).permute(1, 0, 2).unbind(0)
        return q.relu() + k.relu()


def test_a_stretch_does_not_end_at_a_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the whole matrix is not formed a shorter stretch is tried, but the value of `unbind` has no matrix."""
    torch.manual_seed(0)
    model = TwoHalves()
    monkeypatch.setattr(linear_stretches, "PROOF", 0.0)
    with torch.no_grad():
        both = (model.second.weight[:12] + model.second.weight[12:]) @ model.first.weight
    assert float(torch.linalg.matrix_norm(both, 2)) <= audit(model, (3, 6), effort=-1).upper < math.inf


def test_a_long_run_of_convolutions_is_coupled_without_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no matrix is formed the torus still knows that the coarse part is a projection."""
    monkeypatch.setattr(linear_stretches, "SIDE", 4)
    assert audit(Calls(low), (1, 32, 32), effort=0).upper <= 1.001


def test_a_derivative_of_torch_that_is_no_adjoint_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 1.0 * x

        @staticmethod
        def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
            pass

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return 0.5 * grad

    torch.manual_seed(0)
    model = nn.Sequential(C1(), nn.Flatten(), nn.Linear(32, 5))
    right = linear_stretches.apply
    monkeypatch.setattr(linear_stretches, "apply", lambda op, x: Wrong.apply(right(op, x)))
    report = audit(model, (2, 8), effort=-1)
    assert "N18" not in report.network.because
    assert report.upper >= exact(model, (2, 8))


ENTRYWISE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # name: (call, its exact constant, or 0 where only one side is known)
    "x - tanh": (lambda x: x - torch.tanh(x), 1.0),
    "x + tanh": (lambda x: x + torch.tanh(x), 2.0),
    "gelu less half": (lambda x: F.gelu(x) - 0.5 * x, 0.628904146),
    "sine at another scale": (lambda x: x + torch.sin(-2 * x) / 2, 2.0),
    "three terms": (lambda x: torch.sigmoid(x) + F.silu(2 * x) - F.elu(x), 0.0),
    "beside another use": (lambda x: torch.cat([x - torch.tanh(x), torch.tanh(x)], 1), 1.0),
}


@pytest.mark.parametrize("name", ENTRYWISE)
def test_sums_of_entrywise_functions(name: str) -> None:
    call, constant = ENTRYWISE[name]
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)[:, None]
    y = call(x)
    seen = float(((y[1:] - y[:-1]).norm(dim=1) / (x[1:] - x[:-1]).norm(dim=1)).max())
    upper = audit(Map(call), (1,), effort=-1).upper
    assert seen * (1 - 1e-6) <= upper
    assert not constant or upper <= math.hypot(constant, 1.0 if "beside" in name else 0.0) * (1 + 1e-8)


def test_each_sum_of_a_long_chain_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums inside sums, as a chain of 12 or the comparisons of a sort are: each asked for those inside it again, 4^12 times in all."""
    asked, plain = list[int](), fold._slopes

    def counted(at: int, *others: Any) -> Any:
        asked.append(at)
        assert len(asked) < 1000
        return plain(at, *others)

    monkeypatch.setattr(fold, "_slopes", counted)

    def chain(x: Tensor) -> Tensor:
        for _ in range(12):
            x = x + torch.tanh(x)
        return x

    assert 2.0**12 <= audit(Map(chain), (2,), effort=-1).upper <= 2.0**12 * (1 + 1e-8)
    assert asked


def test_slopes_of_channels_are_added_channel_by_channel() -> None:
    layer = nn.PReLU(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    upper = audit(Calls(lambda x, f: x - f(x), layer), (3, 4), effort=-1).upper
    assert 2.0 - 1e-12 <= upper <= 2.0 + 1e-8
