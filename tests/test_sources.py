"""TARGETs that are models: callables, exported programs, and libraries by local stand-ins; one line where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gramlip.cli import main
from gramlip.errors import InputError
from gramlip.network.audit import audit
from gramlip.targets import resolve

SOURCE = """
import os
from torch import nn
def make(): return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
def half(): return make().half()
def number(): return 3
def needs(argument): return argument
def breaks(): raise RuntimeError("no such thing\\nmore")
def leaves(): raise SystemExit(3)
class Nothing(nn.Module):
    def forward(self, x): return None
class Number(nn.Module):
    def forward(self, x): return 3
class Empty(nn.Module):
    def forward(self, x): return ()
class Leaves(nn.Module):
    def forward(self, x): raise SystemExit(3)
class Chooses(nn.Module):
    def forward(self, x): return x if x.sum() > 0 else 2 * x
class Loud(nn.Module):
    def forward(self, x):
        print("from the model")
        return 2 * x
def loud():
    print("from the callable")
    os.system("echo from a child")
    return Loud()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mymodels.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    return tmp_path


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())


def test_a_callable_is_audited_with_json_and_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["audit", "mymodels:make", "--input", "4", "--json", "r.json", "--html", "r.html", "--domain", "0,1", "--effort", "0"]
    assert main(arguments) == 0
    found = json.loads((folder / "r.json").read_text())
    assert 0 < found["network"]["lower"] <= found["network"]["upper"]
    assert "doctype html" in (folder / "r.html").read_text()
    assert "network" in capsys.readouterr().out
    assert main([*arguments[:4], "--fail-above", "1e-9"]) == 1


def test_a_shape_on_the_command_line_takes_the_models_dtype(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "mymodels:half", "--input", "4", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["network"]["upper"] > 0


def test_an_effort_is_what_the_library_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "mymodels:make", "--input", "4", "--effort", "-1", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["network"]["because"]
    model = resolve("mymodels:make", (4,)).program
    assert found == audit(model, (4,), effort=-1.0).network.because


def test_standard_output_is_json_alone_whatever_the_model_prints(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "mymodels:loud", "--input", "4", "--effort", "0", "--json", "-"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["network"]["upper"] >= 2.0
    assert all(text in shown.err for text in ("from the callable", "from a child", "from the model"))
    print("after it")
    assert capfd.readouterr().out == "after it\n"


@pytest.mark.parametrize(
    ("closed", "arguments", "code"),
    [
        (">&-", ["mymodels:loud"], 0),
        ("2>&-", ["mymodels:loud"], 0),
        ("2>/dev/full", ["mymodels:make", "--fail-above", "0"], 1),
        ("2>/dev/full", ["mymodels:breaks"], 2),
    ],
)
def test_streams_that_are_closed_or_full_leave_the_exit_code_as_it_is(folder: Path, closed: str, arguments: list[str], code: int) -> None:
    line = [sys.executable, "-m", "gramlip", "audit", *arguments, "--input", "4", "--effort", "0"]
    assert subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *line], capture_output=True, check=False).returncode == code


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mymodels:make"], "type --input"),
        (["mymodels:nothing", "--input", "4"], "expected package.module:callable"),
        (["mymodels:number", "--input", "4"], "expected a torch.nn.Module"),
        (["mymodels:needs", "--input", "4"], "without arguments"),
        (["mymodels:breaks", "--input", "4"], "raised RuntimeError (no such thing) at "),
        (["mymodels:leaves", "--input", "4"], "raised SystemExit (3) at "),
        (["mymodels:Leaves", "--input", "4"], "expected a model that torch.export takes: 3"),
        (["mymodels:Nothing", "--input", "4"], "Nothing returns no tensor; expected"),
        (["mymodels:Number", "--input", "4"], "Number returns no tensor; expected"),
        (["mymodels:Empty", "--input", "4"], "Empty returns no tensor; expected"),
        (["mymodels:Chooses", "--input", "4"], "expected a model that torch.export takes: Could not guard"),
        (["mymodels:make", "--input", "999999999,999999999"], "expected what fits into memory"),
        (["junk.pt2"], "expected a file that torch.export.save wrote"),
        (["nowhere.at.all:make", "--input", "4"], "unknown kind"),
        (["mymodels:make", "--input", "7"], "expected a model that torch.export takes"),
        (["mymodels:make", "--input", "4", "--domain", "1,0"], "the lower first"),
        (["mymodels:make", "--input", "4", "--assume", "x"], "expected a name and a constant"),
        (["mymodels:make", "--input", "4", "--assume", "x=1"], "expected names of modules"),
        (["demo", "--domain", "0,1"], "weights alone"),
        (["timm:resnet18"], "pip install timm"),
        (["torchvision:resnet18"], "pip install torchvision"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "junk.pt2").write_bytes(b"junk")
    for name in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["audit", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert expected in shown.err
    assert shown.err.count("\n") == 1


def test_an_exported_program(tmp_path: Path) -> None:
    file = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(small().eval(), (torch.zeros(1, 3, 6, 6),)), file)
    source = resolve(str(file))
    report = source.audit(rtol=1e-2, watch=iter)
    assert 0 < report.lower <= report.upper
    assert [name for name, _ in source.operators()] == ["0"]
    with pytest.raises(InputError, match="expected no --input"):
        resolve(str(file), (3, 6, 6))
    bad = tmp_path / "bad.pt2"
    torch.save({"w": torch.eye(2)}, bad)
    with pytest.raises(InputError, match=r"torch\.export\.save") as caught:
        resolve(str(bad))
    assert "warnings" not in str(caught.value)
    bad.write_bytes(b"not a program")
    with pytest.raises(InputError, match=r"torch\.export\.save"):
        resolve(str(bad))


