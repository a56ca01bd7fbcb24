"""Radii around single inputs: against functions whose margins are known, and attacks inside of what is certified."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import gramlip as gl
from gramlip.network.graph import export
from gramlip.network.local import Around, Results, region
from gramlip.network.rules import lower
from gramlip.robust import certify
from gramlip.robust import margins as radii
from test_local import ACTIVATIONS, Strided, mlp
from test_robust import half_precision_case

# ---- margins on a ray, in rational numbers -------------------------------------------------------------------------------


def falling(seed: int) -> tuple[list[Fraction], list[Fraction]]:
    """A margin of two classes along a ray, piecewise linear: where pieces end, and how fast it falls on each; it may rise too."""
    draw = random.Random(seed)
    ends = [Fraction(draw.randint(1, 12), 16) for _ in range(6)]
    slopes = [Fraction(draw.randint(-6, 30), 7) for _ in range(6)]
    return [sum(ends[:k], Fraction(0)) for k in range(1, 7)], [*slopes, max(map(abs, slopes))]


def fallen(ends: list[Fraction], slopes: list[Fraction], radius: Fraction) -> Fraction:
    """By how much it has fallen at a radius."""
    total = Fraction(0)
    for (a, b), slope in zip(pairwise([Fraction(0), *ends, max(radius, ends[-1])]), slopes, strict=True):
        total += slope * max(Fraction(0), min(radius, b) - a)
    return total


def on_ball(ends: list[Fraction], slopes: list[Fraction], radius: Fraction) -> tuple[Fraction, Fraction, Fraction]:
    """The constant, the rate from the centre and the drop on a ball of that radius, exactly."""
    inner = [Fraction(0), *(e for e in ends if e < radius), radius]
    constant = max(abs(slope) for slope, start in zip(slopes, [Fraction(0), *ends], strict=True) if start < radius)
    values = [(fallen(ends, slopes, r), r) for r in inner[1:]]
    return constant, max(abs(v) / r for v, r in values), max(Fraction(0), *(v for v, _ in values))


def used_up(ends: list[Fraction], slopes: list[Fraction], margin: Fraction) -> Fraction:
    """Where it has fallen by the margin."""
    for a, b in pairwise([Fraction(0), *ends, ends[-1] + 10**6]):
        before, after = fallen(ends, slopes, a), fallen(ends, slopes, b)
        if after >= margin:
            return a + (margin - before) / (after - before) * (b - a)
    return Fraction(10**6)


def tensor(values: list[Fraction], upward: bool) -> Tensor:
    """Rounded outward."""
    made = torch.tensor([float(v) for v in values], dtype=torch.float64)
    return made * (1 + 2.0**-50) if upward else made * (1 - 2.0**-50)


def radii_on_rays(seed: int) -> tuple[float, Fraction, list[radii.Trial]]:
    """What `lasting` proves of two margins on rays, from balls of random radii, and the truth."""
    draw, rays = random.Random(1000 + seed), [falling(2 * seed), falling(2 * seed + 1)]
    margins = [Fraction(draw.randint(1, 40), 9) for _ in rays]
    trials = []
    for _ in range(draw.randint(0, 5)):
        radius = draw.uniform(0.05, 4.0)
        parts = [on_ball(*ray, Fraction(radius)) for ray in rays]
        parts = [[p * draw.choice((1, 1, 2, 50)) for p in part] for part in parts]  # bounds may be loose, and not rise
        constants, rates, drops = (tensor(list(side), upward=True) for side in zip(*parts, strict=True))
        drops = torch.where(torch.tensor([draw.random() < 0.5 for _ in rays]), drops, math.inf)
        trials.append(radii.Trial(radius, Results(constants, torch.minimum(rates, constants), drops)))
    everywhere = tensor([ray[1][-1] for ray in rays], upward=True)
    found = radii.lasting(tensor(margins, upward=False), everywhere, trials)
    return found, min(used_up(*ray, m) for ray, m in zip(rays, margins, strict=True)), trials


@pytest.mark.parametrize("seed", range(40))
def test_no_radius_is_beyond_where_a_margin_is_used_up_on_a_ray(seed: int) -> None:
    for k in range(25):
        found, truth, _ = radii_on_rays(40 * k + seed)
        assert 0 < Fraction(found) <= truth


def test_radii_on_rays_are_never_smaller_with_more_balls_and_exact_with_all_of_them() -> None:
    for seed in range(60):
        ends, slopes = falling(seed)
        slopes = sorted(map(abs, slopes))  # it falls faster and faster
        margins, everywhere, trials, last = torch.tensor([3.0], dtype=torch.float64), tensor([slopes[-1]], upward=True), [], 0.0
        for end in ends:
            constant = tensor([on_ball(ends, slopes, end)[0]], upward=True)
            trials.append(radii.Trial(float(end), Results(constant, constant, torch.full_like(constant, math.inf))))
            found = radii.lasting(margins, everywhere, trials)
            assert found >= last * (1 - 1e-14)
            last = found
        assert last >= float(used_up(ends, slopes, Fraction(3))) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("constants", "everywhere"), [([0.0], [0.0]), ([math.inf], [math.inf]), ([math.nan], [math.inf]), ([1e-300], [1e-300])], ids=str
)
def test_radii_of_constants_at_the_ends_of_floats(constants: list[float], everywhere: list[float]) -> None:
    known = torch.tensor(constants, dtype=torch.float64)
    found = radii.lasting(torch.ones(1).double(), torch.tensor(everywhere).double(), [radii.Trial(1.0, Results(known, known, known))])
    assert 0 <= found < math.inf
    assert (found > 0) == (everywhere != [math.inf])


# ---- what is known of results on a set -----------------------------------------------------------------------------------

CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: mlp([6, 24, 24, 4], nn.ReLU, 2, 1.3), (6,)),
    "tanh": (lambda: mlp([6, 24, 24, 4], nn.Tanh, 3, 2.0), (6,)),
    "silu": (lambda: mlp([6, 24, 24, 4], nn.SiLU, 4, 2.0), (6,)),
    "convolutions": (lambda: Strided(ACTIVATIONS["relu"]), (2, 8, 8)),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("radius", [0.01, 0.3, 2.0])
def test_single_results_on_a_set_are_bounded_between_any_points_and_from_the_centre(name: str, radius: float) -> None:
    build, shape = CLASSIFIERS[name]
    model, draw = build(), torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape, dtype=torch.float64, generator=draw)
    area = region([tuple(x.shape)], None, x, radius)
    assert area is not None
    classes = model(x).shape[1]
    matrix = torch.randn(5, classes, dtype=torch.float64, generator=draw)
    found = Around(lower(export(model, (x,))).network).results(area, matrix)
    steps = torch.randn(400, *shape, dtype=torch.float64, generator=draw)
    lengths = radius * torch.rand(400, dtype=torch.float64, generator=draw) ** 0.1
    points = x + steps * (lengths / steps.flatten(1).norm(dim=1)).reshape(-1, *[1] * len(shape))
    near = points + 1e-4 * radius * torch.randn(points.shape, dtype=torch.float64, generator=draw)
    near = x + (near - x) * (radius / (near - x).flatten(1).norm(dim=1)).clamp_max(1.0).reshape(-1, *[1] * len(shape))
    centre, values, others = (model(p) @ matrix.T for p in (x, points, near))
    for a, b, p, q in ((values[:200], values[200:], points[:200], points[200:]), (values, others, points, near)):
        between = (a - b).abs() / (p - q).flatten(1).norm(dim=1)[:, None]
        assert bool((between.amax(0) <= found.constants * (1 + 1e-6)).all())
    rates = (values - centre).abs() / (points - x).flatten(1).norm(dim=1)[:, None]
    assert bool((rates.amax(0) <= found.rates * (1 + 1e-9)).all())
    assert bool(((centre - values).amax(0) <= found.drops * (1 + 1e-9)).all())


# ---- attacks ---------------------------------------------------------------------------------------------------------------


def attacked(model: nn.Module, x: Tensor, label: Tensor, radius: float, starts: int = 4) -> Tensor:
    """The smallest margin that gradient steps of the ball's length find inside the open ball of the radius."""
    draw, least = torch.Generator().manual_seed(7), torch.tensor(math.inf, dtype=torch.float64)
    at = label.repeat(starts)
    for begin in (0.0, 1.0):
        noise = torch.randn(starts, *x.shape[1:], dtype=torch.float64, generator=draw)
        z = x + begin * radius * noise / noise.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        for k in range(40):
            z = z.detach().requires_grad_()
            logits = model(z)
            margin = logits.gather(1, at[:, None])[:, 0] - logits.scatter(1, at[:, None], -math.inf).amax(1)
            least = torch.minimum(least, margin.min().detach())
            (slope,) = torch.autograd.grad(margin.sum(), z)
            length = slope.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, *[1] * (x.ndim - 1))
            z = z.detach() - radius * (0.5 if k < 20 else 0.1) * slope / length
            off = (z - x).flatten(1).norm(dim=1).clamp_min(1e-30)
            z = x + (z - x) * (radius * (1 - 1e-12) / off).clamp_max(1.0).reshape(-1, *[1] * (x.ndim - 1))
    return least


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_no_attack_inside_a_local_radius_changes_the_class(name: str) -> None:
    build, shape = CLASSIFIERS[name]
    model = build()
    xs = torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = model(xs).argmax(1)
    upper = gl.audit(model, shape).upper
    wide, found = (certify(model, [(xs, labels)], upper, local=local).radii for local in (False, True))
    assert bool((found >= wide).all())
    assert float(found.sum()) > 1.05 * float(wide.sum())
    for x, label, radius in zip(xs.split(1), labels.split(1), found.tolist(), strict=True):
        assert attacked(model, x, label, radius) > 0


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_a_search_that_ends_at_eps_certifies_no_more_and_little_less(name: str) -> None:
    build, shape = CLASSIFIERS[name]
    model = build()
    xs = torch.randn(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = model(xs).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    upper = gl.audit(model, shape).upper
    full = certify(model, [(xs, labels)], upper, local=True)
    eps = [float(full.radii[1:].median()) * k for k in (0.0, 0.5, 0.98, 3.0)]
    found = certify(model, [(xs, labels)], upper, eps, local="eps")
    assert found.radii[0] == 0.0
    for e, share in found.certified.items():
        assert share >= float((full.radii > e).double().mean()) - 1 / len(xs)
    for x, label, radius in zip(xs[1:].split(1), labels[1:].split(1), found.radii[1:].tolist(), strict=True):
        assert attacked(model, x, label, radius) > 0
    assert gl.robust.certified_accuracy(model, [(xs, labels)], eps[1], lipschitz=upper, local=True) == found.certified[eps[1]]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Notes the radius of each trial."""
    tried, right = list[float](), Around.results

    def counting(self: Around, area: gl.network.local.Region, matrix: Tensor) -> Results:
        tried.append(area.radius)
        return right(self, area, matrix)

    monkeypatch.setattr(Around, "results", counting)
    return tried


def test_nothing_is_tried_where_nothing_can_be_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = mlp([6, 24, 24, 4], nn.ReLU, 2, 1.3), counted(monkeypatch)
    xs = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = model(xs).argmax(1)
    upper = gl.audit(model, (6,)).upper
    certify(model, [(xs, (right + 1) % 4)], upper, local=True)  # wrong labels
    certify(model, [(xs, right)], upper, eps=1e-6, local="eps")  # certified already
    certify(model, [(xs, right)], upper, eps=1e3, local="eps")  # beyond what the slopes at the inputs allow
    linear = nn.Linear(6, 4).double()
    certify(linear, [(xs, linear(xs).argmax(1))], 1.0, last=linear, local=True)  # exact as it is
    assert not tried
    certify(model, [(xs, right)], upper, local=True)
    assert len(xs) < len(tried) <= radii.TRIALS * len(xs)


def test_a_network_without_a_constant_everywhere_has_radii_around_its_inputs() -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:, :1] * x[:, 1:2], x[:, 2:3]], 1)

    model, x = Squares().eval(), torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 2.0]], dtype=torch.float64)
    labels = model(x).argmax(1)
    assert certify(model, [(x, labels)], math.inf).radii.tolist() == [0.0, 0.0]
    found = certify(model, [(x, labels)], math.inf, eps=0.0, local=True)
    assert found.certified == {0.0: 1.0}
    for row, label, radius in zip(x.split(1), labels.split(1), found.radii.tolist(), strict=True):
        assert attacked(model, row, label, radius) > 0


def test_local_radii_of_a_program_take_its_rounding_into_account() -> None:
    program, inputs, logits = half_precision_case()
    labels = logits.argmax(1)
    gap = torch.cdist(inputs.double(), inputs.double())
    other = labels[:, None] != labels
    found = certify(program, [(inputs, labels)], 10.0, local=True, executed=True, domain=(-1.0, 1.0)).radii
    assert not bool((other & (gap < found[:, None])).any())
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.rand(8, 6)
    batch, upper = [(x, model(x).argmax(1))], gl.audit(model, (6,)).upper
    real, run = (certify(model, batch, upper, local=True, executed=box is not None, domain=box) for box in (None, (0.0, 1.0)))
    assert bool((run.radii < real.radii * (1 + 1e-3)).all())
    assert "rounding of both programs" in run.because
