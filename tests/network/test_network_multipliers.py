"""Coupled bounds of dense networks against judges of their own: ECLipsE-Fast, LipSDP by a conic solver, all slopes at their ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

import gramlip as gl
from gramlip.network import Effort, coupling
from gramlip.network.audit import steps_of
from gramlip.network.compose import constants
from gramlip.network.coupling import coupled, elimination
from gramlip.network.coupling.elimination import middle_of, narrowed, narrowed_matrix, transposed
from gramlip.network.coupling.linear_forms import Entries, Slopes, system
from gramlip.network.coupling.multipliers import FINE, Program, _joined, closed_logarithms, newton, proved
from gramlip.network.steps import Input, Linear, Network, Slope, Step, Sum
from gramlip.numerics import rounding as rd
from gramlip.operators.linear_maps import Dense

Ends = tuple[Tensor, Tensor]


def random_chain(widths: Sequence[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) * (2 / n) ** 0.5 for n, m in itertools.pairwise(widths)]


def network_of(weights: Sequence[Tensor], ends: Sequence[Ends] | None = None) -> Network:
    """A chain of matrices, with slopes [0, 1] between them or those given for each entry."""
    steps = [Step(Input(), (), (1, weights[0].shape[1]), "x", "")]
    for i, weight in enumerate(weights):
        steps.append(Step(Linear(Dense(weight)), (len(steps) - 1,), (1, len(weight)), f"w{i}", ""))
        if i + 1 < len(weights):
            low, high = (0.0, 1.0) if ends is None else ends[i]
            steps.append(Step(Slope(low, high, ""), (len(steps) - 1,), (1, len(weight)), f"a{i}", ""))
    return Network(steps, (len(steps) - 1,))


def upper_of(network: Network, effort: float) -> float:
    shapes = [[network.steps[s].shape for s in step.sources] for step in network.steps]
    found = coupled(network, constants(network.steps, shapes), Effort(effort))
    assert found is not None
    return reduce(rd.mul_up, (segment.upper for segment in found))


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


# ---- ECLipsE-Fast --------------------------------------------------------------------------------------------------------


def eclipse_fast(weights: Sequence[Tensor]) -> float:
    """arXiv 2404.04375, from the input to the output: M = l I - l^2 W M^-1 W' / 4 with l = 2 / |W M^-1 W'|."""
    inverse = torch.eye(weights[0].shape[1], dtype=torch.float64)
    for weight in weights[:-1]:
        gram = weight @ inverse @ weight.mT
        multiplier = 2 / torch.linalg.eigvalsh(gram)[-1]
        inverse = torch.linalg.inv(multiplier * torch.eye(len(gram), dtype=torch.float64) - multiplier**2 * gram / 4)
    return float(torch.linalg.eigvalsh(weights[-1] @ inverse @ weights[-1].mT)[-1].sqrt())


CHAINS: list[tuple[int, ...]] = [
    (3, 3, 3),
    (1, 5, 1),
    (7, 1, 7),
    (300, 20, 5),
    (5, 300, 5),
    (5, 20, 300),
    (10, 40, 30, 20, 10),
    (600, 64, 64, 10),
    (20, *[12] * 20, 3),
    (6, *[20] * 49, 6),
    (4, *[3] * 49, 4),
]


@pytest.mark.parametrize("widths", CHAINS, ids=lambda w: f"{w[0]}-{max(w)}-{w[-1]} of {len(w)}")
def test_closed_forms_are_never_above_eclipse_fast(widths: tuple[int, ...]) -> None:
    for seed in range(3):
        weights = random_chain(widths, seed)
        fast = min(eclipse_fast(weights), eclipse_fast([w.mT for w in reversed(weights)]))
        assert upper_of(network_of(weights), 0.0) <= fast * (1 + 1e-9)


def test_wide_layers_are_coupled() -> None:
    weights = [torch.randn(m, n, generator=torch.Generator().manual_seed(m)) / n**0.5 for n, m in ((5000, 700), (700, 900), (900, 10))]
    network = network_of(weights)
    upper = upper_of(network, 0.0)
    assert upper <= eclipse_fast([w.double() for w in weights]) * (1 + 1e-9)
    assert norm(weights[2].double() @ weights[1].double() @ weights[0].double()) / 4 <= upper


def test_scales_of_the_weights_make_no_difference() -> None:
    weights = random_chain((6, *[8] * 30, 4), 0)
    factors = [10.0 ** (25 * math.sin(i)) for i in range(len(weights))]
    scale = sum(map(math.log, factors))
    plain, scaled = upper_of(network_of(weights), 0.2), upper_of(network_of([f * w for f, w in zip(factors, weights, strict=True)]), 0.2)
    assert abs(math.log(scaled) - scale - math.log(plain)) < 1e-3


# ---- LipSDP --------------------------------------------------------------------------------------------------------------


def lipsdp(weights: Sequence[Tensor], ends: Sequence[Ends]) -> float:
    """LipSDP-Neuron (arXiv 1906.04893) by a conic solver, over the values after the activations that are not linear.

    With `v = D q`, `D` in [a, b], l >= 0: `rho |x|^2 - |output|^2 - sum l (v - a q)(b q - v) >= 0`.
    """
    scs = pytest.importorskip("scs")
    free = [(high - low > 1e-6).nonzero()[:, 0] for low, high in ends]
    n = weights[0].shape[1]
    size = n + sum(map(len, free))
    value, start, gains = np.eye(n, size), n, [np.diag([1.0] * n + [0.0] * (size - n))]
    for weight, (low, high), on in zip(weights, ends, free, strict=False):
        query = weight.numpy() @ value
        value = low.numpy()[:, None] * query
        for i, entry in enumerate(on.tolist()):
            v, q, a, b = np.eye(1, size, start + i)[0], query[entry], float(low[entry]), float(high[entry])
            value[entry] = v
            half = np.outer(v - a * q, b * q - v)
            gains.append(-(half + half.T) / 2)
        start += len(on)
    out = weights[-1].numpy() @ value
    scale = float(np.linalg.norm(out, 2)) ** 2
    j, i = np.triu_indices(size)  # the lower triangle, column by column
    root = np.where(i == j, 1.0, math.sqrt(2))
    triangle = np.stack([g[i, j] * root for g in gains], 1)
    a = sparse.csc_matrix(np.vstack([-np.eye(len(gains)), -triangle]))
    b = np.concatenate([np.zeros(len(gains)), -(out.T @ out)[i, j] * root / scale])
    data, cone = {"A": a, "b": b, "c": np.eye(1, len(gains))[0]}, {"l": len(gains), "s": [size]}
    found = scs.SCS(data, cone, verbose=False, eps_abs=1e-6, eps_rel=1e-6, max_iters=20000).solve()
    assert found["info"]["status"] == "solved", found["info"]
    return math.sqrt(found["info"]["pobj"] * scale)


def all_ends(weights: Sequence[Tensor], low: float = 0.0, high: float = 1.0) -> list[Ends]:
    return [(torch.full((len(w),), low, dtype=torch.float64), torch.full((len(w),), high, dtype=torch.float64)) for w in weights[:-1]]


def mixed_ends(weights: Sequence[Tensor], seed: int) -> list[Ends]:
    """Slopes of all kinds: wide, narrow, negative, of one sign, and those of linear entries."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Ends] = []
    for weight in weights[:-1]:
        low = torch.rand(len(weight), generator=generator, dtype=torch.float64) * 1.4 - 0.7
        high = low + torch.rand(len(weight), generator=generator, dtype=torch.float64)
        kind = torch.randint(0, 5, (len(weight),), generator=generator)
        high = torch.where(kind == 0, low, torch.where(kind == 1, low + 1e-9, high))
        low, high = torch.where(kind == 2, 0.0, low), torch.where(kind == 2, 1.0, high)
        found.append((low, high))
    return found