def test_warnings_as_errors_leave_an_audit_as_it_is(folder: Path) -> None:
    line = [sys.executable, "-W", "error", "-m", "gramlip", "audit", "mymodels:make", "--input", "4", "--effort", "0"]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_what_is_no_file_is_no_program(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt2")
    (tmp_path / "folder.pt2").mkdir()
    for name, message in (("pipe", "a pipe or a device"), ("folder", "is a folder")):
        with pytest.raises(InputError, match=message):
            resolve(str(tmp_path / f"{name}.pt2"))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.fc = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.e(x))


def exported(model: nn.Module, example: torch.Tensor, folder: Path) -> str:
    torch.export.save(torch.export.export(model.eval(), (example,)), folder / "m.pt2")
    return str(folder / "m.pt2")


def test_an_exported_program_of_words_has_no_constant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = exported(Words(), torch.zeros(1, 3, dtype=torch.int64), tmp_path)
    assert main(["audit", file, "--assume", "e=1.0"]) == 2
    error = capsys.readouterr().err
    assert "input 0 of shape (1, 3) has entries of torch.int64" in error
    assert error.count("\n") == 1
    assert [name for name, _ in resolve(file).operators()] == ["fc"]


def test_an_exported_program_is_given_inputs_of_its_own_type(tmp_path: Path) -> None:
    file = exported(nn.Linear(4, 2).bfloat16(), torch.zeros(1, 4, dtype=torch.bfloat16), tmp_path)
    assert [tensor.dtype for tensor in resolve(file).example] == [torch.bfloat16]


def test_timm_and_torchvision_by_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = types.ModuleType("timm")

    def create_model(name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        if name != "small":
            msg = f"Unknown model ({name})"
            raise RuntimeError(msg)
        model = small()
        model.default_cfg = {"input_size": (3, 6, 6)}  # type: ignore[assignment]
        return model

    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert resolve("timm:small").audit(rtol=1e-2, watch=iter).upper > 0
    with pytest.raises(InputError, match="Unknown model"):
        resolve("timm:large")
    vision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    models.get_model = lambda name, weights: small()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    assert resolve("torchvision:small", (3, 5, 5)).audit(rtol=1e-2, watch=iter).upper > 0


def test_the_hub_by_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"fc.weight": torch.eye(3)}, tmp_path / "model.safetensors")
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(repository: str, repo_type: str, allow_patterns: list[str]) -> str:
        if repository != "owner/small":
            msg = "offline"
            raise ConnectionError(msg)
        return str(tmp_path)

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve("hf:owner/small").audit(rtol=1e-2, watch=iter).layers[0].upper >= 1.0
    with pytest.raises(InputError, match="offline; expected a public repository"):
        resolve("hf:owner/large")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is a folder without weights"):
        resolve("hf:owner/small")


def test_the_hub_by_its_cache(hub_cache: Callable[[str, str], Path]) -> None:
    save_file({"fc.weight": 2 * torch.eye(3)}, hub_cache("model", "owner/small") / "model.safetensors")
    assert resolve("hf:owner/small").audit(rtol=1e-2, watch=iter).layers[0].lower <= 2.0
    with pytest.raises(InputError, match=r"hf:owner/large cannot be fetched: .*; expected a public repository, online or in the cache"):
        resolve("hf:owner/large")
