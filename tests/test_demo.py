"""The networks that ship with the package: small, whole, as their logs say, and the penalty shows in their norms."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from safetensors import safe_open
from torch import nn

import gramlip as gl
from gramlip.demo import DemoNet, demo, demo_regularised
from gramlip.targets import resolve

NETS = {"demo": demo, "demo-regularised": demo_regularised}
DATA = resources.files("gramlip") / "data"


def metadata(name: str) -> dict[str, str]:
    with safe_open(str(DATA / f"{name}.safetensors"), framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", NETS)
def test_weights_are_small_whole_and_float32(name):
    assert len((DATA / f"{name}.safetensors").read_bytes()) < 1_000_000
    net = NETS[name]()
    assert isinstance(net, DemoNet)
    assert not net.training
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters())
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", NETS)
def test_the_log_and_the_metadata_are_of_one_run(name):
    said, log = metadata(name), (DATA / f"{name}.log").read_text()
    assert log.startswith(f"{name}: ")
    assert log.endswith(f"test accuracy {said['test_accuracy']}\n")
    assert log.count("epoch ") == int(said["epochs"])
    assert f"seed {said['seed']}" in log
    assert f"penalty {said['penalty']}" in log
    assert said["architecture"] == "gramlip.demo:DemoNet"


def test_both_classify():
    assert all(float(metadata(name)["test_accuracy"]) > 0.7 for name in NETS)


@pytest.mark.parametrize("name", NETS)
def test_an_audit_bounds_every_layer_of_the_network(name):
    layers = {f"{path}.weight" for path, m in NETS[name]().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    kept, left_out = resolve(name).sort()
    assert set(kept) == layers
    assert not any(out.is_weight for out in left_out)


def test_the_penalty_lowered_each_norm_that_was_above_one():
    plain, regularised = demo(), demo_regularised()
    for path, module in plain.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            before, after = gl.bound(module), gl.bound(regularised.get_submodule(path))
            assert after.upper < before.lower or before.upper < 1.0, path
