"""Columns carried forward, chords from the centre and constants of folded maps, against what torch computes at points of the set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramlip as gl
from gramlip.demo import demo_regularised
from gramlip.network.coupling import slopes_of_channels
from gramlip.network.fold import fold
from gramlip.network.graph import export
from gramlip.network.local import Around, Region, columns_norm, region, restricted
from gramlip.network.local.columns import Columns, Near, Tile, carried, dense, landing
from gramlip.network.local.intervals import Value, chords
from gramlip.network.local.relaxations import action, comparisons
from gramlip.network.ranges import Range
from gramlip.network.rules import lower
from gramlip.network.steps import Linear, Lipschitz, Network, Slope, Step
from gramlip.operators.linear_maps import Conv
from test_local import MODELS, SMOOTH_OR_KINKED, centre, points, steepest
from test_rules import Map


def convolutions(seed: int, act: Callable[[], nn.Module], width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), act(), nn.Conv2d(width, width, 3, stride=2, padding=1), act()]
    layers += [nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=2), act(), nn.Flatten(), nn.Linear(width * 25, 3)]
    model = nn.Sequential(*layers).double().eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    nn.init.normal_(model[1].running_mean)
    return model


DEEP: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu images": (lambda: convolutions(1, nn.ReLU), (2, 9, 9)),
    "tanh images": (lambda: convolutions(2, nn.Tanh), (2, 9, 9)),
    "leaky images": (lambda: convolutions(3, lambda: nn.LeakyReLU(-0.3)), (2, 9, 9)),
    **{
        name: MODELS[name]
        for name in (
            "maxmin",
            "in order",
            "pooled",
            "maxima of channels",
            "relu",
            "silu",
            "residual of relus",
            "smooth strided",
            "reflect",
            "transposed",
        )
    },
}


def around(model: nn.Module, x: Tensor, radius: float) -> tuple[Network, Region]:
    area = region([tuple(x.shape)], None, x, radius)
    assert area is not None
    return fold(lower(export(model, (x,))).network, biases=True), area


@pytest.mark.parametrize("name", DEEP)
def test_columns_are_never_below_points_of_the_ball(name: str) -> None:
    make, shape = DEEP[name]
    model, x = make(), centre(shape, 3)
    slope = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
    for radius in (0.6, 0.1, 1e-6):
        network, area = around(model, x, radius)
        local, xs = restricted(network, area), points(x, radius, 80, 5)
        ends = x + radius * (slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)).reshape(-1, *x.shape[1:])
        xs = torch.cat([xs, ends[:20], 2 * x - ends[:20]])
        with torch.no_grad():
            moved = (model(xs) - model(x)).flatten(1).abs() / (xs - x).flatten(1).norm(dim=1)[:, None]
        rows = local.columns.rows()
        assert rows is not None
        assert bool((moved <= rows * (1 + 1e-7) + 1e-9).all())
        upper = columns_norm(local.apart, area, None, None)
        assert steepest(model, xs) <= upper * (1 + 1e-9)
        if radius < 1e-5:
            assert upper <= float(torch.linalg.matrix_norm(slope, 2)) * (1 + 1e-4)
            assert bool((rows <= slope.norm(dim=1) * (1 + 1e-4)).all())


@pytest.mark.parametrize("seed", range(3))
def test_what_switches_in_many_places_adds_far_less_than_the_sum_of_it(seed: int) -> None:
    model, x = convolutions(seed, nn.ReLU, 12), centre((2, 9, 9), seed)
    network, area = around(model, x, 0.1)
    local = restricted(network, area)
    open_ = sum(
        int((s.what.low < s.what.high).sum()) for s in local.network.steps if isinstance(s.what, Slope) and isinstance(s.what.low, Tensor)
    )
    assert open_ > 30
    assert columns_norm(local.apart, area, None, None) <= 3 * steepest(model, points(x, 0.1, 100, 5))


def test_from_some_inputs_to_some_results() -> None:
    model, x = convolutions(1, nn.ReLU), centre((2, 9, 9), 3)
    network, area = around(model, x, 0.05)
    local = restricted(network, area)
    inputs, outputs = torch.arange(162) < 40, torch.tensor([True, False, True])
    slope = torch.autograd.functional.jacobian(model, x).reshape(3, -1)[outputs][:, inputs]
    part = columns_norm(local.apart, area, inputs, outputs)
    assert float(torch.linalg.matrix_norm(slope, 2)) <= part <= columns_norm(local.apart, area, None, None) * (1 + 1e-6)


def test_nothing_is_followed_beyond_the_budget() -> None:
    network, area = around(convolutions(1, nn.ReLU), centre((2, 9, 9), 3), 0.1)
    assert restricted(network, area, columns=1000).columns.rows() is None
    free = Columns(network, area, centred=False, budget=0)
    assert [free.add(step) for step in network.steps] == [None] * len(network.steps)
    assert free.norm(None, None) == math.inf


def test_rows_of_pairs_of_results_hold_from_the_centre() -> None:
    model, x = convolutions(4, nn.ReLU), centre((2, 9, 9), 6)
    pairs = torch.tensor([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
    network, area = around(model, x, 0.2)
    rows, xs = Around(network).results(area, pairs).rates, points(x, 0.2, 200, 3)
    with torch.no_grad():
        moved = ((model(xs) - model(x)) @ pairs.T).abs() / (xs - x).flatten(1).norm(dim=1)[:, None]
    assert bool((moved <= rows).all())


def test_slopes_that_the_places_of_a_channel_share_hold_those_of_each() -> None:
    network, area = around(convolutions(2, nn.ReLU), centre((2, 9, 9), 3), 0.3)
    local = restricted(network, area).network
    shared = slopes_of_channels(local)
    assert shared is not None
    kinds = [(old.what, new.what) for old, new in zip(local.steps, shared.steps, strict=True) if isinstance(old.what, Slope)]
    assert kinds
    for old, new in kinds:
        assert isinstance(new, Slope)
        low, high, least, most = (torch.as_tensor(end, dtype=torch.float64) for end in (old.low, old.high, new.low, new.high))
        assert least.numel() == most.numel() == low.shape[1]
        assert bool((least <= low).all())
        assert bool((high <= most).all())
    assert slopes_of_channels(shared) is None


# ---- tiles -----------------------------------------------------------------------------------------------------------------

GEOMETRY: list[dict[str, object]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (3, 1), "padding": (0, 2)},
    {"kernel_size": 3, "dilation": 2, "padding": 3},
    {"kernel_size": 1, "stride": 3},
    {"kernel_size": 5, "stride": 4, "padding": 2, "groups": 2},
]


@pytest.mark.parametrize("options", GEOMETRY)
def test_a_convolution_of_a_box_is_that_of_all_entries(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, bias=False, **options).double()  # type: ignore[arg-type]
    op = Conv(layer.weight.detach(), input_size=(9, 8), **{k: v for k, v in options.items() if k != "kernel_size"})  # type: ignore[arg-type]
    shape = tuple(layer(torch.zeros(1, 2, 9, 8, dtype=torch.float64)).shape)
    step = Step(Linear(op), (0,), shape, "conv", "conv2d")
    act = action([step], 0)
    assert act is not None
    for box in (((0, 3), (0, 2)), ((4, 6), (5, 8)), ((8, 9), (7, 8)), ((1, 2), (3, 4)), ((0, 9), (0, 8))):
        tile = Tile(box, torch.randn(3, 1, 2, *(b - a for a, b in box), dtype=torch.float64))
        with torch.no_grad():
            right = torch.stack([layer(x) for x in dense(tile, (1, 2, 9, 8))])
        seen = landing(step, [box], [(1, 2, 9, 8)])
        if seen is None:
            assert not bool(right.any())
        else:
            made = carried(step, act[1], [tile], [(1, 2, 9, 8)], seen)
            assert torch.allclose(dense(made, shape), right, rtol=0, atol=1e-13)


# ---- chords ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH_OR_KINKED)
def test_chords_from_the_centre(name: str) -> None:
    call = SMOOTH_OR_KINKED[name]
    (step,) = [s for s in lower(export(Map(call).eval(), (torch.zeros(1, 1, dtype=torch.float64),))).network.steps if s.sources]
    assert isinstance(step.what, Slope)
    assert step.what.within is not None
    generator = torch.Generator().manual_seed(3)
    low, high = (6 * (torch.rand(2, 400, generator=generator, dtype=torch.float64) - 0.5)).sort(0)[0]
    at = low + (high - low) * torch.rand(400, generator=generator, dtype=torch.float64)
    at[:20], at[20:40] = low[:20], high[20:40]  # at an end
    on = step.what.within(low, high)
    what = Slope(on.low, on.high, "", within=step.what.within)
    least, most = chords(what, Value(low, high, Range(-9.0, 9.0, 9.0, 9.0), (at, at)))
    xs = low + (high - low) * torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]
    apart = (xs - at).abs() > 1e-3
    slopes = (call(xs) - call(at)) / torch.where(apart, xs - at, 1.0)
    room = 1e-9 + (1e-5 if name == "softplus" else 0.0)
    assert bool(((least - room <= slopes) | ~apart).all())
    assert bool(((slopes <= most + room) | ~apart).all())
    assert bool((on.low <= least).all())
    assert bool((most <= on.high).all())
    if name == "relu":  # c between 0 and the upper end: from c/(c - low) to 1
        across = (low < -0.1) & (at > 0.1) & (at < high)
        assert float((least - at / (at - low))[across].abs().max()) < 1e-9
        assert float((most - 1.0)[across].abs().max()) < 1e-9


# ---- maxima and means --------------------------------------------------------------------------------------------------


def test_places_are_in_order_after_their_comparisons() -> None:
    for count in range(1, 11):
        for bits in itertools.product((0, 1), repeat=count):
            values = list(bits)
            for i, j in comparisons(count):
                values[i], values[j] = min(values[i], values[j]), max(values[i], values[j])
            assert values == sorted(bits)


POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "padded": (lambda x: F.max_pool2d(x, 3, 2, 1), (2, 7, 8)),
    "beyond the end": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), (2, 6, 8)),
    "dilated": (lambda x: F.max_pool2d(x, (2, 3), 1, (1, 1), dilation=(2, 1)), (2, 6, 7)),
    "in one axis": (lambda x: F.max_pool1d(x, 3, 2, 1), (2, 7)),
    "in three axes": (lambda x: F.max_pool3d(x, 2, 2), (2, 4, 4, 6)),
    "adaptive": (lambda x: F.adaptive_max_pool2d(x, (3, 2)), (2, 7, 5)),
    "of axes": (lambda x: x.amax((1, 3)), (2, 7, 5)),
    "of all": (lambda x: -(-x).max(), (2, 3)),
}


@pytest.mark.parametrize("name", POOLS)
def test_members_are_the_entries_that_are_compared(name: str) -> None:
    call, shape = POOLS[name]
    x = centre(shape, 1)
    (compared,) = [
        step.what.compared
        for step in lower(export(Map(call).eval(), (x,))).network.steps
        if isinstance(step.what, Lipschitz) and step.what.compared is not None
    ]
    assert compared.members is not None
    largest = (-x if name == "of all" else x).reshape(-1)[compared.members()].amax(0)
    assert torch.equal(-largest if name == "of all" else largest, call(x))


def test_a_maximum_and_a_minimum_share_what_switches() -> None:
    report = gl.audit(Map(lambda x: torch.max(x[:, :1], x[:, 1:]) + torch.min(x[:, :1], x[:, 1:])).eval(), (2,), domain=(-1.0, 1.0))
    assert math.sqrt(2) <= report.upper <= math.sqrt(2) * (1 + 1e-5)


@pytest.mark.parametrize("radius", [1e-9, 0.1])
def test_ties_at_the_input(radius: float) -> None:
    """Equal entries, some of them equal everywhere, some there alone: these cost the root of 2 at most."""
    for call, exact in (
        (lambda x: torch.maximum(x[:, :1], x[:, 1:2]), 1.0),
        (lambda x: F.max_pool1d(x[:, None, [0, 0, 1, 1]], 4) * 3.0, 3.0),
        (lambda x: x.relu().amax(1, True), 1.0),  # of negative entries: zeros
        (lambda x: x[:, [2, 2, 2]].sort(1)[0], math.sqrt(3)),
        (lambda x: 5.0 * (torch.maximum(x[:, :1], x[:, 1:2]) - torch.maximum(x[:, 1:2], x[:, :1])), 0.0),
    ):
        x = torch.tensor([[0.5, 0.5, -0.25]], dtype=torch.float64)
        report = gl.audit(Map(call).eval(), x, at=x, radius=radius, effort=0.0)
        assert exact * (1 - 1e-9) <= report.upper <= math.sqrt(2) * exact * (1 + 1e-6) + 1e-9


def test_what_loses_everywhere_on_the_set_adds_nothing() -> None:
    """Two entries far below the largest change places: the largest alone counts."""
    weight = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    model = Map(lambda x: ((x @ weight.mT) + torch.tensor([0.0, 0.0, 300.0, 0.0])).amax(1)).eval()
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert 1.0 <= gl.audit(model, x, at=x, radius=1.0, effort=0.0).upper <= 1.0 + 1e-5
    assert gl.audit(model, x, at=x, radius=4.0, effort=0.0).upper >= 100.0  # where it does not lose


def test_means_of_many_entries_are_followed_entry_by_entry() -> None:
    """More entries than the matrix of a map is read off for; one is far from all others."""
    x = torch.zeros(1, 3, 40, 40, dtype=torch.float64)
    x[0, 0, 0, 0] = 4800.0
    for call in (lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda x: x.sum((2, 3)) / 1600.0):
        model = Map(lambda x, call=call: (call(x) - torch.tensor([2.9, 0.1, 0.0])).relu().sum(1, keepdim=True)).eval()
        network = lower(export(model, (x,))).network
        area = region([tuple(x.shape)], None, x, 0.5)
        assert area is not None
        known = restricted(network, area, columns=0).values[network.outputs[0]]
        assert 0.1 - 0.04 <= float(known.low) <= 0.1 <= float(known.high) <= 0.1 + 0.04
        upper = gl.audit(model, x, at=x, radius=0.5, effort=0.0).upper
        assert 1 / 40 <= upper <= math.sqrt(2) / 40 * (1 + 1e-6)


# ---- constants of folded maps ------------------------------------------------------------------------------------------------


class Folding(nn.Module):
    """Everything that folds, with constants: norms before and after, paddings with a value, branches, 1x1 kernels, scales."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.before, self.after = nn.BatchNorm2d(2), nn.BatchNorm2d(4)
        self.conv, self.side, self.point = nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
        self.one, self.two = nn.Linear(196, 5), nn.Linear(5, 3)
        for norm in (self.before, self.after):
            for p in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(p)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.before(x), (1, 0, 0, 2), value=0.7)
        x = self.after(self.point(self.conv(x) + self.side(x)))
        x = x + 0.3 * x + 1.5
        return self.two(self.one(x.flatten(1))) * 2.0 - 0.25


