"""Linear regions, against the enumeration of all of them by linear programs, and against Jacobians at points, by torch and scipy alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

import gramlip as gl
from gramlip.network.fold import fold
from gramlip.network.graph import export
from gramlip.network.local import region, region_search, regions, restricted
from gramlip.network.rules import lower
from test_local import centre, mlp
from test_rules import Map

WAY = "the steepest linear region"


def settled(model: nn.Module, seed: int) -> nn.Module:
    """With larger biases and statistics, so that many regions meet a small set."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.double().eval().modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.weight.data = torch.randn(part.weight.shape, generator=generator, dtype=torch.float64) / part.weight[0].numel() ** 0.5
            part.bias.data = torch.randn(part.bias.shape, generator=generator, dtype=torch.float64)  # type: ignore[reportOptionalMemberAccess]
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean = torch.randn(part.num_features, generator=generator, dtype=torch.float64)
            part.running_var = 0.2 + torch.rand(part.num_features, generator=generator, dtype=torch.float64)
            part.weight.data = torch.randn(part.num_features, generator=generator, dtype=torch.float64)
    return model


def layers(*sizes: int, act: Callable[[int], nn.Module] = lambda n: nn.ReLU()) -> nn.Sequential:
    made = [part for n, m in itertools.pairwise(sizes) for part in (nn.Linear(n, m), act(m))]
    return nn.Sequential(*made[:-1])


def square(sizes: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Linear(2, math.prod(sizes)), nn.Unflatten(1, sizes))


