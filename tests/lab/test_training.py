"""Recipes: a run that is interrupted ends where the whole run does, and what comes out is certified."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gramlip as gl
from gramlip import cli

lightning = pytest.importorskip("lightning", reason="the extra gramlip[train]", exc_type=ImportError)

from gramlip.cli.lab import parts  # noqa: E402
from gramlip.lab import recipes  # noqa: E402
from gramlip.lab import train as run  # noqa: E402
from gramlip.lab.recipes import (  # noqa: E402
    MODELS,
    RECIPES,
    Denoiser,
    build,
    small,
)
from gramlip.lab.train import Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning")  # its own use of what torch has deprecated
FOREIGN = """
from torch import nn
from gramlip.lab.recipes import small
def leaves(): raise SystemExit(3)
class Alone(nn.Module):
    def forward(self, x):
        if len(x) != 1: raise RuntimeError("one at a time\\nmore")
        return x.flatten(1)
def loud():
    print("from the callable")
    return small()
"""
TINY = {"epochs": 2, "samples": 48, "test_samples": 16, "batch": 16}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small recipes with networks that are audited in no time."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 4, 4, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10, bias=False))

    monkeypatch.setitem(MODELS, "small", make)
    monkeypatch.setattr(recipes, "small", make)
    monkeypatch.setattr(recipes, "Denoiser", partial(Denoiser, width=4))


def train(name: str, cifar: Path, out: Path, **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        return run.train(name, cifar, out, **{**TINY, **options})


@pytest.mark.parametrize("name", ["small-penalised", "small-normalised"])
def test_an_interrupted_run_ends_as_the_whole_run(name: str, cifar: Path, tmp_path: Path) -> None:
    whole = train(name, cifar, tmp_path / "whole")
    first = train(name, cifar, tmp_path / "parts", stop_after=1)
    assert first["finished_epochs"] == 1
    assert not (tmp_path / "parts" / "results.json").exists()
    second = train(name, cifar, tmp_path / "parts")
    left, right = (load_file(tmp_path / part / "weights.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(left[k], right[k]) for k in left)
    timed = {"seconds", "step_cpu_seconds"}
    assert {k: v for k, v in whole.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}
    header = (tmp_path / "whole" / "logs" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "accuracy", "upper/0", "upper_product"} <= set(header)


def test_a_run_that_dies_goes_on_from_its_last_epoch(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("small-penalised", cifar, tmp_path / "whole", epochs=3)
    step, calls = Task.training_step, []

    def dies(self: Task, batch: Any, index: int) -> torch.Tensor:
        calls.append(index)
        if len(calls) == 5:  # the second of the second epoch's three steps
            raise SystemExit
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "training_step", dies)
        with pytest.raises(SystemExit):
            train("small-penalised", cifar, tmp_path / "parts", epochs=3)
    assert torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)["global_step"] == 3
    again = train("small-penalised", cifar, tmp_path / "parts", epochs=3)
    left, right = (load_file(tmp_path / part / "weights.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert again["constant"] == whole["constant"]
    logs = [(tmp_path / part / "logs" / "metrics.csv").read_text() for part in ("whole", "parts")]
    assert logs[0] == logs[1]  # nothing is lost, and nothing is there twice


@pytest.mark.parametrize(
    "name", [n for n, r in RECIPES.items() if r.model != "resnet18" and n not in ("small-penalised", "small-normalised")]
)
def test_every_small_recipe_ends_certified(name: str, cifar: Path, tmp_path: Path) -> None:
    results = train(name, cifar, tmp_path / "run", epochs=1)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["constant"]["lower"] <= results["constant"]["upper"]
    if name.endswith("rescaled"):
        assert results["constant"]["upper"] <= 1.0
    if results["task"] == "classify":
        shares = [entry["accuracy"] for entry in results["certified_by_pairs"]]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] <= results["clean"]


def test_the_small_classifier_and_the_denoiser_in_full_size() -> None:
    """The other tests replace both by smaller networks."""
    images = torch.zeros(2, 3, 32, 32)
    assert small()(images).shape == (2, 10)
    assert Denoiser()(images).shape == images.shape


def test_resnet18_has_twenty_convolutions_and_takes_every_control() -> None:
    net = build("resnet18", "plain")
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 20
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert {r.control for n, r in RECIPES.items() if n.startswith("resnet18")} == {"plain", "penalised", "gram", "normalised"}
    assert (RECIPES["resnet18"].epochs, RECIPES["resnet18"].batch, RECIPES["resnet18"].lr, RECIPES["resnet18"].momentum) == (
        200,
        256,
        0.1,
        0.9,
    )


def test_order_and_augmentation_are_functions_of_seed_and_step() -> None:
    order = recipes.Order(10, 3)
    first = list(order)
    order.set_epoch(1)
    assert sorted(order) == list(range(10))
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first
    images = torch.rand(4, 3, 8, 8)
    moved = [recipes.augmented(images, recipes.generator(0, step)) for step in (1, 1, 2)]
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    centre = recipes.augmented(images, recipes.generator(0, 1), pad=0)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(centre, images, strict=True))


def test_command_line(cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = [part for k, v in {**TINY, "epochs": 1}.items() for part in ("--set", f"{k}={v}")]
    assert cli.main(["train", "small-normalised", "--data", str(cifar), "--out", str(out), *options]) == 0
    results = json.loads(capsys.readouterr().out)
    assert cli.main(["certify", str(out), "--data", str(cifar), "--samples", "16", "--json", "-", "--attack", "--eps", "36/255", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clean"] == results["clean"]
    assert [entry["eps"] for entry in found["certified"]] == [36 / 255, 1.0]
    assert all(entry["accuracy"] <= entry["attacked"] for entry in found["certified"])
    assert found["certified"][0]["accuracy"] == results["certified_by_pairs"][0]["accuracy"]
    assert cli.main(["certify", "gramlip.lab.recipes:small", "--data", str(cifar), "--samples", "4", "--eps", "0.1"]) == 0
    assert "certified at eps" in capsys.readouterr().out
    near = ["certify", str(out), "--data", str(cifar), "--samples", "3", "--eps", "1e-4", "10", "--no-executed", "--json", "-"]
    shares = []
    for options in ([], ["--local"]):
        assert cli.main([*near, *options]) == 0
        read = json.loads(capsys.readouterr().out)
        shares.append([entry["accuracy"] for entry in read["certified"]])
    assert "around each input" in read["because"]
    assert all(a <= b <= read["clean"] for a, b in zip(*shares, strict=True))


def test_rows_of_the_last_layer_count_only_in_a_plain_chain() -> None:
    """A chain with a forward of its own, which divides its logits by a temperature, would be certified to radii that are too large."""

    class Cold(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 0.01

    layers = [nn.ReLU(), nn.Linear(2, 2)]
    hooked = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    hooked[1].register_forward_hook(lambda module, given, result: 10 * result)
    for model in (Cold(*layers), hooked, nn.ReLU(), nn.Sequential()):
        assert parts(model) == (model, None)
    body, last = parts(nn.Sequential(*layers))
    assert (len(list(body.children())), last) == (1, layers[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "large", "--data", "CIFAR", "--out", "OUT"], "recipe 'large' is unknown"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--set", "epoch=1"], "['epoch'] were given"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--set", "epochs"], "expected FIELD=VALUE"),
        (["train", "small", "--data", "OUT", "--out", "OUT"], "holds no train-*.parquet"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--set", "control=fast"], "control='fast' was given; expected one of plain"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--set", "batch=0"], "batch=0 was given; expected a whole number"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--set", "lr=high"], "lr='high' was given; expected a positive number"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--set", "task=denoise"], "expected model='denoiser'"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--set", "samples=32"], "32 training images were given with batch=128"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--seed", "-1"], "'-1' was given; expected a whole number of at least 0"),
        (["train", "small", "--data", "CIFAR", "--out", ""], "an empty name was given; expected a folder"),
        (["train", "small", "--data", "CIFAR", "--out", "BROKEN"], "recipe.json is damaged"),
        (["certify", "BROKEN", "--data", "CIFAR", "--json", "RECIPE"], "exists and was not written by --json"),
        (["train", "small", "--data", "CIFAR", "--out", "OUT", "--set", "augment=1"], "augment=1 was given; expected true or false"),
        (["certify", "BROKEN", "--data", "CIFAR"], "expected a folder that gramlip train finished"),
        (["certify", ":small", "--data", "CIFAR"], "finished, a file of ONNX, or package.module:callable"),
        (["certify", "gramlip.lab.recipes:build", "--data", "CIFAR"], "build() missing"),
        (["certify", "gramlip.lab.recipes:small", "--data", "CIFAR", "--samples", "0"], "a whole number of at least 1"),
        (["certify", "gramlip.lab.recipes:small", "--data", "CIFAR", "--local", "0.1"], "unrecognized arguments: 0.1"),
        (["certify", "nowhere", "--data", "CIFAR"], "expected a folder that gramlip train finished"),
        (["certify", "gramlip:nothing", "--data", "CIFAR"], "expected package.module:callable"),
        (["certify", "gramlip.lab.recipes:small", "--data", "CIFAR", "--eps", "-1"], "expected a radius of at least 0"),
        (["certify", "gramlip.lab.recipes:small", "--data", "CIFAR", "--eps", "1e400"], "expected a radius of at least 0"),
        (["certify", "foreign:Alone", "--data", "CIFAR"], "Alone raised RuntimeError (one at a time) for images of shape (32, 3, 32, 32)"),
        (["certify", "foreign:leaves", "--data", "CIFAR"], "raised SystemExit (3)"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"CIFAR": str(cifar), "OUT": str(tmp_path / "out"), "BROKEN": str(tmp_path), "RECIPE": str(tmp_path / "recipe.json")}
    (tmp_path / "weights.safetensors").write_text("x")
    (tmp_path / "recipe.json").write_text("[")
    (tmp_path / "foreign.py").write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)
    assert cli.main([names.get(a, a) for a in arguments]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_certify_writes_json_alone_whatever_the_callable_prints(
    cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign.py").write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["certify", "foreign:loud", "--data", str(cifar), "--samples", "4", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["count"] == 4
    assert "from the callable" in shown.err


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    monkeypatch.setenv("GRAMLIP_GONE", "here")
    before = dict(os.environ)
    with run._global_state_kept():
        os.environ.update(PL_GLOBAL_SEED="6", GRAMLIP_NEW="1")
        del os.environ["GRAMLIP_GONE"]
    assert dict(os.environ) == before


def test_a_run_that_has_ended_stays_as_it_is(cifar: Path, tmp_path: Path) -> None:
    results = train("small", cifar, tmp_path, epochs=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert train("small", cifar, tmp_path, epochs=1) == results
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_a_damaged_checkpoint_is_one_line(cifar: Path, tmp_path: Path) -> None:
    train("small", cifar, tmp_path, stop_after=1)
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(gl.InputError, match=r"last\.ckpt is damaged .*: type rm .* to start the run again") as caught:
        train("small", cifar, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_holds_one_run(cifar: Path, tmp_path: Path) -> None:
    train("small", cifar, tmp_path, epochs=1)
    with pytest.raises(gl.InputError, match="differs in \\['epochs'\\]"):
        train("small", cifar, tmp_path)


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_has_its_own_exit_code_and_the_run_goes_on(
    number: int, code: int, said: str, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signalled(Task):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                signal.raise_signal(number)

    options = [part for k, v in {**TINY, "epochs": 3}.items() for part in ("--set", f"{k}={v}")]
    line = ["train", "small", "--data", str(cifar), "--out", str(tmp_path / "run"), *options]
    with monkeypatch.context() as patch:
        patch.setattr(run, "Task", Signalled)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        try:
            assert cli.main(line) == code
        finally:
            signal.signal(signal.SIGINT, before)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.endswith(f"gramlip: {said}\n")  # after what was drawn of the progress bar
    assert (tmp_path / "run" / "last.ckpt").exists()
    assert not (tmp_path / "run" / "results.json").exists()
    assert cli.main(line) == 0
    assert json.loads(capsys.readouterr().out)["finished_epochs"] == 3


@pytest.mark.parametrize("name", run.WRITTEN)
def test_a_folder_of_something_else_is_left_alone(name: str, cifar: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(gl.InputError, match=r"stands there without its recipe\.json"):
        train("small", cifar, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


def test_certify_writes_over_no_image(cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(cifar, tmp_path / "images")
    file = next((tmp_path / "images").glob("test-*"))
    before = file.read_bytes()
    line = ["certify", "gramlip.lab.recipes:small", "--data", str(file.parent), "--samples", "4", "--json", str(file)]
    assert cli.main(line) == 2
    assert "exists and was not written by --json" in capsys.readouterr().err
    assert file.read_bytes() == before
    report = str(tmp_path / "report.json")
    assert [cli.main([*line[:-1], report]) for _ in range(2)] == [0, 0]


def picture(size: int, cut: int | None = None) -> dict[str, Any]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, "png")
    return {"bytes": buffer.getvalue()[:cut], "path": None}


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([picture(32, 60)], [1], r"test-0\.parquet: image 0 cannot be read \(.*\); expected a PNG or JPEG"),
        ([picture(32), {"bytes": b"no picture", "path": None}], [1, 2], r"image 1 cannot be read \(.*\); expected a PNG or JPEG"),
        ([picture(32), None], [1, 2], "image 1 cannot be read"),
        ([picture(16)], [1], r"image 0 has 16x16 pixels; expected 32x32"),
        ([picture(32)], [None], r"test-0\.parquet holds the label None; expected integers from 0 to 9"),
        ([picture(32)], ["cat"], "holds the label 'cat'; expected integers"),
        ([picture(32)], [77], "holds the label 77; expected integers"),
        ([], [], r"holds no image in its test files"),
    ],
)
def test_images_that_cannot_be_used_are_one_line(images: list[Any], labels: list[Any], message: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"img": images, "label": labels}), tmp_path / "test-0.parquet")
    with pytest.raises(gl.InputError, match=message) as caught:
        recipes.load(tmp_path, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 500, -10])
def test_damaged_files_of_images_are_one_line(kept: int, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in cifar.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:kept])
    line = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for command in (["train", "small", *line], ["certify", "gramlip.lab.recipes:small", *line[:2]]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert "parquet cannot be read as parquet (" in error
        assert error.count("\n") == 1


def test_images_from_the_hubs_cache(hub_cache: Callable[[str, str], Path], cifar: Path) -> None:
    with pytest.raises(gl.InputError, match=r"uoft-cs/cifar10 cannot be fetched: .*; expected a public repository, online or in the cache"):
        recipes.load("uoft-cs/cifar10", "train")
    shutil.copytree(cifar, hub_cache("dataset", "uoft-cs/cifar10") / "plain_text")
    for found, local in zip(recipes.load("uoft-cs/cifar10", "train"), recipes.load(cifar, "train"), strict=True):
        assert torch.equal(found, local)
