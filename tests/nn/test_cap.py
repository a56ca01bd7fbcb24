"""The cap: plain weights scaled down after a step, and certified by `cap_`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import gramlip as gl
from gramlip import nn as gnn
from gramlip.nn.regularise import TURNS

EXAMPLE = torch.zeros(1, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 64, 10),
    )


LINEAR = ("0", "2", "3", "5")


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p, lr=1e-2)], ids=["SGD", "Adam"]
)
def test_norms_stay_near_the_target_in_training(make: object) -> None:
    model, x = net(), torch.randn(16, 3, 8, 8)
    optimiser = make(model.parameters())  # type: ignore[operator]
    cap = gnn.Cap(model, 0.8, EXAMPLE)
    optimiser.register_step_post_hook(cap)
    for step in range(60):
        optimiser.zero_grad()
        (-model(x).var(0).sum()).backward()  # asks for norms without end
        optimiser.step()
        if step % 20 == 19:
            for path in LINEAR:
                assert gl.bound(model.get_submodule(path), rtol=1e-3).upper <= 0.8 * 1.05, path
    assert max(gl.bound(model.get_submodule(path), rtol=1e-3).upper for path in LINEAR) > 0.79
    assert set(gnn.cap_(model, 0.7)) <= set(LINEAR)
    assert all(gl.bound(model.get_submodule(path)).upper <= 0.7 for path in LINEAR)
    assert list(model.state_dict()) == list(net().state_dict())  # the layers are what they were


def test_what_is_below_the_target_is_left_alone() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    cap = gnn.Cap(model, 100.0)
    assert cap() == {}
    assert gnn.cap_(model, 100.0) == {}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_factors_are_what_was_scaled_by() -> None:
    model, twin = net(), net()
    with torch.no_grad():
        model[0].weight.mul_(10)
        twin[0].weight.mul_(10)
    for factors, capped in ((gnn.Cap(model, 3.0)(), model), (gnn.cap_(twin, 3.0), twin)):
        assert list(factors) == ["0"]
        assert 0 < factors["0"] < 1
        torch.testing.assert_close(capped[0].weight, 10 * net()[0].weight * factors["0"])
        assert gl.bound(capped[0], rtol=1e-3).upper == pytest.approx(3.0, rel=2e-2)
    assert gl.bound(twin[0]).upper <= 3.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_capped_weights_are_certified_in_their_own_dtype(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    assert set(gnn.cap_(model, 0.3, EXAMPLE.to(dtype), rtol=1e-3)) == set(LINEAR)
    sizes = {"0": 8, "2": 8, "3": 4, "5": None}
    assert all(gl.bound(model.get_submodule(path), size, rtol=width).upper <= 0.3 for path, size in sizes.items() for width in (1e-2, 1e-3))
    assert gnn.cap_(model, 0.3, EXAMPLE.to(dtype), rtol=1e-3) == {}


def test_a_shared_weight_is_scaled_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 3, padding=1))
    nn.init.normal_(model[0].weight)
    model[1].weight = model[2].weight = model[0].weight
    twin = copy.deepcopy(model)
    factors = gnn.Cap(model)()
    assert len(factors) == 3
    assert len(set(factors.values())) == 1
    for _ in range(3):
        gnn.Cap(model)()
    assert 0.98 <= max(gl.bound(layer, rtol=1e-3).upper for layer in model) <= 1.02
    assert len(set(gnn.cap_(twin).values())) == 1
    assert max(gl.bound(layer).upper for layer in twin) <= 1
    assert twin[0].weight is twin[1].weight


def test_padding_that_repeats_inputs_comes_below_the_target() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 2, 3, padding=1, padding_mode="replicate"))
    cap = gnn.Cap(model, 0.1, (2, 6, 6))
    for _ in range(5):
        cap()
    assert all(gl.bound(layer, 6, rtol=1e-3).lower <= 0.1 * 1.001 for layer in model)


def test_state_goes_on_where_it_was() -> None:
    model = net()
    cap = gnn.Cap(model, 0.5)
    cap()
    twin = gnn.Cap(copy.deepcopy(model), 0.5)
    twin.load_state_dict(cap.state_dict())
    assert twin() == cap()


def test_what_cannot_be_capped_is_refused_and_nothing_changed() -> None:
    normalised = nn.Sequential(nn.Linear(3, 3), gnn.spectral_norm(nn.Linear(3, 3)))
    pruned = nn.Sequential(nn.Linear(3, 3), prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5))
    for model in (normalised, pruned):
        with torch.no_grad():
            model[0].weight.mul_(100)
        for call in (gnn.Cap, gnn.cap_):
            with pytest.raises(gl.InputError, match=r"1\.weight is computed by"):
                call(model)
        assert gnn.cap_(model, where=lambda path, _: path == "0").keys() == {"0"}
    broken = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        broken[0].weight.mul_(100)
        broken[1].weight.fill_(math.nan)
    before = broken[0].weight.detach().clone()
    with pytest.raises(gl.InputError, match="nothing was capped"):
        gnn.cap_(broken)
    assert torch.equal(broken[0].weight, before)
    with pytest.raises(gl.InputError, match="all weights would be zero"):
        gnn.cap_(nn.Linear(4, 4).half(), 1e-8)
    with pytest.raises(gl.UnsupportedError, match="complex"):
        gnn.cap_(nn.Linear(2, 2, dtype=torch.complex64))
    for call in (gnn.Cap, gnn.cap_):
        with pytest.raises(gl.InputError, match="target=-1"):
            call(net(), -1)
        with pytest.raises(gl.InputError, match="has no layer"):
            call(nn.ReLU())


@pytest.mark.parametrize("call", [gnn.Cap, gnn.cap_, gnn.Monitor, gnn.LipschitzPenalty, gnn.spectral_norm_])
def test_what_no_rule_covers_is_named_where_the_model_was_given(call: object) -> None:
    model = nn.ModuleDict({"e": nn.Embedding(4, 4), "l": nn.Linear(3, 3)})
    with pytest.warns(UserWarning, match=r"^e\.weight: no linear") as caught:
        call(model)  # type: ignore[operator]
    assert caught[0].filename == __file__


def test_layers_far_below_the_target_are_read_in_turns_and_caught() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 4))
    with torch.no_grad():
        for layer, size in zip(model, (0.95, 0.1, 0.1), strict=True):
            layer.weight.mul_(size / torch.linalg.matrix_norm(layer.weight, 2))
    cap = gnn.Cap(model, target=1.0)
    assert cap() == {}
    with torch.no_grad():
        model[0].weight.mul_(1.1)
        model[1].weight.mul_(15.0)
    calls = [cap() for _ in range(TURNS)]
    assert "0" in calls[0]  # near the target: at once
    assert sum(found.get("1", 1.0) < 0.99 for found in calls) == 1  # what rounding leaves above the target is taken off at later calls
    assert all(gl.bound(layer).lower <= 1.0 + 1e-3 for layer in model)
