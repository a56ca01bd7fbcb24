"""The tracked spectral norm: an estimate from below that follows the weight, then the ordinary life of a torch module."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import gramlip as gl
from gramlip import nn as gnn
from gramlip.nn.parametrizations import TrackedSpectralNorm
from gramlip.nn.tracker import Tracker

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Linear(40, 30),
    "conv": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4),
    "dilated": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1),
    "1d": lambda: nn.Conv1d(5, 7, 5, padding=2),
}


def flat(weight: torch.Tensor) -> None:
    """Singular values that lie close together."""
    nn.init.orthogonal_(weight)


def rank_one(weight: torch.Tensor) -> None:
    sides = [torch.randn(n) for n in weight.shape]
    product = sides[0]
    for side in sides[1:]:
        product = product[..., None] * side
    with torch.no_grad():
        weight.copy_(product)


FILLS: dict[str, Callable[[torch.Tensor], object]] = {"random": nn.init.normal_, "flat": flat, "rank one": rank_one, "ones": nn.init.ones_}


def filled(name: str, fill: str = "random") -> nn.Module:
    torch.manual_seed(sum(map(ord, name + fill)))
    layer = LAYERS[name]()
    FILLS[fill](cast("torch.Tensor", layer.weight))
    return layer


def tracked(layer: nn.Module) -> TrackedSpectralNorm:
    (found,) = [p for *_, p in gnn.normalised(layer)]
    return cast("TrackedSpectralNorm", found)


def stored(layer: nn.Module) -> nn.Parameter:
    return cast("nn.Parameter", layer.parametrizations.weight.original)  # type: ignore[union-attr]


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def agree(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 3))


@pytest.fixture
def model() -> nn.Sequential:
    return gnn.spectral_norm_(net(), torch.zeros(1, 3, 8, 8))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# ---- what is estimated ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_estimate_is_below_the_truth_and_within_one_percent(name: str, fill: str) -> None:
    layer = filled(name, fill)
    norm = gl.bound(layer, rtol=1e-4)
    weight = cast("torch.Tensor", layer.weight).detach().clone()
    gnn.spectral_norm(layer)
    for _ in range(6):
        value = cast("torch.Tensor", layer.weight)
    estimate = (weight.norm() / value.norm()).item()
    assert norm.lower * 0.99 <= estimate <= norm.upper * (1 + 1e-5)
    assert 1 - 1e-5 <= gl.bound(layer, rtol=1e-4).upper <= 1.0102


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    layer = gnn.spectral_norm(filled(name).to(dtype))
    for _ in range(6):
        value = cast("torch.Tensor", layer.weight)
    assert value.dtype == dtype
    assert tracked(layer).tracker.height.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert 0.98 <= gl.bound(layer, rtol=1e-3).upper <= 1.02


@pytest.mark.parametrize("name", ["dense", "conv", "strided", "grouped", "transposed"])
def test_it_follows_a_weight_that_trains(name: str) -> None:
    layer = gnn.spectral_norm(filled(name))
    optimiser = torch.optim.Adam([stored(layer)], lr=1e-3)
    goal = torch.randn(stored(layer).shape)
    for _ in range(150):
        optimiser.zero_grad()
        (cast("torch.Tensor", layer.weight) - goal).square().sum().backward()
        optimiser.step()
    assert 0.99 <= gl.bound(layer, rtol=1e-3).upper <= 1.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["dense", "conv", "grouped"])
def test_weights_that_are_replaced_are_noticed(name: str, training: bool) -> None:
    layer = gnn.spectral_norm(filled(name)).train(training)
    for scale in (30.0, 1e-20, 1e-3, 1e20):
        layer.weight = scale * torch.randn(stored(layer).shape)
        assert 0.9 <= gl.bound(layer, rtol=1e-3).upper <= 1.1
        assert (cast("torch.Tensor", layer.weight)).isfinite().all()


def test_fresh_weights_are_searched_at_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, searched, search = gnn.spectral_norm(nn.Conv2d(3, 4, 3), every=10), list[int](), Tracker._search

    def counted(self: Tracker, kernels: object, which: list[int]) -> None:
        searched.append(len(which))
        search(self, kernels, which)  # type: ignore[arg-type]

    monkeypatch.setattr(Tracker, "_search", counted)
    first = int(layer.state_dict()["parametrizations.weight.0.calls"]) + 1  # torch looks once when a parametrization is attached
    for _ in range(33):
        layer.weight  # noqa: B018
    assert [first + i for i, count in enumerate(searched) if count] == [n for n in (1, 2, 4, 8, 10, 16, 20, 30, 32) if n >= first]


def test_margin_and_target_and_soft() -> None:
    layer = gnn.spectral_norm(filled("conv"), target=2.0, margin=0.1)
    assert gl.bound(layer, rtol=1e-4).upper == pytest.approx(1.8, rel=1e-2)
    small = nn.Linear(4, 4)
    nn.init.eye_(small.weight).data.mul_(0.25)
    assert torch.equal(gnn.spectral_norm(small, soft=True).weight, 0.25 * torch.eye(4))
    for margin in (1.0, -0.1, True, "0"):
        with pytest.raises(gl.InputError, match="margin="):
            gnn.spectral_norm(nn.Linear(2, 2), margin=margin)  # type: ignore[arg-type]
    with pytest.raises(gl.InputError, match="every=0"):
        gnn.spectral_norm(nn.Linear(2, 2), every=0)


@pytest.mark.parametrize(("fill", "target", "least"), [(1e30, 1e10, 5e9), (2e38, 1.0, 0.5), (1e-30, 1e-20, 1e-30)])
def test_soft_at_any_scale(fill: float, target: float, least: float) -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, fill)
    assert torch.allclose(gnn.spectral_norm(layer, target=target, soft=True).weight / least, torch.ones(2, 2))


def test_zero_stays_zero_and_denormals_stay_finite() -> None:
    for fill in (0.0, 1e-40):
        layer = nn.Conv2d(2, 2, 3)
        nn.init.constant_(layer.weight, fill)
        gnn.spectral_norm(layer)
        layer.weight.sum().backward()
        assert layer.weight.isfinite().all()
        assert fill or layer.weight.eq(0).all()
        assert not fill or gl.bound(layer).upper <= 1.0


def test_zero_weights_that_come_to_life() -> None:
    layer = nn.Linear(5, 5)
    nn.init.zeros_(layer.weight)
    gnn.spectral_norm(layer)
    layer.weight = torch.randn(5, 5)
    assert gl.bound(layer).upper == pytest.approx(1.0, rel=2e-2)


def test_padding_that_repeats_inputs_stays_below_the_target() -> None:
    for mode, padding in (("reflect", 1), ("replicate", 1), ("circular", 3)):
        torch.manual_seed(3)
        layer = gnn.spectral_norm(nn.Conv2d(2, 3, 3, padding=padding, padding_mode=mode), input_size=(6, 6))
        assert gl.bound(layer, (6, 6), rtol=1e-3).lower <= 1.0


# ---- the gradient --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradient_is_that_of_the_value(name: str, soft: bool) -> None:
    layer = gnn.spectral_norm(filled(name).double(), soft=soft)
    for _ in range(300):  # to where the vectors stand: there the estimate changes as the norm does
        cast("torch.Tensor", layer.weight)
    chain, weight = tracked(layer).eval(), stored(layer).detach().requires_grad_()
    for _ in range(3):  # a part of rank one: `gradcheck` in its fast mode does not see it
        into, along = torch.randn_like(weight), torch.randn_like(weight)
        (gradient,) = torch.autograd.grad(chain(weight), weight, into)
        with torch.no_grad():
            quotient = (chain(weight + 1e-6 * along) - chain(weight - 1e-6 * along)) / 2e-6
        torch.testing.assert_close((gradient * along).sum(), (quotient * into).sum(), rtol=1e-5, atol=1e-7)


def test_gradient_is_that_of_the_norm() -> None:
    layer = gnn.spectral_norm(filled("dense").double())
    for _ in range(300):
        value = layer.weight
    direction = torch.randn_like(value)
    (value * direction).sum().backward()
    weight = stored(layer).detach().requires_grad_()
    (weight / torch.linalg.matrix_norm(weight, 2) * direction).sum().backward()
    torch.testing.assert_close(stored(layer).grad, weight.grad, rtol=1e-3, atol=1e-4)


# ---- the life of a module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("soft", "scale"), [(False, 1.0), (True, 1.0), (True, 1e-3)])
@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_of_every_order_are_those_of_the_plain_expression(name: str, soft: bool, scale: float) -> None:
    """`weight * goal / <A, weight>` with the matrix A of rank two that the tracker holds; a soft one leaves small weights alone."""
    layer = filled(name).double()
    cast("torch.Tensor", layer.weight).data.mul_(scale)
    own = tracked(gnn.spectral_norm(layer, soft=soft).eval())
    weight = stored(layer).detach()
    group, probes, (unit,) = own.tracker.look(kernels := own.tracker.kernels([weight]))
    image = kernels[group[0]] @ probes[0].mT
    matrix = torch.zeros_like(kernels)
    matrix[group[0]] = image / torch.linalg.vector_norm(image) @ probes[0]
    goal = 1.0 / math.sqrt(own.tracker.geometry.square)

    def plain(weight: torch.Tensor) -> torch.Tensor:
        scale = goal / (matrix * weight.reshape(matrix.shape)).sum() / unit
        return weight * (scale.clamp_max(1.0) if soft else scale)

    x, into, along = weight.clone().requires_grad_(), torch.randn_like(weight), torch.randn_like(weight)
    torch.testing.assert_close(own(x), plain(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x, into) for f in (own, plain)))
    first = [torch.autograd.grad(f(x), x, into, create_graph=True)[0] for f in (own, plain)]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*(torch.autograd.grad((g * along).sum() + 0 * x.sum(), x)[0] for g in first))
    torch.testing.assert_close(*(torch.func.jvp(f, (weight,), (along,))[1] for f in (own, plain)))


def test_gradients_lie_in_memory_as_their_weights(model: nn.Sequential, x: torch.Tensor) -> None:
    """Ranks that reduce them see the memory alone."""
    plain = nn.Conv2d(6, 8, 3)
    for weight, loss in ((stored(model[0]), model(x).square().sum()), (plain.weight, gnn.LipschitzPenalty(plain, threshold=0.1)())):
        (found,) = torch.autograd.grad(loss, [weight])
        assert found.stride() == weight.stride()


def test_eval_moves_no_state(model: nn.Sequential, x: torch.Tensor) -> None:
    model(x)
    before, first = state(model), model.eval()(x)
    for _ in range(3):
        assert torch.equal(model(x), first)
    stored(model[0]).data.mul_(100)  # searched, but not kept
    model(x)
    stored(model[0]).data.copy_(before["0.parametrizations.weight.original"])
    assert agree(state(model), before)


def test_state_dict_deepcopy_pickle(model: nn.Sequential, x: torch.Tensor) -> None:
    for _ in range(3):
        model(x)
    other = gnn.spectral_norm_(net(), torch.zeros(1, 3, 8, 8))
    other.load_state_dict(model.state_dict())
    twins = other, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(pickle.loads(pickle.dumps(model)))
    expected = [model(x) for _ in range(3)]
    for twin in twins:
        assert all(torch.equal(twin(x), y) for y in expected)  # training goes on as it would have
        assert type(gnn.remove(twin)[0]) is nn.Conv2d


def test_a_resumed_run_is_the_same_run(x: torch.Tensor) -> None:
    def run(model: nn.Sequential, steps: int) -> nn.Sequential:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(steps):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            optimiser.step()
        return model

    def make() -> nn.Sequential:
        return gnn.spectral_norm_(net(), torch.zeros(1, 3, 8, 8), every=5)

    whole, part, rest = run(make(), 12), run(make(), 7), make()
    rest.load_state_dict(part.state_dict())
    assert agree(state(run(rest, 5)), state(whole))


def form(name: str, layer: nn.Module) -> nn.Module:
    return torchs.spectral_norm(layer) if name == "torch" else gnn.spectral_norm(layer, exact=name == "exact")


@pytest.mark.parametrize(("of", "into"), [("torch", "tracked"), ("exact", "tracked"), ("torch", "exact"), ("tracked", "exact")])
def test_a_state_of_another_form_is_loaded(of: str, into: str, x: torch.Tensor) -> None:
    source, model = net(), net()
    for i in (0, 2, 4):
        nn.init.normal_(cast("torch.Tensor", source[i].weight), std=3.0)
        form(of, source[i])
        form(into, model[i])
    given = source.state_dict()
    keys = set(given)
    model.load_state_dict(given)
    assert set(given) == keys  # what the caller holds is as it was
    for i in (0, 2, 4):
        assert torch.equal(stored(model[i]), stored(source[i]))
        assert (0.93 if into == "exact" else 0.97) <= gl.bound(model[i], rtol=1e-3).upper <= 1.03
    assert model(x).isfinite().all()


def test_a_state_that_lacks_a_part_is_still_refused(model: nn.Sequential) -> None:
    given = model.state_dict()
    del given["0.parametrizations.weight.0.tracker.vector"]
    with pytest.raises(RuntimeError, match=r"Missing key.*tracker\.vector"):
        model.load_state_dict(given)


def test_average_of_weights(model: nn.Sequential, x: torch.Tensor) -> None:
    average = AveragedModel(model)
    for factor in (1.0, 3.0, -40.0):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
        average.update_parameters(model)
    average.eval()
    assert average(x).isfinite().all()
    for i in (0, 2, 4):
        assert 0.95 <= gl.bound(average.module[i], rtol=1e-3).upper <= 1.05  # type: ignore[index]


def test_two_forwards_before_a_backward(model: nn.Sequential, x: torch.Tensor) -> None:
    for _ in range(200):
        model(x)
    (model(x).sum() - model(-x).square().sum()).backward()
    both = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in both)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(x).sum().backward()
    twin(-x).square().sum().neg().backward()  # accumulated
    for mine, theirs in zip(both, twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing(model: nn.Sequential, x: torch.Tensor) -> None:
    for _ in range(200):  # what is recomputed is a step later
        model(x)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4)


def test_autocast_leaves_the_estimate_alone(model: nn.Sequential, x: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        twin(x).sum().backward()
    model(x)
    assert torch.equal(tracked(twin[0]).tracker.height, tracked(model[0]).tracker.height)


def test_cached(model: nn.Sequential, x: torch.Tensor) -> None:
    with parametrize.cached():
        model(x)
        before = state(model)
        model(x)
    assert agree(before, state(model))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(backend: str, training: bool, model: nn.Sequential, x: torch.Tensor) -> None:
    past = {name: torch.tensor(64) for name in model.state_dict() if name.endswith("calls")}  # compiled code has no searches by number
    model.load_state_dict(model.state_dict() | past)
    twin = copy.deepcopy(model).train(training)
    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    model(x).square().sum().backward()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(tracked(twin[2]).tracker.vector, tracked(model[2]).tracker.vector)


def test_exported(model: nn.Sequential, x: torch.Tensor) -> None:
    model.eval()
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_functional_calls(training: bool, model: nn.Sequential, x: torch.Tensor) -> None:
    model.train(training)
    for _ in range(100):
        model(x)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    found = torch.func.grad(loss)(weights)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4)


def test_per_sample_gradients_and_a_batch_of_weights(model: nn.Sequential, x: torch.Tensor) -> None:
    model.eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x[None],)).square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(2):
        one = torch.func.grad(loss)(weights, x[i])
        torch.testing.assert_close({name: g[i] for name, g in each.items()}, one, rtol=1e-4, atol=1e-5)
    _, along = torch.func.jvp(lambda w: loss(w, x[0]), (weights,), (weights,))
    assert along.isfinite()
    with pytest.raises(gl.InputError, match=r"under torch\.vmap over weights.*exact=True"):
        torch.vmap(loss, (0, None))({name: torch.stack([w, w]) for name, w in weights.items()}, x[0])


@pytest.mark.parametrize("exact", [True, False])
def test_bounding_and_auditing_in_training_mode_change_nothing(exact: bool) -> None:
    model = gnn.spectral_norm_(net(), (3, 8, 8), exact=exact)
    before = state(model)
    gl.bound(model[0])
    gl.bound(model[0], (8, 8))
    gl.audit(model.eval(), (3, 8, 8))
    model.train()
    gnn.LipschitzPenalty(model, (3, 8, 8)).certify()
    assert agree(state(model), before)
    assert model.training


def test_a_model_built_on_the_meta_device() -> None:
    for assign in (True, False):
        with torch.device("meta"):
            model = net()
        gnn.spectral_norm_(model, (3, 8, 8))
        assert model(torch.zeros(1, 3, 8, 8, device="meta")).is_meta
        if not assign:
            model.to_empty(device="cpu")
            assert all(b.eq(0).all() for b in tracked(model[0]).tracker.buffers())
        source = gnn.spectral_norm_(net(), (3, 8, 8))
        model.load_state_dict(state(source), assign=assign)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(model(x), source(x))


def test_inference_first_and_training_then(x: torch.Tensor) -> None:
    with torch.device("meta"):
        model = net()
    gnn.spectral_norm_(model, (3, 8, 8)).to_empty(device="cpu").load_state_dict(gnn.spectral_norm_(net(), (3, 8, 8)).state_dict())
    with torch.inference_mode():
        first = model.eval()(x)
        model.train()(x)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        m.train()(x).square().sum().backward()
    assert torch.equal(tracked(model[0]).tracker.vector, tracked(twin[0]).tracker.vector)
    torch.testing.assert_close(model.eval()(x), first, rtol=1e-2, atol=1e-2)


def test_nan_is_seen_and_forgotten() -> None:
    layer = gnn.spectral_norm(filled("conv"))
    layer.weight = torch.full(stored(layer).shape, math.nan)
    assert cast("torch.Tensor", layer.weight).isnan().all()
    layer.weight = torch.randn(stored(layer).shape)
    cast("torch.Tensor", layer.weight)
    assert gl.bound(layer, rtol=1e-3).upper == pytest.approx(1.0, rel=2e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_what_remove_leaves_is_certified(name: str) -> None:
    layer = gnn.remove(gnn.spectral_norm(filled(name), target=0.5))
    assert type(layer) is type(LAYERS[name]())
    assert 0.48 < gl.bound(layer, rtol=1e-3).upper <= 0.5


def test_the_form_is_told(model: nn.Sequential) -> None:
    assert "margin=0.0, every=100" in repr(model)
    assert [type(p).__name__ for *_, p in gnn.normalised(model)] == ["TrackedSpectralNorm"] * 3
    exact = gnn.spectral_norm_(net(), exact=True)
    assert [type(p).__name__ for *_, p in gnn.normalised(exact)] == ["SpectralNorm"] * 3