class Branches(nn.Module):
    """Two branches of one value, joined, a skip from the input, and slopes of either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 7), nn.Linear(7, 7), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = F.leaky_relu(self.first(x), -0.3)
        return self.head(torch.cat([one, self.second(one).abs()], 1)) + x.sum(1, keepdim=True).relu()


class Skips(nn.Module):
    """Two blocks `x + f(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(layers(6, 6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x.relu())
        return self.head(x)


PIECEWISE: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: layers(2, 9, 8, 3),
    "one layer": lambda: layers(2, 12, 2),
    "deep": lambda: layers(2, 6, 6, 6, 6, 2),
    "one result": lambda: layers(2, 10, 10, 1),
    "leaky": lambda: layers(2, 8, 7, 3, act=lambda n: nn.LeakyReLU(0.2)),
    "prelu by channel": lambda: layers(2, 8, 7, 3, act=lambda n: nn.PReLU(n)),
    "relu6": lambda: layers(2, 8, 7, 3, act=lambda n: nn.ReLU6()),
    "batch norm": lambda: layers(2, 8, 7, 3, act=lambda n: nn.Sequential(nn.BatchNorm1d(n), nn.ReLU())),
    "branches": Branches,
    "skips": Skips,
    "max pooling": lambda: nn.Sequential(square((3, 4)), nn.MaxPool1d(2), nn.Flatten(), layers(6, 6, 2)),
    "convolutions": lambda: nn.Sequential(
        square((1, 4, 4)),
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8, 2)),
    ),
}


def slopes_at(model: nn.Module, xs: Tensor) -> Tensor:
    """The Jacobians at points, (N, results, inputs)."""
    xs = xs.clone().requires_grad_()
    ys = model(xs).flatten(1)
    return torch.stack([torch.autograd.grad(ys[:, j].sum(), xs, retain_graph=True)[0].flatten(1) for j in range(ys.shape[1])], 1)


def spread_over(x: Tensor, radius: float, count: int, ball: bool) -> Tensor:
    """Points of the box or the ball around x."""
    steps = 2 * torch.rand(count, x.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1
    return x + radius * (steps[steps.norm(dim=1) < 1] if ball else steps) * (1 - 1e-12)


def enumerated(model: nn.Sequential, low: Tensor, high: Tensor) -> float:
    """The largest norm over all linear regions with an inside, layer by layer, each found by linear programs."""
    ends = list(zip(low.reshape(-1).tolist(), high.reshape(-1).tolist(), strict=True))
    count = len(ends)

    def inside(rows: list[list[float]], bounds: list[float]) -> bool:
        found = linprog([0.0] * count + [-1.0], A_ub=[[*row, 1.0] for row in rows], b_ub=bounds, bounds=[*ends, (0.0, 1.0)])
        return found.status == 0 and -found.fun > 1e-9

    maps = [(torch.eye(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64), list[list[float]](), list[float]())]
    for part in model:
        made = []
        for slope, offset, rows, bounds in maps:
            if isinstance(part, nn.Linear):
                made.append((part.weight.detach() @ slope, part.weight.detach() @ offset + part.bias.detach(), rows, bounds))
                continue
            open_ = [(list[bool](), rows, bounds)]
            for line, start in zip(slope, offset, strict=True):
                size = float(line.norm().clamp_min(1e-300))
                wider = []
                for signs, before, most in open_:
                    for on in (True, False):
                        row, bound = ((line * (-1 if on else 1)) / size).tolist(), float(start if on else -start) / size
                        if inside([*before, row], [*most, bound]):
                            wider.append(([*signs, on], [*before, row], [*most, bound]))
                open_ = wider
            made += [(torch.tensor(s).double()[:, None] * slope, torch.tensor(s).double() * offset, r, b) for s, r, b in open_]
        maps = made
    return max(float(torch.linalg.matrix_norm(slope, 2)) for slope, *_ in maps)


@pytest.mark.parametrize("sizes", [(2, 6, 5, 2), (2, 10, 3), (3, 5, 4, 2), (2, 4, 4, 4, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_small_relu_networks_have_the_constant_that_all_their_regions_give(sizes: tuple[int, ...], seed: int) -> None:
    model, x = settled(layers(*sizes), seed), centre((sizes[0],), seed)
    low, high = x - 0.7, x + 0.7
    exact = enumerated(model, low, high)
    report = gl.audit(model, x, domain=(low, high))
    assert exact <= report.upper <= exact * (1 + 3e-6)


@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("ball", [True, False])
def test_it_is_never_below_the_jacobians_of_the_set_and_reached_by_them(name: str, ball: bool) -> None:
    for seed, radius in ((0, 0.1), (1, 0.5), (2, 1.0)):
        model, x = settled(PIECEWISE[name](), seed), centre((2,), seed)
        report = gl.audit(model, x, at=x, radius=radius) if ball else gl.audit(model, x, domain=(x - radius, x + radius))
        steep = float(torch.linalg.matrix_norm(slopes_at(model, spread_over(x, radius, 60000, ball)), 2).max())
        assert steep <= report.upper * (1 + 1e-9)
        assert report.lower <= report.upper <= steep * 1.02  # a sliver between points may be steeper


@pytest.mark.parametrize("name", PIECEWISE)
def test_around_points_the_network_is_the_linear_function_that_is_followed(name: str) -> None:
    model, x = settled(PIECEWISE[name](), 1), centre((2,), 1)
    area = region([(1, 2)], (x - 1.0, x + 1.0), None, None)
    assert area is not None
    local = restricted(fold(lower(export(model, (x,))).network, biases=True), area)
    search = region_search(local.apart, area, (None, None), 10**9)
    assert search is not None
    points = spread_over(torch.zeros_like(x), 1.0, 500, ball=False)
    parts = search.around(points)
    (value,) = (parts.values[i].flatten(2) for i in local.apart.outputs)
    with torch.no_grad():
        moved = (model(x + points) - model(x)).flatten(1)
    assert bool(((value[:, :-1] * points[..., None]).sum(1) + value[:, -1]).allclose(moved, rtol=1e-10, atol=1e-10))


def test_the_constant_of_controllers_is_less_than_half() -> None:
    model, x = mlp([2, 32, 32, 1], nn.ReLU, 0), centre((2,), 100)
    with_regions = gl.audit(model, x, domain=(x - 1.0, x + 1.0))
    without = gl.audit(model, x, domain=(x - 1.0, x + 1.0), effort=0.0)
    assert WAY in with_regions.network.because
    assert with_regions.upper < 0.5 * without.upper
    steep = float(torch.linalg.matrix_norm(slopes_at(model, spread_over(x, 1.0, 60000, ball=False)), 2).max())
    assert steep * (1 - 1e-9) <= with_regions.upper <= 1.02 * steep


def test_from_some_inputs_to_some_results() -> None:
    model, x = settled(layers(3, 8, 8, 4), 3), centre((3,), 3)
    xs = spread_over(x, 0.6, 40000, ball=True)
    for inputs, outputs in (([0, 2], None), (None, [1, 3]), ([1], [0])):
        block = slopes_at(model, xs)[:, outputs or slice(None)][..., inputs or slice(None)]
        steep = float(torch.linalg.matrix_norm(block, 2).max())
        report = gl.audit(model, x, at=x, radius=0.6, inputs=inputs, outputs=outputs)
        assert WAY in report.network.because
        assert steep <= report.upper * (1 + 1e-9)
        assert report.upper <= 1.02 * steep


def test_entries_that_do_not_move_and_a_ball_inside_a_box() -> None:
    model, x = settled(layers(3, 9, 7, 2), 1), centre((3,), 1)
    width = torch.tensor([[0.5, 0.0, 0.8]], dtype=torch.float64)
    xs = spread_over(x, 1.0, 40000, ball=False)
    xs = x + (xs - x) * width
    report = gl.audit(model, x, domain=(x - width, x + width))
    moved = slopes_at(model, xs)[..., [0, 2]]
    assert float(torch.linalg.matrix_norm(moved, 2).max()) <= report.upper * (1 + 1e-9)
    both = gl.audit(model, x, domain=(x - width - 0.1, x + width + 0.1), at=x, radius=0.3)
    steep = slopes_at(model, spread_over(x, 0.3, 60000, ball=True).clamp(x - width - 0.1, x + width + 0.1))
    assert float(torch.linalg.matrix_norm(steep, 2).max()) <= both.upper * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_of_any_size_equal_rows_and_rows_of_zeros(scale: float) -> None:
    model, x = settled(layers(2, 10, 6, 2), 2), centre((2,), 2)
    first = model[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight[1], first.bias[1] = first.weight[0], first.bias[0]
        first.weight[2], first.bias[2] = -first.weight[0], -first.bias[0]  # on one line with the others, on the other side
        first.weight[3], first.bias[3] = 0.0, 0.0  # always at its kink
        first.bias[4] = -(first.weight[4] @ x[0])  # at its kink at the centre
        first.weight *= scale
        first.bias *= scale
    report = gl.audit(model, x, domain=(x - 0.5, x + 0.5))
    steep = float(torch.linalg.matrix_norm(slopes_at(model, spread_over(x, 0.5, 60000, ball=False)), 2).max())
    assert steep <= report.upper * (1 + 1e-9)
    assert report.upper <= 1.02 * steep


@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_numbers_that_overflow_or_underflow_on_the_way(scale: float) -> None:
    model, x = settled(layers(2, 6, 6, 2), 0), centre((2,), 0)
    with torch.no_grad():
        for p in model.parameters():
            p *= scale
    report = gl.audit(model, x, domain=(x - 0.5, x + 0.5))
    steep = slopes_at(model, spread_over(x, 0.5, 2000, ball=False))
    assert 0.0 < float(steep.abs().max()) <= report.upper  # an entry is at most the norm


def test_where_all_slopes_are_zero() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    with torch.no_grad():
        model[0].bias.fill_(-10.0)  # type: ignore[reportCallIssue, reportArgumentType]
    assert gl.audit(model, x, at=x, radius=0.5).upper <= 1e-12
    area = region([(1, 2)], (x - 1.0, x + 1.0), None, None)
    assert area is not None
    blank = torch.zeros(2, 0, dtype=torch.float64)
    empty, _ = regions.separated(
        regions.Constraints(torch.zeros(2, 0, 2, dtype=torch.float64), blank, blank), torch.zeros(2, 2).double(), area
    )
    assert not bool(empty.any())


def test_where_regions_are_too_many_the_report_says_so_and_more_effort_is_never_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp([2, 24, 24, 2], nn.ReLU, 0), centre((2,), 100)
    uppers: list[float] = []
    monkeypatch.setattr(regions, "expected", lambda dimension, count: 0.0)
    for effort in (0.0005, 0.001, 1.0):
        report = gl.audit(model, x, domain=(x - 1.0, x + 1.0), effort=effort)
        assert ("linear regions given up" in report.network.because) == (effort < 1.0)
        uppers.append(report.upper)
    assert uppers == sorted(uppers, reverse=True)
    monkeypatch.setattr(regions, "expected", lambda dimension, count: math.inf)
    report = gl.audit(model, x, domain=(x - 1.0, x + 1.0))
    assert "linear region" not in report.network.because


def test_what_has_no_regions_or_moves_without_bound_is_left_to_the_others() -> None:
    for model in (
        mlp([2, 8, 2], nn.Tanh, 0),
        mlp([2, 8, 2], nn.Hardtanh, 0, 4.0),
        nn.Sequential(nn.Linear(2, 2), Map(lambda x: x * x.relu())),
    ):
        x = centre((2,), 0)
        assert WAY not in gl.audit(model.double().eval(), x, at=x, radius=3.0).network.because


def test_a_smaller_ball_never_has_a_larger_constant() -> None:
    model, x = settled(layers(3, 10, 8, 2), 0), centre((3,), 0)
    uppers = [gl.audit(model, x, at=x, radius=0.05 * 1.5**k).upper for k in range(8)]
    assert all(a <= b * (1 + 3e-6) for a, b in itertools.pairwise(uppers))


@pytest.mark.parametrize("ball", [True, False])
def test_no_region_with_a_point_is_refuted_and_most_without_one_are(ball: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 4, dtype=torch.float64)
    area = region([(1, 4)], None if ball else (x - 1.0, x + 1.0), x if ball else None, 1.0 if ball else None)
    assert area is not None
    normals = F.normalize(torch.randn(500, 9, 4, generator=generator, dtype=torch.float64), dim=2)
    inner = spread_over(x, 1.0, 4000, ball)[:500]
    slack = torch.rand(500, 9, generator=generator, dtype=torch.float64) * (torch.arange(9) % 3 > 0)  # each third one holds with equality
    with_point = slack - (normals @ inner[..., None])[..., 0]
    zeros = torch.zeros(500, 9, dtype=torch.float64)
    empty, _ = regions.separated(regions.Constraints(normals, with_point, zeros + 1e-12), 0 * inner, area)
    assert not bool(empty.any())
    opposed = normals.clone()
    opposed[:, 8] = -(normals[:, 0] + normals[:, 1]) / 2
    offsets = with_point.clone()
    offsets[:, 8] = -(with_point[:, 0] + with_point[:, 1]) / 2 - 0.05  # with the first two: 0 <= -0.05
    empty, _ = regions.separated(regions.Constraints(opposed, offsets, zeros + 1e-12), 0 * inner, area)
    assert float(empty.double().mean()) > 0.9


def test_norms_of_regions_are_above_theirs_and_close() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 5, 5), (7, 1, 9), (3, 30, 30), (5, 8, 2)):
        many = torch.randn(*shape, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(
            -9, 9, (shape[0], 1, 1), generator=generator
        )
        many[0] = 0.0
        truth = torch.linalg.matrix_norm(many, 2)
        found = regions.tight_norms(many)
        assert bool((found >= truth * (1 - 1e-15)).all())
        assert bool((found <= truth * (1 + 1e-8) + 1e-290).all())
