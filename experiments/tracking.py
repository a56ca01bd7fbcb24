"""How far below the truth the tracked norms of `LipschitzPenalty` are while the penalty and the loss pull against each other.

One convolution of 8 channels on 8x8 images is asked to double its input (`5 (conv(x) - 2 x)^2`) and penalised above a norm of 0.5
(form "paper"), 250 steps of SGD. From step 100 on, at every 7th step, the certified lower side of its norm (`gramlip.bound` at rtol 1e-3)
is held against the estimate of that step. Writes `results/tracking.json`; run it as `OMP_NUM_THREADS=1 python experiments/tracking.py`.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import torch
from torch import nn

import gramlip as gl

OUT = Path(__file__).parent / "results" / "tracking.json"
LAYERS = {
    "3x3": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "3x3, dilation 2": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
}


def gaps(kind: str, lr: float, every: int, seed: int) -> list[float]:
    """How far the truth is above the estimate, relative to the estimate."""
    torch.manual_seed(seed)
    x, layer = torch.randn(16, 8, 8, 8), LAYERS[kind]()
    penalty = gl.nn.LipschitzPenalty(layer, threshold=0.5, every=every)
    optimiser, found = torch.optim.SGD(layer.parameters(), lr), []
    for step in range(250):
        optimiser.zero_grad()
        (sigma,) = penalty.sigmas().values()
        (5 * (layer(x) - 2 * x).square().mean() + torch.where(sigma > 0.5, sigma, 0.0)).backward()
        if step > 100 and step % 7 == 0:
            found.append(gl.bound(layer, rtol=1e-3).lower / sigma.item() - 1)
        optimiser.step()
    return found


def main() -> None:
    """Every combination, two seeds each."""
    rows = []
    for every, lr, kind in product((50, 1), (0.02, 0.1), LAYERS):
        found = [gap for seed in range(2) for gap in gaps(kind, lr, every, seed)]
        rows.append({"every": every, "lr": lr, "layer": kind, "mean": sum(found) / len(found), "largest": max(found), "count": len(found)})
        print(rows[-1], flush=True)
    OUT.write_text(json.dumps({"torch": torch.__version__, "gramlip": gl.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
