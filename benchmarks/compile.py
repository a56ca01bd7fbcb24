"""What torch.compile takes for a network before and after `spectral_norm_`: the first forward and backward less the second, caches off.

    OMP_NUM_THREADS=1 python benchmarks/compile.py

Writes benchmarks/results/compile-cpu.json.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from torch import nn

import gramlip
from gramlip import nn as gnn
from gramlip.lab.recipes import MODELS

FILE = Path(__file__).resolve().parent / "results" / "compile-cpu.json"


def seconds(net: nn.Module) -> dict[str, float]:
    """Seconds of compiling in one graph, and of a step of eight images afterwards."""
    torch._dynamo.reset()
    compiled, x, times = torch.compile(net, fullgraph=True), torch.randn(8, 3, 32, 32), []
    for _ in range(2):
        begin = time.perf_counter()
        compiled(x).sum().backward()
        times.append(time.perf_counter() - begin)
    return {"compile": times[0] - times[1], "step": times[1]}


def main() -> None:
    torch.compile(nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()  # what the first compilation of a process loads
    found = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        found[name] = {"plain": seconds(build()), "normalised": seconds(gnn.spectral_norm_(build(), torch.zeros(1, 3, 32, 32)))}
    header = {
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gramlip": gramlip.__version__,
        "load average at the end": os.getloadavg()[0],
    }
    FILE.write_text(json.dumps({**header, "seconds": found}, indent=1) + "\n")
    print(FILE.read_text())


if __name__ == "__main__":
    main()