JUDGED = [
    *itertools.product([(5, 10, 10, 3), (20, 50, 10), (8, 12, 12, 12, 5)], ["relu", "tanh-like", "mixed"]),
    *itertools.product([(10, 100, 5), (20, 50, 50, 10)], ["relu", "tanh-like"]),  # of the others the solver is not sure there
]


@pytest.mark.parametrize(("widths", "slopes"), JUDGED, ids=str)
def test_coupling_is_lipsdp_up_to_100_neurons(widths: tuple[int, ...], slopes: str) -> None:
    weights = random_chain(widths, 1)
    ends = {
        "relu": all_ends(weights),
        "tanh-like": all_ends(weights, -0.3, 0.9),
        "mixed": mixed_ends(weights, 2),
    }[slopes]
    exact, upper = lipsdp(weights, ends), upper_of(network_of(weights, ends), 1.0)
    assert exact * (1 - 2e-3) <= upper <= 1.005 * exact  # the solver's own accuracy is about a thousandth


# ---- all slopes at their ends --------------------------------------------------------------------------------------------


def steepest(weights: Sequence[Tensor], ends: Sequence[Ends]) -> float:
    """The largest norm over all choices of each slope's end: a function with these slopes can have this norm somewhere."""
    sizes, most = [len(low) for low, _ in ends], 0.0
    for choice in itertools.product((0, 1), repeat=sum(sizes)):
        matrix = weights[0]
        for pick, (low, high), weight in zip(torch.tensor(choice).split(sizes), ends, weights[1:], strict=True):
            matrix = weight @ (torch.where(pick == 1, high, low)[:, None] * matrix)
        most = max(most, norm(matrix))
    return most


