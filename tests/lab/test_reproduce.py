"""`gramlip reproduce` and `gramlip compare`: whole files, resumed exactly, refused clearly."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gramlip.cli import main
from gramlip.errors import InputError
from gramlip.lab.layer_experiments import EXPERIMENTS, convolutions
from gramlip.lab.recipes import MODELS, RECIPES
from gramlip.lab.reproduce import PRESETS, Options, Task, preset, reproduce
from gramlip.norm.methods import METHODS

pytest.importorskip("lightning", reason="the extra gramlip[train]", exc_type=ImportError)
from gramlip.lab import train as run

QUICK = Options(trials=1, quick=True)
PNG = b"\x89PNG\r\n\x1a\n"


pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning")  # its own use of what torch has deprecated


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small network of the training experiment as one that is audited in no time."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 4, 4, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10, bias=False))

    monkeypatch.setitem(MODELS, "small", make)


def quick(name: str, cifar: Path) -> Options:
    return replace(QUICK, data=str(cifar)) if name == "training" else QUICK


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment(name: str, tmp_path: Path, cifar: Path) -> None:
    options = quick(name, cifar)
    files = reproduce(EXPERIMENTS[name], tmp_path / "new", options)
    assert sorted(path.name for path in (tmp_path / "new").iterdir() if path.is_file()) == sorted(files)
    assert files["figure.png"].read_bytes().startswith(PNG)
    assert "| --- |" in files["summary.md"].read_text()
    header = json.loads(files["run.json"].read_text())
    assert {"device", "torch", "threads", "trials", "warm_up_dropped", "seed"} <= set(header)
    rows = table(tmp_path / "new")
    assert len({row["task"] for row in rows}) == len(EXPERIMENTS[name].tasks(options))
    before = files["results.csv"].read_bytes()

    def nothing_left(tasks: list[Task]) -> list[Task]:
        assert tasks == []
        return tasks

    reproduce(EXPERIMENTS[name], tmp_path / "new", options, nothing_left)
    assert files["results.csv"].read_bytes() == before


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    def stopped(tasks: list[Task]) -> Iterator[Task]:
        yield from tasks[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(EXPERIMENTS["dense"], tmp_path / "part", QUICK, stopped)
    first = table(tmp_path / "part")
    assert len(first) == 3
    assert not (tmp_path / "part" / "figure.png").exists()
    reproduce(EXPERIMENTS["dense"], tmp_path / "part", QUICK)
    reproduce(EXPERIMENTS["dense"], tmp_path / "whole", QUICK)
    part, whole = table(tmp_path / "part"), table(tmp_path / "whole")
    assert part[:3] == first
    assert [row | {"seconds": ""} for row in part] == [row | {"seconds": ""} for row in whole]


@pytest.mark.parametrize("name", ["results.csv", "figure.png", "summary.md"])
def test_a_folder_of_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"stands there without its run\.json"):
        reproduce(EXPERIMENTS["dense"], tmp_path, QUICK)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


def test_training_goes_on_within_a_network(tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the middle of a network goes on from its last epoch, and ends as the whole run does."""
    options = quick("training", cifar)
    reproduce(EXPERIMENTS["training"], tmp_path / "whole", options)
    train = run.train
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda *args, **changes: train(*args, **changes, stop_after=1))
        with pytest.raises(InputError, match="stopped after 1 of 2 epochs"):
            reproduce(EXPERIMENTS["training"], tmp_path / "parts", options)
    assert not (tmp_path / "parts" / "results.csv").exists()
    reproduce(EXPERIMENTS["training"], tmp_path / "parts", options)
    whole, parts = table(tmp_path / "whole"), table(tmp_path / "parts")
    assert [row | {"seconds": ""} for row in parts] == [row | {"seconds": ""} for row in whole]
    assert {row["control"] for row in whole if row["kind"] == "end"} == {"plain", "gram", "penalised", "normalised"}
    for row in whole:
        if row["kind"] == "end":
            assert float(row["lower"]) <= float(row["upper"])
            assert float(row["certified 0.1412"]) <= float(row["accuracy"])


def test_training_is_the_papers_on_a_gpu_and_small_on_a_cpu(cifar: Path, tmp_path: Path) -> None:
    assert preset(Options()) == "small"
    assert preset(Options(torch.device("cuda"))) == "paper"
    assert preset(Options(preset="paper")) == "paper"
    assert [PRESETS["paper"], {n for n in RECIPES if n.startswith("resnet18")}] == [
        ("resnet18", {}),
        {"resnet18", "resnet18-gram", "resnet18-penalised", "resnet18-normalised"},
    ]
    with pytest.raises(InputError, match="type --data DIR"):
        EXPERIMENTS["training"].tasks(Options())
    with pytest.raises(InputError, match=r"holds no train-\*\.parquet"):
        reproduce(EXPERIMENTS["training"], tmp_path / "new", Options(data=str(tmp_path)))
    assert not (tmp_path / "new").exists()
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="type --device cpu"):
            EXPERIMENTS["training"].tasks(Options(torch.device("cuda"), data=str(cifar)))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(InputError, match="cannot be made"):
            reproduce(EXPERIMENTS["dense"], place, QUICK)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    reproduce(EXPERIMENTS["dense"], tmp_path, QUICK)
    with pytest.raises(InputError, match="another seed; expected the same"):
        reproduce(EXPERIMENTS["dense"], tmp_path, Options(trials=1, quick=True, seed=1))
    with pytest.raises(InputError, match="another experiment"):
        reproduce(EXPERIMENTS["scaling"], tmp_path, QUICK)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match=r"without its run\.json"):
        reproduce(EXPERIMENTS["dense"], tmp_path, QUICK)


