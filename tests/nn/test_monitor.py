"""The monitor: numbers to log, read without touching what is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gramlip as gl
from gramlip import nn as gnn


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.Flatten(), nn.Linear(384, 5))


def test_sigma_is_a_lower_estimate_that_follows_training() -> None:
    model, x = net(), torch.randn(8, 3, 8, 8)
    optimiser, monitor = torch.optim.Adam(model.parameters(), lr=1e-3), gnn.Monitor(model, (3, 8, 8), every=10)
    for _ in range(40):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
        found = monitor()
    assert list(found) == ["0", "2", "4"]
    for path, numbers in found.items():
        truth = gl.bound(model.get_submodule(path), rtol=1e-4)
        assert truth.lower * 0.99 <= numbers["sigma"] <= truth.upper * (1 + 1e-5)
        assert all(type(value) is float for value in numbers.values())


def test_stable_rank_of_a_matrix_and_of_a_circulant() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(192, 7))
    monitor = gnn.Monitor(model)
    for _ in range(30):
        found = monitor()
    weight = model[2].weight.detach()
    expected = (torch.linalg.matrix_norm(weight) / torch.linalg.matrix_norm(weight, 2)).square().item()
    assert found["2"]["stable_rank"] == pytest.approx(expected, rel=1e-3)
    # the operator on a large torus has its stable rank once at each of its points
    twin = copy.deepcopy(model[0])
    twin.bias = None
    basis = torch.eye(2 * 256).reshape(-1, 2, 16, 16)
    matrix = twin(basis).flatten(1).detach()
    per_point = (torch.linalg.matrix_norm(matrix) / gl.bound(twin, rtol=1e-4).upper).square().item() / 256
    assert found["0"]["stable_rank"] == pytest.approx(per_point, rel=1e-2)


def test_certify_gives_intervals_around_the_estimates() -> None:
    model = net()
    monitor = gnn.Monitor(model)
    sigmas, intervals = monitor(), monitor.certify(1e-3)
    assert list(intervals) == list(sigmas)
    assert all(sigmas[path]["sigma"] <= interval.upper for path, interval in intervals.items())
    assert intervals["0"].upper == gl.bound(model[0], rtol=1e-3).upper


@pytest.mark.parametrize("exact", [True, False])
def test_reading_changes_nothing(exact: bool) -> None:
    model = gnn.spectral_norm_(net(), exact=exact)
    model[4].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    monitor = gnn.Monitor(model)
    for _ in range(3):
        found = monitor()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(0.9 <= numbers["sigma"] <= 1.03 for numbers in found.values())


def test_any_scale_and_zero_and_dtype() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).half(), nn.Linear(4, 4).double()])
    with torch.no_grad():
        for layer, scale in zip(model, (1e30, 1e-30, 0.0, 1.0, 1.0), strict=True):
            layer.weight.copy_(scale * torch.eye(4))
    found = gnn.Monitor(model)()
    assert [round(found[str(i)]["stable_rank"], 4) for i in (0, 1, 3, 4)] == [4.0] * 4
    assert found["2"]["sigma"] == 0.0
    assert found["0"]["sigma"] == pytest.approx(1e30)


def test_a_constructor_that_moves_nothing_and_refusals() -> None:
    with pytest.raises(gl.InputError, match="every=0"):
        gnn.Monitor(net(), every=0)
    with pytest.raises(gl.InputError, match="has no layer"):
        gnn.Monitor(nn.ReLU())
    with pytest.raises(gl.UnsupportedError, match="Monitor"):
        gnn.Monitor(nn.Linear(2, 2, dtype=torch.complex64))
    assert list(gnn.Monitor(net(), where=lambda path, _: path == "4")()) == ["4"]


def test_certificates_in_turns_and_what_is_written() -> None:
    class Writer:
        def __init__(self) -> None:
            self.rows: list[tuple[str, float, int]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.rows.append((name, value, step))

    monitor, writer = gnn.Monitor(net(), (3, 8, 8), certify_every=2), Writer()
    assert set(monitor()["0"]) == {"sigma", "stable_rank"}
    written = monitor.log(writer, step=3)
    assert writer.rows == [(name, value, 3) for name, value in written.items()]
    assert set(written) == {f"{name}/{path}" for path in "024" for name in ("sigma", "stable_rank", "lower", "upper")}
    assert written["upper/2"] == gl.bound(monitor._tracked[1], (8, 8)).upper
    calls = int(monitor.calls)
    with pytest.raises(gl.InputError, match="of type int was given; expected a SummaryWriter"):
        monitor.log(3, step=4)
    assert int(monitor.calls) == calls  # nothing was read
    with pytest.raises(gl.InputError, match="certify_every=0"):
        gnn.Monitor(net(), certify_every=0)


def test_callbacks_name_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gnn.monitor, "find_spec", lambda name: None)
    for verb, package in ((gnn.monitor._lightning_monitor, "lightning"), (gnn.monitor._trainer_monitor, "transformers")):
        with pytest.raises(gl.InputError, match=f"type pip install {package}"):
            verb.__wrapped__()
    with pytest.raises(AttributeError, match="no attribute 'KerasMonitor'"):
        gnn.KerasMonitor  # noqa: B018
