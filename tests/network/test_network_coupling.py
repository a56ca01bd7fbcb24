"""Coupled bounds against exact constants: networks with weights >= 0 and no bias have the norm of their linear part.

There every activation can pass everything (inputs >= 0), and a matrix with entries >= 0 dominates each one with fewer of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor, nn

import gramlip as gl
from gramlip.network import coupling
from gramlip.network.audit import audit
from gramlip.network.compose import constants
from gramlip.network.coupling.circulant import Circulant, circulant
from gramlip.network.coupling.elimination import Piece, single
from gramlip.network.coupling.linear_forms import Entries, system
from gramlip.network.coupling.multipliers import MultiplierSearch, certificate, improve, reached
from gramlip.network.fold import fold
from gramlip.network.graph import export
from gramlip.network.rules import lower
from gramlip.network.steps import Linear, Network, Step


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
        run = [Piece(system(network, maps))]
        upper = certificate(run, improve(run, MultiplierSearch.closed(run), 15))
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
        run = [Piece(system(network, circulant(network)))]
        upper = certificate(run, MultiplierSearch.closed(run))
        assert linear_part(model, (1, n, n)) <= upper


@pytest.mark.parametrize("taps", list(itertools.permutations([1.0, -1.0, 2.0**-54])), ids=str)
def test_entries_in_which_taps_cancel_err_by_their_moduli(taps: tuple[float, ...]) -> None:
    """All taps read the one input under replicate padding: 1 - 1 + 2^-54, of which float64 may leave nothing."""
    conv, last = nn.Conv1d(1, 2, 3, padding=1, padding_mode="replicate").double(), nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0], conv.weight[1, 0, 1] = torch.tensor(taps, dtype=torch.float64), 2.0**-60
        conv.bias.fill_(1.0)
        last.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    found = audit(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), last).eval(), torch.zeros(1, 1, 1, dtype=torch.float64))
    assert found.upper >= 2**0.5 * 2.0**-54  # both units are active at 0


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Hardswish(), nn.Tanh(), nn.GELU(), nn.PReLU(3)])
def test_other_activations_stay_above_their_jacobians(act: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "ENTRIES", 0)
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


def encoder(*, pool: bool) -> nn.Sequential:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) if pool else ()
    return nn.Sequential(Residual(1), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), Residual(2), *head)


RUNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "one level": (lambda: chain(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)), (2, 5, 4), 3),
    "strides": (lambda: chain(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 2, 3, 2, 1)), (2, 9, 7), 3),
    "stride 3": (lambda: chain(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 5, 3, 2), nn.Conv2d(2, 2, 3, padding=1)), (1, 8, 7), 3),
    "no piece of its own for a stride": (lambda: chain(nn.Conv2d(1, 2, 4, (1, 2)), nn.Conv2d(2, 2, 3, (2, 1), 1)), (1, 7, 8), 2),
    "residuals": (lambda: encoder(pool=False), (2, 6, 6), 3),
    "residuals and head": (lambda: encoder(pool=True), (2, 6, 6), 4),
    "residuals and head, odd": (lambda: encoder(pool=True), (2, 5, 7), 4),
    "up again": (lambda: chain(nn.Conv2d(1, 3, 4, 2, 1), nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 1, 4, 2, 1)), (1, 8, 6), 3),
    "1d": (lambda: chain(nn.Conv1d(1, 2, 5, 2, 2), nn.Conv1d(2, 2, 3, 3, 1), nn.Conv1d(2, 1, 3, padding=1)), (1, 23), 3),
    "3d": (lambda: chain(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 2, 2, 2), nn.Conv3d(2, 1, 1)), (1, 3, 4, 3), 3),
}


def planned(network: Network) -> coupling.SegmentPlan:
    cuts = coupling.cuts_of(network)
    assert cuts is not None
    shapes = [[network.steps[s].shape for s in step.sources] for step in network.steps]
    found = coupling.plan(network, constants(network.steps, shapes), cuts, 0)
    assert found is not None
    assert found.last == len(network.steps) - 1
    return found


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_linked_pieces_are_never_below_the_exact_constant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "ENTRIES", 4)
    monkeypatch.setattr(coupling, "SMALL", 0)
    build, shape, pieces = RUNS[name]
    for seed in range(2):
        model = positive(build(), seed)
        network = steps(model, shape)
        found = planned(network)
        assert len(found.run) == pieces
        exact = linear_part(model, shape)
        closed = MultiplierSearch.closed(found.run)
        upper = certificate(found.run, improve(found.searches[0], closed, 15))
        assert exact * (1 - 1e-12) <= min(upper, certificate(found.run, closed))
        if "head" not in name:  # links cost little against one torus for the whole
            whole = [Piece(system(network, circulant(network)))]
            assert upper <= 1.5 * certificate(whole, improve(whole, MultiplierSearch.closed(whole), 15))


@pytest.mark.parametrize("name", ["strides", "residuals and head", "up again"])
def test_any_choice_proves_a_bound_or_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "ENTRIES", 4)
    monkeypatch.setattr(coupling, "SMALL", 0)
    build, shape, _ = RUNS[name]
    model = positive(build(), 0)
    exact, found = linear_part(model, shape), planned(steps(model, shape))
    torch.manual_seed(0)
    for spread in (0.0, 0.5, 3.0, 20.0):
        for excess in (-50.0, -1.0, 3.0):
            search = MultiplierSearch.closed(found.run)
            for choices in search.choices:
                for choice in choices.values():
                    choice.shape, choice.excess = spread * torch.randn_like(choice.shape), torch.tensor(excess, dtype=torch.float64)
            search.powers = [torch.tensor(float(p), dtype=torch.float64) for p in spread * torch.randn(len(found.run))]
            assert exact * (1 - 1e-12) <= certificate(found.run, search)


def test_a_mean_with_rounded_weights_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1/49 rounded to float32 and made larger: the model's own weight counts, not the mean that it looks like
    monkeypatch.setattr(coupling, "ENTRIES", 4)
    monkeypatch.setattr(coupling, "SMALL", 0)
    mean = nn.Conv2d(2, 2, 7, groups=2, bias=False)
    model = positive(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), mean, nn.Flatten(), nn.Linear(2, 1)), 0)
    with torch.no_grad():
        mean.weight.fill_(1.001 / 49)
    found = planned(steps(model, (1, 7, 7)))
    exact = linear_part(model, (1, 7, 7))
    assert exact * (1 - 1e-12) <= certificate(found.run, MultiplierSearch.closed(found.run)) <= 1.03 * exact


@pytest.mark.parametrize("scale", [1e-28, 1e28])
def test_a_deep_chain_of_tiny_or_huge_layers_is_bounded(scale: float) -> None:
    model = positive(chain(*(nn.Linear(3, 3) for _ in range(8))), 1).double()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(scale)
    report = audit(model, torch.ones(1, 3, dtype=torch.float64))
    matrices = [(layer.weight / scale).detach() for layer in model[::2]]
    exact = float(torch.linalg.matrix_norm(torch.linalg.multi_dot(matrices[::-1]), 2))
    logarithm = math.log(exact) + 8 * math.log(scale)
    assert math.log(report.upper) >= logarithm - 1e-9


def test_symbols_on_a_torus_of_three_axes_err_by_no_more_than_is_claimed() -> None:
    """One tap times three roots, each within 21 units: the error was claimed to be at most 24 units in all."""
    weight = torch.zeros(1, 1, 2, 2, 2)
    weight[..., 1, 1, 1] = 1.0
    torus = Circulant([(1, 1, 89, 89, 89)] * 2, [(1, 1, 1)] * 2, (89, 89, 89))
    step = Step(Linear(gl.Conv(weight, (90, 90, 90))), (0,), (1, 1, 89, 89, 89), "", "")
    symbol, error, _, _ = torus.linear(1, step, step.what)
    at = int(torus.find(torch.tensor([[44, 88, 88]]))[0])
    with mpmath.workdps(30):
        exact = mpmath.expjpi(mpmath.mpf(2 * int(torus.grid[at].sum())) / 89)
        assert abs(mpmath.mpc(complex(symbol[at, 0, 0])) - exact) <= error


def test_a_value_of_several_results_begins_no_part() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    report = audit(Last().eval(), (5, 4), effort=0)
    assert 0.0 < report.lower <= report.upper < math.inf


@pytest.mark.parametrize("name", RUNS)
def test_the_first_torus_of_a_search_takes_real_numbers_to_what_complex_ones_come_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "ENTRIES", 4)
    monkeypatch.setattr(coupling, "SMALL", 0)
    build, shape, _ = RUNS[name]
    run = planned(steps(positive(build(), 1), shape)).searches[0]
    rough = single(run)
    assert any(block.is_complex() for piece in run for block in piece.system.output.blocks.values())
    assert any(not block.is_complex() for piece in rough for block in piece.system.output.blocks.values())
    search = MultiplierSearch.closed(run)
    assert reached(rough, search) == pytest.approx(reached(run, search), abs=1e-4)
