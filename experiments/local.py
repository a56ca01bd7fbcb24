"""Constants around an input, against what is sampled and what others return: `python experiments/local.py`; fills docs/local.md."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from time import process_time

import torch
from torch import Tensor, nn

from gramlip import audit
from gramlip.operators.interval import decimals

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "experiments" / "results" / "local.json"
PAGE = ROOT / "docs" / "local.md"
POINTS = 3000
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU}
PEERS: dict[tuple[str, int], dict[float, tuple[float, float]]] = {
    # (activation, seed) -> radius -> eclipse-nn 0.1.7, auto_LiRPA 0.7.1 (the smaller of its two), as they were measured for this project
    ("relu", 1): {0.001: (0.2059, 0.2059), 0.01: (0.3848, 0.2294), 0.1: (0.5918, 0.4078), 0.5: (0.7531, 4.13), 2.0: (0.8569, 11.0)},
    ("relu", 2): {0.01: (0.01805, 0.01805), 0.1: (0.2364, 0.02587), 0.5: (0.4354, 0.2255), 2.0: (0.5917, 8.51)},
    ("tanh", 3): {0.001: (0.4955, 0.1605), 0.1: (0.5322, 0.1728), 0.5: (0.6750, 0.2737), 2.0: (0.9186, 2.51)},
}
NETWORKS: list[tuple[str, list[int], int, tuple[float, ...]]] = [
    ("relu", [20, 100, 100, 10], 1, (0.001, 0.01, 0.1, 0.5, 2.0)),
    ("relu", [6, 40, 40, 40, 40, 3], 2, (0.01, 0.1, 0.5, 2.0)),
    ("tanh", [6, 40, 40, 3], 3, (0.001, 0.1, 0.5, 2.0)),
    ("sigmoid", [10, 100, 100, 5], 4, (0.001, 0.1, 0.5, 2.0)),
    ("silu", [10, 100, 100, 5], 5, (0.001, 0.1, 0.5, 2.0)),
    ("relu", [20, 200, 200, 200, 10], 6, (0.001, 0.1, 2.0)),
    ("tanh", [20, 200, 200, 10], 7, (0.001, 0.1, 0.5, 2.0)),
    ("relu", [2, 64, 64, 1], 8, (0.1, 0.5, 2.0)),
    ("relu", [4, 64, 64, 2], 9, (0.1, 0.5, 2.0)),
]


def network(activation: str, sizes: list[int], seed: int) -> tuple[nn.Module, Tensor]:
    """The model and the input that it is looked at around."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), ACTIVATIONS[activation]()]
    x = torch.randn(1, sizes[0], generator=torch.Generator().manual_seed(seed + 100))
    return nn.Sequential(*layers[:-1]).eval(), x


def sampled(model: nn.Module, x: Tensor, radius: float) -> float:
    """The largest norm of the Jacobian at points of the sphere."""
    steps = torch.randn(POINTS, x.shape[1], generator=torch.Generator().manual_seed(0))
    points = (x + radius * steps / steps.norm(dim=1, keepdim=True)).requires_grad_()
    values = model(points)
    rows = [torch.autograd.grad(values[:, j].sum(), points, retain_graph=True)[0] for j in range(values.shape[1])]
    return float(torch.linalg.matrix_norm(torch.stack(rows, 1), 2).max())


def row(activation: str, sizes: list[int], seed: int, radius: float) -> dict[str, object]:
    """One network at one radius."""
    model, x = network(activation, sizes, seed)
    begin = process_time()
    report = audit(model, x, at=x, radius=radius)
    seconds = process_time() - begin
    name = f"{activation} {'-'.join(map(str, sizes))} ({seed})"
    found = {"network": name, "radius": radius, "sampled": sampled(model, x, radius), "lower": report.lower, "upper": report.upper}
    eclipse, lirpa = PEERS.get((activation, seed), {}).get(radius, (None, None))
    return found | {"eclipse-nn": eclipse, "auto_LiRPA": lirpa, "seconds": seconds}


def table(rows: list[dict[str, object]]) -> str:
    """The rows for docs/local.md."""
    head = "| network (seed) | r | sampled | at most | eclipse-nn | auto_LiRPA | seconds |\n|---|---|---|---|---|---|---|\n"
    line = "| {network} | {radius:g} | {sampled:.4g} | {most} | {eclipse} | {lirpa} | {seconds:.1f} |\n"
    shown = [
        r
        | {"most": decimals(float(str(r["upper"])), upward=True, digits=4)}
        | {"eclipse": r["eclipse-nn"] or "", "lirpa": r["auto_LiRPA"] or ""}
        for r in rows
    ]
    return head + "".join(line.format(**r) for r in shown)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    rows = []
    for activation, sizes, seed, radii in NETWORKS:
        for radius in radii:
            rows.append(row(activation, sizes, seed, radius))
            print(json.dumps(rows[-1]), flush=True)
    RESULT.write_text(json.dumps({"torch": torch.__version__, "points": POINTS, "rows": rows}, indent=1) + "\n")
    begin, end = "<!-- local -->\n", "<!-- end -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(before + begin + table(rows) + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()