def check_slopes_at_their_ends() -> None:
    for seed in range(4):
        weights = random_chain([(2, 4, 3, 2), (3, 5, 1), (1, 3, 4, 3), (3, 2, 2, 2, 4)][seed], seed)
        for ends in (all_ends(weights), all_ends(weights, -0.4, 0.9), mixed_ends(weights, seed)):
            exact = steepest(weights, ends)
            network = network_of(weights, ends)
            for effort in (0.0, 1.0):
                assert exact * (1 - 1e-12) <= upper_of(network, effort)
            for side in (system(network, Entries([s.shape for s in network.steps])),):
                other = transposed(side)
                assert other is not None
                for one in (side, other, narrowed(side), narrowed(other)):
                    start = closed_logarithms(one)
                    assert start is not None
                    assert exact * (1 - 1e-12) <= min(proved(one, start), *(proved(one, found) for found in newton(one, start, 20)))


def test_no_choice_of_slopes_exceeds_the_bound() -> None:
    check_slopes_at_their_ends()


def test_known_slopes_are_linear() -> None:
    for seed in range(3):
        weights = random_chain((5, 7, 6, 4), seed)
        generator = torch.Generator().manual_seed(seed)
        slopes = [torch.rand(len(w), generator=generator, dtype=torch.float64) * 2 - 1 for w in weights[:-1]]
        matrix = weights[0]
        for slope, weight in zip(slopes, weights[1:], strict=True):
            matrix = weight @ (slope[:, None] * matrix)
        upper = upper_of(network_of(weights, [(s, s) for s in slopes]), 0.0)
        assert norm(matrix) * (1 - 1e-12) <= upper <= norm(matrix) * (1 + 1e-6)
        one = [(s.clone(), s.clone()) for s in slopes]
        one[0][1][0] += 1.0  # one entry that may bend: no more than its part
        bent = upper_of(network_of(weights, one), 1.0)
        assert bent < 0.9 * upper_of(network_of(weights, [(s - 1, s + 1) for s in slopes]), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_any_multipliers_prove_a_bound_or_nothing(seed: int) -> None:
    weights = random_chain((3, 4, 3, 2), seed)
    ends = mixed_ends(weights, seed)
    exact, network = steepest(weights, ends), network_of(weights, ends)
    inside = system(network, Entries([s.shape for s in network.steps]))
    start = closed_logarithms(inside)
    assert start is not None
    torch.manual_seed(seed)
    for spread in (0.1, 1.0, 5.0, 50.0, 800.0):
        assert exact * (1 - 1e-12) <= proved(inside, {k: v + spread * torch.randn_like(v) for k, v in start.items()})


def test_residual_sums_have_an_adjoint_too() -> None:
    """x -> x + w2 D w1 x twice, then a matrix: every value is read by several others."""
    w = random_chain((3, 3, 3, 3, 3, 2), 5)
    steps = [Step(Input(), (), (1, 3), "", "")]
    for i in (0, 2):
        at = len(steps) - 1
        steps.append(Step(Linear(Dense(w[i])), (at,), (1, 3), "", ""))
        steps.append(Step(Slope(0.0, 1.0, ""), (at + 1,), (1, 3), "", ""))
        steps.append(Step(Linear(Dense(w[i + 1])), (at + 2,), (1, 3), "", ""))
        steps.append(Step(Sum((1, 1)), (at, at + 3), (1, 3), "", ""))
    steps.append(Step(Linear(Dense(w[4])), (len(steps) - 1,), (1, 2), "", ""))
    exact = 0.0
    for choice in itertools.product((0.0, 1.0), repeat=6):
        d = torch.tensor(choice, dtype=torch.float64)
        eye = torch.eye(3, dtype=torch.float64)
        exact = max(exact, norm(w[4] @ (eye + w[3] @ torch.diag(d[3:]) @ w[2]) @ (eye + w[1] @ torch.diag(d[:3]) @ w[0])))
    network = Network(steps, (len(steps) - 1,))
    one = system(network, Entries([s.shape for s in steps]))
    other = transposed(one)
    assert other is not None
    back = transposed(other)
    assert back is not None
    found: list[float] = []
    for side in (one, other, back):
        start = closed_logarithms(side)
        assert start is not None
        found.append(min(proved(side, logs) for logs in newton(side, start, 30)))
        assert exact * (1 - 1e-12) <= min(found[-1], proved(side, start))
    assert max(found) <= 1.01 * min(found)  # the two programs have one optimum


def residual_chain(blocks: int, seed: int) -> Network:
    """Values v with `v <- a(v + w v)`, of slopes of all kinds, after a matrix and before one."""
    weights = random_chain((3, *[4] * (blocks + 1), 2), seed)
    ends = mixed_ends(weights, seed)
    steps = [Step(Input(), (), (1, 3), "", ""), Step(Linear(Dense(weights[0])), (0,), (1, 4), "", "")]
    for weight, (low, high) in zip(weights[1:-1], ends, strict=False):
        at = len(steps) - 1
        steps.append(Step(Linear(Dense(weight)), (at,), (1, 4), "", ""))
        steps.append(Step(Sum((1, 1)), (at, at + 1), (1, 4), "", ""))
        steps.append(Step(Slope(low, high, ""), (at + 2,), (1, 4), "", ""))
    return Network([*steps, Step(Linear(Dense(weights[-1])), (len(steps) - 1,), (1, 2), "", "")], (len(steps),))


@pytest.mark.parametrize("seed", range(4))
def test_the_blocks_of_a_program_are_those_of_the_whole_matrix(seed: int) -> None:
    """Products, traces and step lengths that use how few entries a query reads are those of the dense matrices."""
    network = residual_chain(3, seed)
    inside = system(network, Entries([s.shape for s in network.steps]))
    start = closed_logarithms(inside)
    assert start is not None
    program = Program.of(inside, start, 2 * math.log(proved(inside, start)))
    torch.manual_seed(seed)
    y = torch.ones(1 + program.count, dtype=torch.float64)
    dy, m = torch.randn_like(y), program.matrix(y * 1.5)
    s, t = (a @ a.mT for a in torch.randn(2, *m.shape, dtype=torch.float64))
    queried, gains = program.queried(s), [program.direction(e)[0] for e in torch.eye(len(y), dtype=torch.float64)]
    assert torch.allclose(program.moved(dy, s, queried), program.direction(dy) @ s)
    assert torch.allclose(program.direction(dy)[0], sum(g * d for g, d in zip(gains, dy, strict=True)))  # type: ignore[arg-type]
    assert torch.allclose(program.traces(s), torch.stack([(g * s[0]).sum() for g in gains]))
    products = torch.tensor([[torch.trace(g @ t[0] @ h @ s[0]) for h in gains] for g in gains], dtype=torch.float64)
    assert torch.allclose(program.products(t, s, queried), products)
    step = program.direction(dy)
    part = program.longest(m, step, FINE)
    assert torch.linalg.eigvalsh(m + part * step).min() > 0
    if 0 < part < 1:
        assert torch.linalg.eigvalsh(m + part / (0.95 * FINE[0]) * step).min() < 0


@pytest.mark.parametrize("widths", [(4, *[6] * 12, 3), (20, *[12] * 20, 3)], ids=str)
def test_long_chains_start_from_their_halves(widths: tuple[int, ...]) -> None:
    for seed in range(2):
        weights = random_chain(widths, seed)
        network = network_of(weights, all_ends(weights, -0.1, 1.0))
        inside = system(network, Entries([s.shape for s in network.steps]))
        start = closed_logarithms(inside)
        assert start is not None
        assert middle_of(inside) == (len(widths) - 2) // 2
        first = proved(inside, _joined(inside, start))
        least = min(proved(inside, logs) for logs in newton(inside, start, 60))
        assert least <= first < 0.6 * proved(inside, start)
        assert first < 2.5 * least
    residual = residual_chain(4, 0)
    assert middle_of(system(residual, Entries([s.shape for s in residual.steps]))) == 2


# ---- steps and their limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.1, 0.3), (-0.13, 1.13), (1.0, 1.0), (1.0, 1.0 + 2.0**-52), (-3e-320, 3e-320), (-1e-30, 1e9)]
)
def test_centres_and_radii_hold_the_slopes(low: float, high: float) -> None:
    found = Slopes.between(torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64))
    centre, radius = Fraction(float(found.centre)), Fraction(float(found.radius))
    assert centre - radius <= Fraction(low) <= Fraction(high) <= centre + radius
    assert (radius == 0) == (low == high)


