"""How far the norms of layers that `spectral_norm_` normalises drift from the target while they train.

The discriminator of SNGAN (7 layers, from fresh weights) learns to tell noise from smoothed noise in batches of 16. At every 10th step
the certified norms of its layers, for their input sizes and for every size, are held against the target of 1: of the weights that the next
forward pass uses.
Writes `results/drift.json` and prints the rows of the table in docs/training.md; run it as `OMP_NUM_THREADS=1 python experiments/drift.py`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import gramlip as gl
from gramlip.lab.bench.contenders import discriminator
from gramlip.lab.compare import environment

OUT = Path(__file__).parent / "results" / "drift.json"
STEPS, EACH = 60, 10
OPTIMISERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam, 2e-4": lambda p: torch.optim.Adam(p, 2e-4, betas=(0.0, 0.9)),
    "SGD, momentum 0.9, 0.02": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
    "SGD, momentum 0.9, 0.1": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
}


def drift(name: str, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """Certified lower sides over the target less 1, of all layers at all certificates: for the input sizes, and for every size."""
    torch.manual_seed(0)
    model = gl.nn.spectral_norm_(discriminator(), (3, 32, 32))
    optimiser, found = OPTIMISERS[name](model.parameters()), (list[float](), list[float]())
    for step in range(1, steps + 1):
        noise = torch.randn(16, 3, 32, 32)
        optimiser.zero_grad()
        (F.softplus(-model(F.avg_pool2d(noise, 3, 1, 1))) + F.softplus(model(noise))).mean().backward()
        optimiser.step()
        if step % EACH == 0:
            model(noise)
            model.eval()
            for _, layer, _, own in gl.nn.normalised(model):
                for sizes, size in zip(found, (own.input_size, None), strict=True):
                    sizes.append(gl.bound(layer, size).lower - 1)
            model.train()
            print(name, step, *([f"{100 * each:.1f}" for each in sizes[-7:]] for sizes in found), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Every optimiser."""
    rows = []
    for name in OPTIMISERS:
        found = dict(zip(("input sizes", "every size"), drift(name), strict=True))
        numbers = {kind: {"mean": statistics.mean(each), "largest": max(each), "count": len(each)} for kind, each in found.items()}
        rows.append({"optimiser": name, **numbers})
        print(f"| {name} |", " | ".join(f"{100 * n['mean']:.1f} % | {100 * n['largest']:.1f} %" for n in numbers.values()), "|", flush=True)
    header = environment(torch.device("cpu")) | {"steps": STEPS, "certified every": EACH}
    OUT.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
