"""Coupled bounds against exact constants: networks with weights >= 0 and no bias have the norm of their linear part.

There every activation can pass everything (inputs >= 0), and a matrix with entries >= 0 dominates each one with fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gramlip.coupling import eliminate, segments
from gramlip.coupling.circulant import circulant
from gramlip.coupling.forms import Entries, system
from gramlip.fold import fold
from gramlip.graph import export
from gramlip.network import audit
from gramlip.rules import lower
from gramlip.steps import Network


class Residual(nn.Module):
    def __init__(self, stride: int, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, stride, 1), nn.Conv2d(3, 3, 3, 1, 1)
        self.s, self.act = nn.Conv2d(2, 3, 1, stride), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.s(x) + self.b(self.act(self.a(x))))


class PreActivation(nn.Module):
    """The stream is never cut by an activation: two padded convolutions in a row need the crop between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.relu(self.a(x))))


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 3, 3, 2, 1), nn.ConvTranspose2d(3, 2, 3, 2, 1, output_padding=1)
        self.out = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([torch.relu(self.up(torch.relu(self.down(x)))), torch.relu(x)], 1))


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "same": (lambda: chain(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)), (2, 5, 4)),
    "odd stride": (lambda: chain(nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 2, 3, padding=1)), (2, 7, 5)),
    "two strides": (lambda: chain(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 5, 2, 2)), (1, 8, 7)),
    "stride 3": (lambda: chain(nn.Conv2d(1, 2, 4, 3, 2), nn.Conv2d(2, 2, 2)), (1, 8, 9)),
    "wide padding": (lambda: chain(nn.Conv2d(1, 2, 3, padding=2), nn.Conv2d(2, 1, 3, padding=2)), (1, 3, 3)),
    "dilation and groups": (lambda: chain(nn.Conv2d(2, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)), (2, 5, 5)),
    "valid": (lambda: chain(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), (1, 6, 6)),
    "tall": (lambda: chain(nn.Conv2d(1, 2, (5, 1), padding=(2, 0)), nn.Conv2d(2, 1, (1, 4), padding=(0, 2))), (1, 5, 6)),
    "1d": (lambda: chain(nn.Conv1d(1, 2, 5, 2, 2), nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 1, 3, padding=1)), (1, 11)),
    "3d": (lambda: chain(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 1, 2, 2)), (1, 3, 4, 3)),
    "residual": (lambda: Residual(1), (2, 5, 5)),
    "residual stride": (lambda: Residual(2), (2, 7, 6)),
    "crop": (PreActivation, (2, 4, 5)),
    "up": (Up, (2, 6, 6)),
    "leaky": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(2, 1, 3, padding=1)), (1, 5, 5)),
}


def positive(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(0.0 * parameter if "bias" in name else torch.rand(parameter.shape, generator=generator))
    return model.eval()


def linear_part(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Norm of the Jacobian where all activations pass: at an input that is positive everywhere."""
    x = torch.ones(1, *shape, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(model.double(), x).reshape(-1, x.numel())
    model.float()
    return float(torch.linalg.matrix_norm(matrix, 2))


def steps(model: nn.Module, shape: tuple[int, ...]) -> Network:
    return fold(lower(export(model, (torch.zeros(1, *shape),))).network)


@pytest.mark.parametrize("domain", ["torus", "entries"])
@pytest.mark.parametrize("name", CASES)
def test_coupling_is_never_below_the_exact_constant_and_near_it(name: str, domain: str) -> None:
    build, shape = CASES[name]
    for seed in range(2):
        model = positive(build(), seed)
        exact = linear_part(model, shape)
        network = steps(model, shape)
        maps = circulant(network) if domain == "torus" else Entries([s.shape for s in network.steps])
        forms = system(network, maps)
        multipliers = eliminate.improve(forms, eliminate.closed_form(forms), 15)
        upper = eliminate.certificate(forms, multipliers)
        assert exact * (1 - 1e-12) <= upper
        if domain == "entries":
            assert upper <= 1.3 * exact


@pytest.mark.parametrize("kernel", ["second difference", "alternating"])
def test_the_adversary_of_circulant_grids(kernel: str) -> None:
    # outer([1, -2, 1]) with zero padding exceeds its circulant of the same size; identity-like activations let it through.
    row = torch.tensor([1.0, -2.0, 1.0]) if kernel == "second difference" else torch.tensor([1.0, -1.0, 1.0])
    for n in (3, 5, 7):
        model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.LeakyReLU(0.999), nn.Conv2d(1, 1, 1, bias=False)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.outer(row, row)[None, None])
            model[2].weight.fill_(1.0)
        network = steps(model, (1, n, n))
        forms = system(network, circulant(network))
        upper = eliminate.certificate(forms, eliminate.closed_form(forms))
        assert linear_part(model, (1, n, n)) <= upper


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Hardswish(), nn.Tanh(), nn.GELU(), nn.PReLU(3)])
def test_other_activations_stay_above_their_jacobians(act: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ENTRIES", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), act, nn.Conv2d(3, 3, 3, 2, 1), act, nn.Conv2d(3, 1, 3, padding=1)).eval()
    report = audit(model, (1, 6, 6), effort=0.1)
    double = model.double()
    best = 0.0
    for scale in (0.1, 1.0, 2.0, 5.0):
        x = scale * torch.randn(1, 1, 6, 6, dtype=torch.float64)
        matrix = torch.autograd.functional.jacobian(double, x).reshape(-1, 36)
        best = max(best, float(torch.linalg.matrix_norm(matrix.detach(), 2)))
    assert max(best, report.lower) <= report.upper
    assert "coupled" in (report.network.because if report.network else "")


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e20])
def test_scaled_weights_stay_bounded(scale: float) -> None:
    model = positive(chain(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)), 0).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    x = torch.ones(1, 4, dtype=torch.float64)
    exact = float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(model, x).reshape(2, 4), 2))
    report = audit(model, x)
    assert exact * (1 - 1e-12) <= report.upper <= 1.2 * exact


def test_infeasible_multipliers_prove_nothing() -> None:
    model = positive(chain(nn.Linear(4, 6), nn.Linear(6, 2)), 0)
    network = steps(model, (4,))
    forms = system(network, Entries([s.shape for s in network.steps]))
    small = {k: 0.4 * m for k, m in eliminate.closed_form(forms).items()}
    assert eliminate.certificate(forms, small) == float("inf")
