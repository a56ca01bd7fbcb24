"""What training with a Lipschitz constant costs: a step of ResNet-18 on 32x32 images, and what each control adds to it.

    OMP_NUM_THREADS=2 python benchmarks/training.py --batch 256 --repeat 5

Forward and backward, synchronised, warm-up discarded, median of the repetitions, all on the same machine in one process. The tracked
penalty is also measured with its searches spread over `every` calls. The Gram bounds go layer by layer, so that one graph is alive at
a time. Writes benchmarks/results/training-DEVICE.json, and on a CPU the table of docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gramlip
from gramlip import nn as gnn
from gramlip.lab.recipes import resnet18
from gramlip.nn.parametrize import layers
from gramlip.norm.formulas import Lip_conv, operator_gram_norm
from gramlip.operators.describe import describe

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "training.md"


def measure(work: Callable[[], Tensor], repeat: int, device: torch.device) -> float:
    """Median seconds of forward and backward."""
    times = []
    for i in range(repeat + 1):
        begin = time.perf_counter()
        work().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def published(conv: nn.Conv2d, size: tuple[int, ...]) -> Tensor:
    """Algorithm 3 as published: every step on the whole grid, every step differentiated."""
    return Lip_conv(conv.weight, 6, n=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--every", type=int, default=50)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = resnet18().to(device)
    x, y = torch.randn(args.batch, 3, 32, 32, device=device), torch.randint(10, (args.batch,), device=device)
    example = torch.zeros(1, 3, 32, 32, device=device)

    def only(_: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d)

    sized = layers(net, example, only)
    tracked = gnn.LipschitzPenalty(net, example, where=only, every=10**9)
    tracked()

    def search() -> Tensor:
        for tracker in tracked.trackers:
            tracker.search()
        return tracked()

    rows = {
        "step": measure(lambda: F.cross_entropy(net(x), y), args.repeat, device),
        "tracked call": measure(tracked, args.repeat, device),
        "tracked search and call": measure(search, args.repeat, device),
        "published Gram, 6 steps": sum(measure(partial(published, m, size), max(1, args.repeat // 2), device) for _, m, size in sized),
        "Gram, 6 steps, gradient at the arg-max block": sum(
            measure(partial(operator_gram_norm, describe(m, size), 6), max(1, args.repeat // 2), device) for _, m, size in sized
        ),
    }
    call, full = rows["tracked call"], rows["tracked search and call"]
    rows["tracked, searches spread"] = call + max(full - call, 0.0) / args.every
    header = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gramlip": gramlip.__version__,
        "dtype": "float32",
        "batch": args.batch,
        "convolutions": len(sized),
        "repeat": args.repeat,
        "every": args.every,
        "load average at the end": os.getloadavg()[0],
    }
    ratios = {
        "tracked over step": rows["tracked, searches spread"] / rows["step"],
        "Gram over tracked": rows["published Gram, 6 steps"] / rows["tracked, searches spread"],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"training-{device.type}.json"
    file.write_text(json.dumps({**header, "seconds": rows, "ratios": ratios}, indent=1) + "\n")
    print(file.read_text())
    if device.type == "cpu":
        before, _, rest = PAGE.read_text().partition("<!-- cost -->\n")
        PAGE.write_text(f"{before}<!-- cost -->\n{table(rows)}\n<!-- end of cost -->{rest.partition('<!-- end of cost -->')[2]}")


def table(rows: dict[str, float]) -> str:
    """The measurements as a table of docs/training.md."""
    lines = ["| what, forward and backward | ms | % of the step |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {1e3 * s:.0f} | {100 * s / rows['step']:.1f} |" for name, s in rows.items())])


if __name__ == "__main__":
    main()
