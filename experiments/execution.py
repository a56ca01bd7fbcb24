"""How loose the bounds of `gl.execution_error` are: `python experiments/execution.py`; fills the table of docs/execution.md."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import gramlip as gl
from gramlip.operators.interval import decimals

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "experiments" / "results" / "execution.json"
PAGE = ROOT / "docs" / "execution.md"
POINTS = 400


class Scaled(nn.Module):
    """A layer divided by its certified norm, so that the network is 1-Lipschitz."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        size = None if isinstance(layer, nn.Linear) else (16, 16)
        with torch.no_grad():
            layer.weight /= float(gl.bound(layer, size).upper)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def networks() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    yield "perceptron 20-50-50-5, tanh", nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 5)), (20,)
    yield (
        "perceptron 64-128-128-10, ReLU",
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)),
        (64,),
    )
    convolutions = [Scaled(nn.Conv2d(a, b, 3, padding=1)) for a, b in ((3, 16), (16, 16), (16, 16))]
    layers = [part for conv in convolutions for part in (conv, nn.ReLU())]
    yield (
        "three convolutions of norm 1 at 16x16",
        nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), Scaled(nn.Linear(256, 10))),
        (3, 16, 16),
    )
    norm = nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 5))
    yield "perceptron 20-32-5, layer norm", norm, (20,)


def row(name: str, model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, radius: float) -> dict[str, object]:
    """The bound in a ball around a point, and the largest error seen there."""
    generator = torch.Generator().manual_seed(1)
    centre = torch.rand(1, *shape, generator=generator)
    error = gl.execution_error(model.eval(), shape, dtype=dtype, at=centre, radius=radius)
    ways = torch.randn(POINTS, *shape, generator=generator)
    ways[: POINTS // 2] = ways[: POINTS // 2].sign()
    unit = ways / torch.linalg.vector_norm(ways.flatten(1), dim=1).reshape(-1, *[1] * len(shape))
    points = (centre + 0.99 * radius * unit).to(dtype)
    program, exact = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
    with torch.no_grad():
        off = torch.linalg.vector_norm((program(points).double() - exact(points.double())).flatten(1), dim=1)
    kind = str(dtype).removeprefix("torch.")
    return {"network": name, "dtype": kind, "radius": radius, "bound": error.upper, "measured": float(off.max())}


def table(rows: list[dict[str, object]]) -> str:
    head = "| network | program | radius | bound (l2) | largest seen | ratio |\n|---|---|---|---|---|---|\n"
    lines = [
        f"| {r['network']} | {r['dtype']} | {r['radius']} | {decimals(float(r['bound']), upward=True)} | {float(r['measured']):.3g} "
        f"| {float(r['bound']) / float(r['measured']):.3g} |\n"
        for r in rows
    ]
    return head + "".join(lines)


def main() -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    rows = [row(*network, dtype, radius) for network in networks() for dtype in kinds for radius in (0.01, 0.25)]
    RESULT.write_text(json.dumps({"torch": torch.__version__, "points": POINTS, "rows": rows}, indent=1) + "\n")
    page = PAGE.read_text()
    PAGE.write_text(
        page[: page.index("## How loose it is")] + page[page.index("## How loose it is") :].split("\n| ")[0].rstrip() + "\n\n" + table(rows)
    )
    print(table(rows))


if __name__ == "__main__":
    main()
