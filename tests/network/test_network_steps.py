"""Steps written by hand, as a registered rule may write them: their errors, sums that broadcast, slopes known from one side."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramlip as gl
from gramlip.errors import InputError
from gramlip.network.compose import compose, constants
from gramlip.network.coupling import coupled
from gramlip.network.fold import fold
from gramlip.network.local import region, restricted
from gramlip.network.steps import Input, Linear, Lipschitz, Network, Pad, Product, Slope, Step, Sum, What
from gramlip.numerics import rounding as rd
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape, apply, matrix_of
from gramlip.rules import RULES, register
from rule_cases import Map


def on_domain(given: Network) -> Network:
    """The steps where every entry of every input lies between -1 and 1."""
    area = region([step.shape for step in given.steps if isinstance(step.what, Input)], (-1.0, 1.0), None, None)
    assert area is not None
    return restricted(given, area).network


def network(*steps: tuple[What, tuple[int, ...], Shape]) -> Network:
    """The steps, the last one the output."""
    made = [Step(what, sources, shape, f"s{i}", "aten.none") for i, (what, sources, shape) in enumerate(steps)]
    return Network(made, (len(made) - 1,))


def upper(given: Network) -> float:
    """The composed bound of the folded network."""
    folded = fold(given)
    found = constants(folded.steps, [[folded.steps[x].shape for x in s.sources] for s in folded.steps])
    return compose(folded, found).upper


def wide(n: int) -> Tensor:
    return torch.full((1, 1, 1), float(n), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular", "zeros"])
@pytest.mark.parametrize(("n", "pairs"), [(4, (3, 3)), (5, (0, 4)), (9, (8, 1))])
def test_the_error_of_a_step_is_repeated_by_the_padding_before_it(mode: str, n: int, pairs: tuple[int, int]) -> None:
    error, long = 0.1000001, n + sum(pairs)
    given = network((Input(), (), (1, 1, n)), (Pad((pairs,), mode), (0,), (1, 1, long)), (Linear(Conv(wide(1)), error), (1,), (1, 1, long)))
    pad = nn.functional.pad(torch.eye(n, dtype=torch.float64)[:, None], pairs, mode="constant" if mode == "zeros" else mode)[:, 0]
    assert upper(given) >= (1 + error) * float(torch.linalg.matrix_norm(pad, 2)) * (
        1 - 1e-12
    )  # the error may be `error` times the identity


def test_replicate_padding_by_50_repeats_the_error_51_times() -> None:
    given = network(
        (Input(), (), (1, 1, 4)),
        (Pad(((50, 50),), "replicate"), (0,), (1, 1, 104)),
        (Linear(Conv(wide(1)), error=0.1000001), (1,), (1, 1, 104)),
    )
    assert upper(given) >= 1.1 * math.sqrt(51)


@pytest.mark.parametrize("inner", [Conv(wide(2), input_size=3), Scale(torch.tensor(2.0, dtype=torch.float64))])
def test_folded_errors_multiply_and_add(inner: Conv | Scale) -> None:
    shape = (1, 1, 3)
    chain = network((Input(), (), shape), (Linear(inner, 0.5), (0,), shape), (Linear(Conv(wide(3), input_size=3), 0.25), (1,), shape))
    assert upper(chain) >= 2.5 * 3.25
    branches = network(
        (Input(), (), shape),
        (Linear(inner, 0.5), (0,), shape),
        (Linear(Conv(wide(3), input_size=3), 0.25), (0,), shape),
        (Sum((1, 1)), (1, 2), shape),
    )
    assert upper(branches) >= 5.75


def test_a_folded_map_with_a_constant_has_no_range() -> None:
    shape = (1, 2)
    one = Linear(Dense(torch.eye(2)), bias=torch.ones(1, 2))
    folded = fold(network((Input(), (), shape), (one, (0,), shape), (Linear(Dense(2 * torch.eye(2))), (1,), shape)))
    assert len(folded.steps) == 2
    squared = Network([*folded.steps, Step(Product("entries"), (1, 1), shape, "square", "aten.mul")], (2,))
    assert isinstance(what := on_domain(squared).steps[2].what, Product)
    assert what.caps is None


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_an_error_that_bounds_nothing_is_refused(value: float) -> None:
    for name in ("error", "bias_error"):
        with pytest.raises(gl.InputError, match=f"{name}="):
            Linear(Dense(torch.eye(2)), **{name: value})


def test_an_overflow_keeps_the_steps_apart() -> None:
    shape, huge = (1, 2), Linear(Dense(1e200 * torch.eye(2, dtype=torch.float64)))
    assert len(fold(network((Input(), (), shape), (huge, (0,), shape), (huge, (1,), shape))).steps) == 3
    scale = Linear(Scale(torch.tensor(1e200, dtype=torch.float64)))
    assert len(fold(network((Input(), (), shape), (scale, (0,), shape), (scale, (1,), shape))).steps) == 3


# ---- sums that broadcast ---------------------------------------------------------------------------------------------------


def test_a_sum_counts_how_often_it_repeats_a_source() -> None:
    given = network((Input(), (), (1, 4)), (Input(), (), (1, 1)), (Sum((1, 4)), (0, 1), (1, 4)))
    assert upper(given) >= math.hypot(1, 2)  # x + (y, y, y, y)
    same = network((Input(), (), (1, 1)), (Slope(1.0, 1.0, ""), (0,), (1, 1)), (Sum((4, 4)), (0, 1), (1, 4)))
    assert upper(same) >= 4.0
    folded = fold(same)
    found = constants(folded.steps, [[folded.steps[x].shape for x in s.sources] for s in folded.steps])
    parts = coupled(folded, found)
    assert parts is not None
    assert reduce(rd.mul_up, (part.upper for part in parts)) >= 4.0


def test_rows_of_a_sum_that_broadcasts() -> None:
    shape = (1, 4)
    row = Lipschitz(1.0, "a row of norm 1", row=1.0)
    given = network((Input(), (), (1, 1)), (row, (0,), (1, 1)), (Sum((4, 4)), (1, 1), shape), (Product("matrix"), (2, 2), shape))
    what = on_domain(given).steps[3].what
    assert isinstance(what, Product)
    assert what.caps is not None
    assert min(what.caps) >= 4.0


def test_a_rule_that_forgets_the_repeats_of_a_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.sinh", RULES["aten.sinh"])  # what follows takes its place

    @register("aten.sinh")
    def _wrong(call):
        x = call.vars[0]
        return call.then(Sum((1, 1)), x, x, shape=(*x.shape, 4))

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sinh(x)

    with pytest.raises(gl.UnsupportedError, match=r"expected Sum\(\(4, 4\)\)"):
        gl.audit(Net(), (3,))


# ---- the matrix of an operator ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [((1, 0),), ((0, 1),), ((2, 1),), ((0, 0),)])
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_transposed_convolution_crops_each_side_by_its_own_padding(pads: tuple[tuple[int, int], ...], extra: int, n: int) -> None:
    weight = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if (n - 1) * 2 + 3 + extra <= sum(pads[0]):
        return
    op = Conv(weight, input_size=n, stride=2, padding=pads, transposed=True, output_padding=extra)
    whole = nn.functional.conv_transpose1d(torch.eye(2 * n, dtype=torch.float64).reshape(2 * n, 2, n), weight, stride=2)
    whole = nn.functional.pad(whole, (0, extra))
    (lo, hi) = pads[0]
    meant = whole[..., lo : whole.shape[-1] - hi].reshape(2 * n, -1).mT
    assert torch.equal(matrix_of(op, (1, 2, n)), meant)
    x = torch.randn(1, 2, n, dtype=torch.float64)
    assert torch.allclose(apply(op, x).reshape(-1), meant @ x.reshape(-1))


def test_a_coupled_transposed_convolution_keeps_the_side_that_is_not_padded() -> None:
    kernel = torch.tensor([[[0.0, 0.1, 1.0]]], dtype=torch.float64)
    up = Linear(Conv(kernel, input_size=1, stride=2, padding=((1, 0),), transposed=True))
    relu = Slope(0.0, 1.0, "relu")
    given = network(
        (Input(), (), (1, 1, 1)),
        (Linear(Conv(wide(1), input_size=1)), (0,), (1, 1, 1)),
        (relu, (1,), (1, 1, 1)),
        (up, (2,), (1, 1, 2)),
        (relu, (3,), (1, 1, 2)),
    )
    found = constants(given.steps, [[given.steps[x].shape for x in s.sources] for s in given.steps])
    parts = coupled(given, found)
    assert parts is not None
    assert reduce(rd.mul_up, (part.upper for part in parts)) >= math.hypot(0.1, 1.0)  # positive inputs pass every relu


# ---- one of several maps, and slopes known from one side -------------------------------------------------------------------


def test_a_choice_between_branches_has_no_lower_side() -> None:
    one, other = gl.bound(torch.diag(torch.tensor([1.0, 0.0]))), gl.bound(torch.diag(torch.tensor([0.0, 1.0])))
    chosen = gl.Bound.max([one, other])
    assert chosen.lower == 0.0  # the mask that takes the zeros
    assert float(chosen.upper) >= 1.0
    masked = torch.ones(2, 2) / math.sqrt(2)  # a row of each of two maps of norm 1
    rows = [gl.bound(masked * keep) for keep in (torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]))]
    assert float(gl.Bound.concat(rows).upper) >= float(torch.linalg.matrix_norm(masked, 2)) > float(gl.Bound.max(rows).upper) * 1.4
    both = gl.Bound.block_diagonal([one, gl.bound(3 * torch.eye(2))])
    assert both.lower <= 3.0 <= float(both.upper)
    assert both.lower > 2.9


@pytest.mark.parametrize(
    ("call", "most"),
    [
        (lambda x: torch.exp(torch.sin(x) * torch.cos(x)), 1.649),
        (lambda x: torch.sqrt(2 + torch.sin(x) * torch.cos(x)), 0.5),
        (lambda x: torch.log(2 + torch.tanh(x) * torch.sigmoid(x)), 1.0),
    ],
)
def test_a_function_on_an_over_estimated_range_claims_no_lower_side(call: Callable[[Tensor], Tensor], most: float) -> None:
    report = gl.audit(Map(call), (2,), domain=(-4.0, 4.0))
    assert report.layers[-1].bound.lower <= most
    assert report.lower <= report.upper


@pytest.mark.parametrize("low", [torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])])
def test_a_clamp_whose_limits_meet_is_constant(low: Tensor) -> None:
    report = gl.audit(Map(lambda x: torch.clamp(x, low, torch.tensor([1.0, 2.0]))), (2,))
    assert report.upper == float(bool((low < torch.tensor([1.0, 2.0])).any()))


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh", "sigmoid", "elu", "softplus", "hardswish", "leaky_relu"])
def test_a_function_on_all_numbers_keeps_its_lower_side(name: str) -> None:
    row = gl.audit(Map(getattr(nn.functional, name, None) or getattr(torch, name)), (2,)).layers
    assert not row or row[0].bound.lower > 0.999 * float(row[0].bound.upper)


# ---- ranges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [Scale(torch.ones(1, dtype=torch.float64)), Dense(torch.eye(16)), Conv(torch.ones(1, 1, 1), input_size=16)])
def test_the_error_of_a_step_may_gather_all_entries_in_one(op: Scale | Dense | Conv) -> None:
    shape = (1, 1, 16)
    given = network((Input(), (), shape), (Linear(op, error=1.0), (0,), shape), (Product("entries"), (1, 1), shape))
    what = on_domain(given).steps[2].what
    assert isinstance(what, Product)
    assert what.caps is not None
    assert min(what.caps) >= 1.0 + math.sqrt(16) * (1 - 1e-12)  # the error e 1' of norm 1, e = a unit vector, 1' = ones / 4


def test_the_slack_of_a_sum_grows_with_its_terms() -> None:
    from gramlip.network.ranges import _slack

    assert _slack(1.0, 10**9) >= 10**9 * 2.0**-53
    assert _slack(2.0**-1000, 10**9) >= 10**9 * 2.0**-1022


def test_vmap_is_the_calls_that_it_makes_and_leaves_no_scope_open() -> None:
    weight = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)
    example = torch.zeros(2, 3, dtype=torch.float64)
    report = gl.audit(Map(lambda x: torch.vmap(lambda row: torch.relu(row.unsqueeze(0) @ weight.T)[0])(x)).eval(), example)
    plain = gl.audit(Map(lambda x: torch.relu(x @ weight.T)).eval(), example)
    assert plain.lower * 0.9 < report.lower <= report.upper
    assert plain.upper * (1 - 1e-9) <= report.upper < plain.upper * (1 + 1e-3)
    torch.randn(2)  # an open scope of vmap forbids it


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: x + torch.func.grad(lambda y: (y**3).sum())(x), "does not follow"),
        (lambda x: torch.func.vjp(lambda y: y**3, x)[1](x)[0], "does not follow"),
        (lambda x: torch.vmap(lambda row: row.clone().mul_(2))(x), "out of place"),
    ],
)
def test_derivatives_that_an_export_loses_are_refused(call: Callable[[Tensor], Tensor], says: str) -> None:
    for strict in (True, False):
        with pytest.raises(InputError, match=says):
            gl.audit(Map(call).eval(), torch.zeros(2, 3), domain=(-1.0, 1.0), strict=strict)


@pytest.mark.parametrize("options", [{}, {"domain": (-1.0, 1.0)}, {"at": torch.zeros(1, 4), "radius": 0.5}])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.flip(1).gather(1, x.argsort(1)),
        lambda x: torch.where(x.roll(1, 1) > 0, x, -x) + x,
        lambda x: torch.cond(x.sum() > 0, lambda y: 2 * y, lambda y: 3 * y, (x,)),
    ],
)
def test_calls_without_a_rule_are_unbounded_on_sets_too(call: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    report = gl.audit(Map(call).eval(), torch.zeros(1, 4), strict=False, **options)
    assert report.upper == math.inf
    assert report.unsupported