@pytest.mark.parametrize("name", ["zeros", "circular", "reflect", *MODELS])
def test_values_of_folded_networks_are_in_their_intervals(name: str) -> None:
    make, shape = MODELS.get(name, (lambda: Folding(name), (2, 5, 6)))
    model, x = make(), centre(shape, 5)
    plain, folded = (lower(export(model, (x,))).network for _ in range(2))
    folded = fold(folded, biases=True)
    area = region([tuple(x.shape)], None, x, 0.3)
    assert area is not None
    known, wide = (restricted(network, area, columns=0).values[network.outputs[0]] for network in (folded, plain))
    with torch.no_grad():
        ys = torch.cat([model(y[None]) for y in points(x, 0.3, 80, 2)])
    assert bool((known.low - 1e-12 <= ys).all())
    assert bool((ys <= known.high + 1e-12).all())
    assert float((known.high - known.low).max()) <= 1.05 * float((wide.high - wide.low).max()) + 1e-9
    if name in ("zeros", "circular", "reflect"):
        assert len(folded.steps) < len(plain.steps)
        assert known.middle is not None
        assert bool((known.middle[0] - 1e-13 <= model(x)).all())
        assert bool((model(x) <= known.middle[1] + 1e-13).all())
        assert float((known.middle[1] - known.middle[0]).max()) < 1e-10