def check_narrow_matrices() -> None:
    for seed, error in itertools.product(range(3), (0.0, 0.1, 3.0)):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(4, 50, generator=generator)
        narrow = narrowed_matrix(weight, error)
        assert narrow is not None
        for _ in range(20):
            e = torch.randn(4, 50, generator=generator, dtype=torch.float64)
            wide = weight.double() + error * e / norm(e)
            row = torch.randn(1, 4, generator=generator, dtype=torch.float64)
            assert norm(row @ wide) <= norm(row @ narrow)
            wide = weight.double() + error * weight.double() / norm(weight.double())
            assert norm(wide) <= norm(narrow)


def test_narrow_matrices_are_above_wide_ones_whatever_stands_before_them() -> None:
    check_narrow_matrices()


@pytest.mark.parametrize("build", ["dense", "convolutions"])
def test_more_effort_is_never_worse(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr(coupling, "NEWTON", 1e7)
    monkeypatch.setattr(coupling, "STEPS", 60)
    if build == "dense":
        model: nn.Module = nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
        shape: tuple[int, ...] = (9,)
    else:
        monkeypatch.setattr(coupling, "ENTRIES", 4)
        monkeypatch.setattr(coupling, "SMALL", 0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
        ).eval()
        shape = (1, 6, 6)
    network = steps_of(model, shape)
    uppers = [upper_of(network, effort) for effort in (0.0, 0.1, 0.3, 1.0, 2.0)]
    assert uppers == sorted(uppers, reverse=True)
    assert uppers[-1] < 0.95 * uppers[0]


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-60, 1e-16, 1e-9])
def test_tiny_and_singular_networks_end_in_a_bound(scale: float) -> None:
    """Weights of rank one, with zero rows, scaled to almost nothing: no system of equations is worth an error."""
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU6(), nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3), nn.Hardswish(), nn.Linear(3, 2))
    model = nn.Sequential(*convolutions, *head).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(scale * torch.ones_like(weight))
            if "0" in name:
                weight[0] = 0.0
    report = gl.audit(model, torch.zeros(1, 1, 6, 6, dtype=torch.float64))
    assert report.lower <= report.upper <= gl.audit(model, torch.zeros(1, 1, 6, 6, dtype=torch.float64), effort=-1.0).upper


def test_the_head_of_a_convolutional_network_is_coupled() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(1152, 60), nn.ReLU(), nn.Linear(60, 10))
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), head).eval()
    report = gl.audit(model, (2, 12, 12), effort=0.2)
    assert report.network is not None
    assert "coupled" in report.network.because
    assert report.upper < 0.95 * gl.audit(model, (2, 12, 12), effort=-1.0).upper
    x = torch.randn(1, 2, 12, 12)
    assert norm(torch.autograd.functional.jacobian(model, x).reshape(10, -1).double()) <= report.upper


def test_systems_without_an_input_have_no_adjoint() -> None:
    network = network_of(random_chain((2, 3, 2), 0))
    one = system(network, Entries([s.shape for s in network.steps]))
    one.queries[1] = elimination.Form({}, {}, True)
    assert transposed(one) is None
