"""What coupling gains over composition: `python experiments/network_bounds.py [--effort 1]`, one line a network, JSON at the end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models

from gramlip import audit, demo

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "models"


def networks() -> Iterator[tuple[str, nn.Module, tuple[int, ...] | torch.Tensor]]:
    """Name, model and example."""
    yield "mlp-2-10-30-20-2", models.mlp(SHARED / "mlp-2-10-30-20-2.safetensors"), torch.zeros(1, 2, dtype=torch.float64)
    yield "demo", demo.demo(), (3, 32, 32)
    yield "demo-regularised", demo.demo_regularised(), (3, 32, 32)
    yield "resnet20-cifar10", models.resnet20(SHARED / "resnet20-cifar10.safetensors"), (3, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--effort", type=float, default=1.0)
    effort = parser.parse_args().effort
    rows = []
    for name, model, example in networks():
        plain, coupled = audit(model, example, effort=-1), audit(model, example, effort=effort)
        rows.append({"network": name, "lower": coupled.lower, "composition": plain.upper, "coupling": coupled.upper})
        print(f"{name}: at least {coupled.lower:.6g}; composition {plain.upper:.6g}, coupling {coupled.upper:.6g}", flush=True)
    print(json.dumps({"effort": effort, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