def test_norms_of_the_activations_that_a_value_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    rows[:20] += 3.0  # alike
    rows /= rows.norm(dim=1, keepdim=True)
    loose = 1e-3 * torch.rand(60, generator=generator, dtype=torch.float64)
    boxes = [((0, 3), (0, 4)), ((2, 6), (0, 6)), ((1, 4), (3, 6))]
    groups = dict(enumerate(torch.arange(60).split(20)))
    tiles = {k: Tile(box, torch.zeros(20, 1, 2, *(b - a for a, b in box), dtype=torch.float64)) for k, box in enumerate(boxes)}
    found = Near(rows @ rows.mT, loose, 1.0, 1e-14, groups, {}).norms(tiles, (1, 2, 6, 6), 100.0)
    assert found.shape == (1, 1, 6, 6)
    for y in range(6):
        for x in range(6):
            read = [k for k, ((a, b), (c, d)) in enumerate(boxes) if a <= y < b and c <= x < d]
            at = torch.cat([groups[k] for k in read]) if read else torch.zeros(0, dtype=torch.long)
            truth = float(torch.linalg.matrix_norm(rows[at], 2) + loose[at].norm()) if read else 0.0
            assert truth * (1 - 1e-12) <= float(found[0, 0, y, x]) <= 1.06 * truth + 1e-100


def test_the_activations_of_all_steps_together_count_less_than_one_by_one() -> None:
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report = gl.audit(demo_regularised(), x, at=x, radius=1e-3, effort=0.0)
    assert 9.97 < report.upper < 11.7  # theorem L9: without its third way 12.13
