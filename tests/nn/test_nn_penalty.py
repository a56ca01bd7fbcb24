"""The penalty: what it tracks lies between nothing and the certified norm, and its gradient is the norm's."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import gramlip as gl
from gramlip import distributed
from gramlip import nn as gnn
from gramlip.nn.regularise import FORMS


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4),
        nn.ConvTranspose2d(12, 8, 2, stride=2),
        nn.Conv2d(8, 4, (5, 1), padding=(2, 0), padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(4 * 64, 10),
    )
    return model.to(dtype)


EXAMPLE = torch.zeros(1, 3, 8, 8)


def certified(model: nn.Sequential) -> dict[str, gl.Bound]:
    return {path: gl.bound(m, rtol=1e-4) for path, m in model.named_children() if hasattr(m, "weight")}


def test_tracked_norms_reach_the_supremum_and_never_exceed_it() -> None:
    model = net()
    penalty = gnn.LipschitzPenalty(model)
    for _ in range(30):
        sigmas = penalty.sigmas()
    for path, b in certified(model).items():
        sigma = sigmas[path].item()
        assert sigma <= b.upper * (1 + 1e-6)
        assert sigma >= b.lower * (1 - 1e-3)


def test_certify_gives_the_intervals_of_bound() -> None:
    model = net()
    found = gnn.LipschitzPenalty(model, EXAMPLE).certify()
    assert set(found) == {path for path, m in model.named_children() if hasattr(m, "weight")}
    assert found["2"].upper == gl.bound(model[2], 8).upper


def test_gradient_is_that_of_the_norm() -> None:
    model = net(torch.float64)
    penalty = gnn.LipschitzPenalty(model, threshold=1e-3, steps=200)
    for _ in range(2):
        value = penalty()
    value.backward()
    for module in (model[2], model[4], model[5], model[8]):
        direction, h = torch.randn_like(module.weight), 1e-5
        sides = []
        for sign in (1, -1):
            twin = copy.deepcopy(module)
            twin.weight.data.add_(sign * h * direction)
            b = gl.bound(twin, rtol=1e-9)
            sides.append((b.lower + b.upper) / 2)
        assert (module.weight.grad * direction).sum().item() == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-2, abs=1e-3)


def test_training_with_tracked_norms_ends_where_training_with_exact_ones_does() -> None:
    ends = []
    for every in (1, 50):
        model = net()
        penalty = gnn.LipschitzPenalty(model, form="hinge", threshold=0.5, every=every)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
        for _ in range(120):
            optimiser.zero_grad()
            penalty().backward()
            optimiser.step()
        ends.append([b.upper for b in certified(model).values()])
    assert max(ends[0]) <= 0.6
    assert ends[0] == pytest.approx(ends[1], rel=0.05)


def test_forms_and_compositions() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    for layer, scale in zip(model, (2.0, 0.5), strict=True):
        nn.init.eye_(layer.weight).data.mul_(scale)
    values = {form: gnn.LipschitzPenalty(model, form=form)().item() for form in FORMS}
    assert values == pytest.approx({"paper": 2.0, "hinge": 1.0, "square": 1.0, "log": 0.6931472})
    product = gnn.LipschitzPenalty(model, form="hinge", over="product", threshold=0.25)()
    assert product.item() == pytest.approx(0.75)
    own = gnn.LipschitzPenalty(model, form="paper", over=lambda sigmas: 1 + sigmas["0"] * sigmas["1"])
    assert own().item() == pytest.approx(2.0)


def test_zero_weights_give_zero_and_finite_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    nn.init.zeros_(model[0].weight)
    for over in ("layers", "product"):
        model.zero_grad()
        gnn.LipschitzPenalty(model, threshold=1e-6, over=over)().backward()
        assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e37, 1e25, 1e20, 1e-20, 1e-25, 1e-30])
@pytest.mark.parametrize("layer", [nn.Linear(3, 3, bias=False), nn.Conv2d(2, 2, 3, padding=1)], ids=["linear", "conv"])
def test_weights_of_any_scale_have_norms_and_gradients(layer: nn.Module, scale: float) -> None:
    layer = copy.deepcopy(layer)
    nn.init.dirac_(layer.weight) if layer.weight.ndim > 2 else nn.init.eye_(layer.weight)
    layer.weight.data *= scale
    penalty = gnn.LipschitzPenalty(layer, threshold=scale / 2, form="hinge")
    for _ in range(3):
        layer.weight.grad = None
        value = penalty()
        value.backward()
        assert value.item() == pytest.approx(scale / 2, rel=1e-4)
        assert (layer.weight.grad * layer.weight).sum().item() == pytest.approx(scale, rel=1e-4)  # Euler's, of degree one
    layer.weight.data /= scale  # and what was followed serves the ordinary ones
    assert penalty.sigmas().popitem()[1].item() == pytest.approx(1.0, rel=1e-4)


def test_functional_gradients_are_those_of_backward() -> None:
    model = net()
    penalty = gnn.LipschitzPenalty(model, threshold=0.1)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        names = {f"model.{name}": w for name, w in weights.items()}
        return torch.func.functional_call(both, names, (x,))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).square().sum() + penalty()

    both, x = Both(), torch.randn(2, 3, 8, 8)
    state = copy.deepcopy(penalty.state_dict())
    found = torch.func.grad(loss)(weights, x)
    assert int(penalty.calls) == 1
    assert not any(torch.equal(state[name], new) for name, new in penalty.state_dict().items() if "vector" in name)
    penalty.load_state_dict(state)
    both(x).backward()
    torch.testing.assert_close(found, {name: w.grad for name, w in weights.items()})
    torch.vmap(torch.func.grad(loss), (None, 0))(weights, x[:, None])
    _, along = torch.func.jvp(lambda w: loss(w, x), (weights,), (weights,))
    assert along.isfinite()
    several = {name: torch.stack([w.detach(), w.detach()]) for name, w in weights.items()}
    with pytest.raises(gl.InputError, match="one LipschitzPenalty for each"):
        torch.vmap(loss, (0, None))(several, x)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_is_no_number_is_seen_and_forgotten(form: str) -> None:
    layer = nn.Linear(2, 2)
    weight = 5 * torch.eye(2)
    layer.weight.data = weight.clone()
    penalty = gnn.LipschitzPenalty(layer, form=form)
    before = penalty()
    layer.weight.data[0, 0] = math.nan
    assert penalty().isnan()
    layer.weight.data = weight
    assert penalty().item() == pytest.approx(before.item())


def test_a_layer_that_starts_from_zero_is_followed() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    penalty = gnn.LipschitzPenalty(layer)
    penalty()
    nn.init.eye_(layer.weight).data.mul_(100)
    assert penalty().item() == pytest.approx(100.0)


@pytest.mark.parametrize("example", [None, torch.zeros(1, 2, 8, 8)])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, 3])
def test_no_padding_takes_the_estimate_above_the_bound(mode: str, padding: int, example: torch.Tensor | None) -> None:
    torch.manual_seed(padding)
    layer = nn.Conv2d(2, 3, 3, padding=padding, padding_mode=mode)
    penalty = gnn.LipschitzPenalty(layer, example)
    for _ in range(20):
        (sigma,) = penalty.sigmas().values()
    assert sigma <= gl.bound(layer).upper * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_holds_it_can_be_cast_and_pickled(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    model.penalty = gnn.LipschitzPenalty(model, threshold=0.1)
    model.to(dtype)
    assert pickle.loads(pickle.dumps(model)).penalty().item() == pytest.approx(model.penalty().item())


def test_state_resumes_and_the_model_keeps_its_parameters() -> None:
    model = net()
    penalty = gnn.LipschitzPenalty(model)
    assert not list(penalty.parameters())
    for _ in range(3):
        penalty()
    other = gnn.LipschitzPenalty(model)
    other.load_state_dict(penalty.state_dict())
    assert torch.equal(other(), penalty())


def test_autocast_leaves_it_alone() -> None:
    model = net()
    first, second = gnn.LipschitzPenalty(model), gnn.LipschitzPenalty(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = first()
    assert torch.equal(inside, second())


def test_of_normalised_layers() -> None:
    model = gnn.spectral_norm_(net(), EXAMPLE, target=0.5)
    penalty = gnn.LipschitzPenalty(model, EXAMPLE, threshold=0.4)
    penalty().backward()
    assert model[0].parametrizations.weight.original.grad is not None


def test_work_is_shared_evenly_and_completely() -> None:
    costs = [float(c) for c in (5, 1, 4, 4, 2, 9, 1)]
    shares = [distributed.share(costs, 3, rank) for rank in range(3)]
    assert sorted(i for part in shares for i in part) == list(range(7))
    assert max(sum(costs[i] for i in part) for part in shares) == 9
    assert distributed.share([], 2, 0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cube"}, "form='cube'"),
        ({"over": "sum"}, "over='sum'"),
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
        ({"every": "a"}, "every='a'"),
        ({"peaks": 3.0}, "peaks=3.0"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"over": "product", "shared": True}, "shared=True"),
        ({"where": lambda *_: False}, "no layer"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(gl.InputError, match=message):
        gnn.LipschitzPenalty(net(), **options)


def test_the_meta_device_has_nothing_to_track() -> None:
    with pytest.raises(gl.InputError, match="0 is on the meta device; expected weights with values"):
        gnn.LipschitzPenalty(net().to("meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_shape_is_of_the_numbers_that_the_model_has(dtype: torch.dtype) -> None:
    gnn.LipschitzPenalty(net(dtype), (3, 8, 8))().backward()


def test_complex_weights_are_refused_by_name() -> None:
    layer = nn.Conv1d(2, 3, 3, dtype=torch.complex64)
    for call in (gnn.LipschitzPenalty, gnn.spectral_rescaling):
        with pytest.raises(gl.UnsupportedError, match="complex64"):
            call(layer)
