"""What coupling gains over composition: `python experiments/network_bounds.py [--effort 1]`; fills the table of docs/network.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models

from gramlip import audit, demo
from gramlip.operators.interval import decimals

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "models"
RESULT = ROOT / "experiments" / "results" / "network_bounds.json"
PAGE = ROOT / "docs" / "network.md"


def networks() -> Iterator[tuple[str, nn.Module, tuple[int, ...] | torch.Tensor]]:
    """Name, model and example."""
    yield "mlp-2-10-30-20-2", models.mlp(SHARED / "mlp-2-10-30-20-2.safetensors"), torch.zeros(1, 2, dtype=torch.float64)
    yield "demo", demo.demo(), (3, 32, 32)
    yield "demo-regularised", demo.demo_regularised(), (3, 32, 32)
    yield "resnet20-cifar10", models.resnet20(SHARED / "resnet20-cifar10.safetensors"), (3, 32, 32)


def row(name: str, model: nn.Module, example: tuple[int, ...] | torch.Tensor, effort: float) -> dict[str, object]:
    """Both bounds of a network, with the time that each took in all."""
    begin = perf_counter()
    plain = audit(model, example, effort=-1)
    middle = perf_counter()
    coupled = audit(model, example, effort=effort)
    gain = plain.upper / coupled.upper
    seconds = {"composition_seconds": middle - begin, "coupling_seconds": perf_counter() - middle}
    return {"network": name, "lower": coupled.lower, "composition": plain.upper, "coupling": coupled.upper, "gain": gain} | seconds


def table(rows: list[dict[str, object]]) -> str:
    """The rows for docs/network.md."""
    head = "| network | at least | composition | coupling | gain | audit without, with coupling |\n|---|---|---|---|---|---|\n"
    line = "| {network} | {below} | {plain} | {tight} | {gain:.3g} | {composition_seconds:.0f} s, {coupling_seconds:.0f} s |\n"
    sides = {"below": ("lower", False), "plain": ("composition", True), "tight": ("coupling", True)}
    shown = [{key: decimals(r[name], upward=up) for key, (name, up) in sides.items()} | r for r in rows]  # type: ignore[arg-type]
    return head + "".join(line.format(**r) for r in shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--effort", type=float, default=1.0)
    effort = parser.parse_args().effort
    rows = []
    for name, model, example in networks():
        rows.append(row(name, model, example, effort))
        print(json.dumps(rows[-1]), flush=True)
    found = {"effort": effort, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    begin, end = "<!-- network_bounds -->\n", "<!-- end -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(before + begin + table(rows) + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()
