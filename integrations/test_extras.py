"""Each extra of the package, installed alone: its packages come with it, and what needs it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = sorted(set(metadata("gramlip").get_all("Provides-Extra", [])) - {"dev", "docs", "integrations"})
USES = {
    "attack": "import gramlip as gl, torch as t; gl.robust.attacked_accuracy(t.nn.Linear(2, 2), [(t.zeros(1, 2), t.tensor([0]))], 0.5)",
    "data": "from gramlip.lab import recipes; import pyarrow, PIL",
    "hub": "from gramlip.targets import snapshot; import huggingface_hub",
    "plots": "from gramlip.reports.pictures import figure; figure()",
    "train": "from gramlip.lab import train",
}


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def packages(python: Path) -> str:
    return run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()


@pytest.fixture(scope="module")
def plain() -> Path:
    """The wheel with its runtime dependencies alone, as `make wheel` leaves it."""
    python = ROOT / ".venv-wheel" / "bin" / "python"
    if not python.exists():
        run("make", "-C", ROOT, "wheel", f"PYTHON={sys.executable}")
    return python


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_alone(extra: str, plain: Path, tmp_path: Path) -> None:
    run(plain, "-m", "venv", tmp_path)
    python = tmp_path / "bin" / "python"
    Path(packages(python), "plain.pth").write_text(packages(plain))  # torch is not installed once more
    run(python, "-m", "pip", "install", "--quiet", f"{ROOT}[{extra}]")
    assert not re.search(r"gramlip", run(python, "-m", "pip", "check").replace("No broken requirements", ""))
    run(python, "-W", "ignore", "-c", USES.get(extra, "import gramlip"))
    assert "stem.conv.weight" in run(python, "-m", "gramlip", "audit", "demo")


def test_what_needs_an_extra_says_so_without_it(plain: Path) -> None:
    code = "from gramlip.cli import main; raise SystemExit(main(['compare', 'demo', '--plot', 'x.png', '--methods', 'frobenius']))"
    done = subprocess.run([plain, "-c", code], capture_output=True, text=True, cwd="/tmp")
    assert done.returncode == 2
    assert "gramlip[plots]" in done.stderr