def test_resnet18_is_torchvisions() -> None:
    shapes = convolutions()
    assert len(shapes) == 20
    assert sum(a * b * c * d for _, (a, b, c, d), _, _ in shapes) == 11_166_912
    assert [n for name, _, _, n in shapes if "downsample" in name] == [56, 28, 14]
    assert shapes[-1] == ("layer4.1.conv2.weight", (512, 512, 3, 3), 1, 7)


def test_resnet18_with_given_weights(tmp_path: Path) -> None:
    weights = {name: torch.full(shape, 0.01) for name, shape, _, _ in convolutions()[:2]}
    save_file(weights, tmp_path / "weights.safetensors")
    options = Options(trials=1, quick=True, weights=tmp_path / "weights.safetensors")
    reproduce(EXPERIMENTS["resnet18"], tmp_path / "run", options)
    assert {row["weights"] for row in table(tmp_path / "run")} == {"given"}
    weights["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight of shape \(64, 64, 1, 1\); expected \(64, 64, 3, 3\)"):
        reproduce(EXPERIMENTS["resnet18"], tmp_path / "other", options)
    with pytest.raises(InputError, match="leave --weights out"):
        reproduce(EXPERIMENTS["dense"], tmp_path / "dense", options)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "scaling", "--quick", "--trials", "1", "--out", str(tmp_path)]) == 0
    assert "input size" in capsys.readouterr().out
    for arguments in (["reproduce", "nothing"], ["reproduce", "dense", "--trials", "0"], ["reproduce", "dense", "--device", "tpu"]):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    kernel, matrix = torch.randn(3, 2, 3, 3, generator=generator), torch.randn(4, 5, generator=generator)
    save_file({"conv.weight": kernel, "fc.weight": matrix, "zero.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_compare(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(weights), "--trials", "1", "--circular", "6", "--plot", str(tmp_path / "plot.png"), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in found["rows"]} == set(METHODS)
    assert all(row["value"] is not None for row in found["rows"])
    for row in found["rows"]:
        if row["side"] in ("upper", "interval"):
            assert row["value"] >= row["certified"]["lower"] * (1 - 1e-5)
        if row["side"] == "lower":
            assert row["value"] <= row["certified"]["upper"] * (1 + 1e-5)
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_compare_of_what_overflows(tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    """Infinity is null in JSON and has no error in the table; a name with dollars is no formula."""
    file, plot = tmp_path / "we$ird^{$x_.safetensors", tmp_path / "plot.png"
    save_file({"w": torch.full((4, 4), 1e308, dtype=torch.float64)}, file)
    arguments = ["compare", str(file), "--trials", "1", "--methods", "certify,gram"]
    assert main([*arguments, "--json", "-", "--plot", str(plot)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["value"], row["error"], row["certified"]["upper"]) for row in rows] == [(None, None, None)] * 2
    assert plot.read_bytes().startswith(PNG)
    assert main(arguments) == 0
    assert "nan" not in capsys.readouterr().out
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]


def test_compare_says_what_is_not_valid(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(weights), "--trials", "1", "--methods", "certify,power,sedghi2019,power"]) == 0
    text = capsys.readouterr().out
    assert "certify: its upper side at the width that gramlip.bound asks for by default, 1e-2" in text
    assert text.count("power ") == 4  # once for each of three layers, and once in all
    assert text.count("not valid here") == 2
    assert main(["compare", str(weights), "--methods", "guess"]) == 2
    assert "method='guess' is unknown" in capsys.readouterr().err
    for nothing in ("", ",", "gram,"):
        assert main(["compare", str(weights), "--methods", nothing]) == 2
        assert "expected names joined by commas" in capsys.readouterr().err
    assert main(["compare", str(weights), "--plot", "x.txt", "--methods", "torch"]) == 2
    assert "expected a name that ends in" in capsys.readouterr().err


def test_documents_hold_what_the_results_say() -> None:
    root = Path(__file__).parent.parent.parent
    script = root / "experiments" / "reproduction_tables.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
    for name in EXPERIMENTS:
        assert f"<!-- results: {name} -->" in (root / "docs" / "reproduction.md").read_text()
