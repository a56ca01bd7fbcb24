"""Bounds of whole networks, ours and published ones: `python experiments/network_bounds.py`; fills the table of docs/network.md.

ECLipsE-Fast and LipSDP-Neuron are the judges of the tests, which use nothing of gramlip. The product of published layer bounds takes for
every convolution the least of `PUBLISHED`, for every matrix its exact norm, and composes them as `audit` composes its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import process_time

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "network"))
import models

import gramlip as gl
from gramlip import audit, demo
from gramlip.network.audit import steps_of
from gramlip.network.compose import compose, constants
from gramlip.network.steps import Linear
from gramlip.operators.interval import decimals
from gramlip.operators.linear_maps import Conv
from test_network_multipliers import all_ends, eclipse_fast, lipsdp

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "models"
RESULT = ROOT / "experiments" / "results" / "network_bounds.json"
PAGE = ROOT / "docs" / "network.md"
PUBLISHED = ("singla2021", "araujo2021", "norm2toep", "aol")
LARGEST = 110  # inputs and neurons together, for the conic solver

Example = tuple[int, ...] | torch.Tensor


def perceptron(*widths: int) -> nn.Module:
    """Fresh weights, ReLU between the layers."""
    layers = [m for i in range(len(widths) - 1) for m in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def denoiser(width: int) -> nn.Module:
    """Four convolutions with fresh weights."""
    inner = [m for _ in range(2) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(width, 1, 3, padding=1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "mlp-2-10-30-20-2, trained": (lambda: models.mlp(SHARED / "mlp-2-10-30-20-2.safetensors"), torch.zeros(1, 2, dtype=torch.float64)),
    "perceptron 10-40-40-10": (lambda: perceptron(10, 40, 40, 10), (10,)),
    "perceptron 784-50-10": (lambda: perceptron(784, 50, 10), (784,)),
    "perceptron 6-12 (20 times)-3": (lambda: perceptron(6, *[12] * 20, 3), (6,)),
    "perceptron 784-256-256-10": (lambda: perceptron(784, 256, 256, 10), (784,)),
    "perceptron 3072-512-512-512-10": (lambda: perceptron(3072, 512, 512, 512, 10), (3072,)),
    "perceptron 20 (50 times)": (lambda: perceptron(*[20] * 51), (20,)),
    "denoiser, 32 channels, 64x64": (lambda: denoiser(32), (1, 64, 64)),
    "demo": (demo.demo, (3, 32, 32)),
    "demo-regularised": (demo.demo_regularised, (3, 32, 32)),
    "resnet20-cifar10": (lambda: models.resnet20(SHARED / "resnet20-cifar10.safetensors"), (3, 32, 32)),
}


def perceptron_bounds(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Name and value of what is published for perceptrons with slopes in [0, 1]."""
    weights = [m.weight.detach().double() for m in model.modules() if isinstance(m, nn.Linear)]
    yield "eclipse_fast", min(eclipse_fast(weights), eclipse_fast([w.mT for w in reversed(weights)]))
    if sum(len(w) for w in weights[:-1]) + weights[0].shape[1] <= LARGEST:
        try:
            yield "lipsdp", lipsdp(weights, all_ends(weights))
        except AssertionError:  # not solved within the solver's iterations
            return


def layer_bounds(model: nn.Module, example: Example) -> float:
    """The composition of published bounds of the layers."""
    network = steps_of(model, example)
    shapes = [[network.steps[s].shape for s in step.sources] for step in network.steps]
    found = constants(network.steps, shapes)
    for i, step in enumerate(network.steps):
        if isinstance(step.what, Linear) and isinstance(step.what.op, Conv):
            upper = min(float(gl.bound(step.what.op, method=name).upper) for name in PUBLISHED)
            found[i] = replace(found[i], upper=upper)
    return compose(network, found).upper


def row(name: str) -> dict[str, object]:
    """All bounds of a network, and the CPU seconds of the audit with its defaults."""
    build, example = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    plain = audit(model, example, effort=-1)
    begin = process_time()
    ours = audit(model, example)
    seconds = process_time() - begin
    found: dict[str, object] = {
        "network": name,
        "lower": ours.lower,
        "composition": plain.upper,
        "ours": ours.upper,
        "cpu_seconds": seconds,
    }
    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return found | {"layers": layer_bounds(model, example)}
    return found | dict(perceptron_bounds(model))


def table(rows: list[dict[str, object]]) -> str:
    """The rows for docs/network.md."""
    head = [
        "network",
        "product of norms",
        "product of published layer bounds",
        "ECLipsE-Fast",
        "LipSDP-Neuron",
        "ours",
        "at least",
        "CPU s",
    ]
    keys = ["composition", "layers", "eclipse_fast", "lipsdp", "ours", "lower"]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        shown = [decimals(v, upward=k != "lower", digits=4) if isinstance(v := r.get(k), float) and math.isfinite(v) else "" for k in keys]
        lines.append([str(r["network"]), *shown, f"{r['cpu_seconds']:.1f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    torch.set_num_threads(1)
    steps_of(nn.Linear(1, 1), (1,))  # torch imports its exporter once
    rows = []
    for name in NETWORKS:
        rows.append(row(name))
        print(json.dumps(rows[-1]), flush=True)
    note = "cpu_seconds: process time of audit with its defaults on one thread, torch's exporter imported before"
    RESULT.write_text(json.dumps({"note": note, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    begin, end = "<!-- network_bounds -->\n", "<!-- end -->"
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(before + begin + table(rows) + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()
