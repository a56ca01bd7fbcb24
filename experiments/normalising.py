"""What normalising costs a training step, and how far the norms drift from the target meanwhile.

Steps of Adam with batches of 64 images of 32x32 on an SNGAN discriminator (7 layers), and of one linear layer of 4096x4096 with 8 rows:
plain, with torch's own `spectral_norm`, with `gramlip.nn.spectral_norm`. All take turns, the first step of each is dropped, medians count.
Then the discriminator learns to tell noise from smoothed noise, tracked, and every 10th step the certified norms of its layers are held
against the target of 1. Writes `results/normalising.json`; run it as `python experiments/normalising.py` with nothing else running.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import gramlip as gl
from gramlip.lab.compare import environment

OUT = Path(__file__).parent / "results" / "normalising.json"
STEPS, THREADS = 15, 2
VERBS: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda layer: layer,
    "torch": parametrizations.spectral_norm,
    "gramlip": gl.nn.spectral_norm,
}


def discriminator() -> nn.Sequential:
    """The discriminator of SNGAN for images of 32x32."""
    parts, channels = list[nn.Module](), 3
    for out, kernel, stride in ((64, 3, 1), (64, 4, 2), (128, 3, 1), (128, 4, 2), (256, 3, 1), (256, 4, 2)):
        parts += [nn.Conv2d(channels, out, kernel, stride, 1), nn.LeakyReLU(0.1)]
        channels = out
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(256 * 16, 1))


def prices(build: Callable[[], nn.Module], x: Tensor) -> dict[str, float]:
    """The median seconds of a step with each verb."""
    steps, seconds = dict[str, Callable[[], None]](), {name: list[float]() for name in VERBS}
    for name, verb in VERBS.items():
        torch.manual_seed(0)
        model = build()
        for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            verb(layer)
        optimiser = torch.optim.Adam(model.parameters(), 1e-4)

        def step(model: nn.Module = model, optimiser: torch.optim.Optimizer = optimiser) -> None:
            optimiser.zero_grad()
            F.softplus(-model(x)).mean().backward()
            optimiser.step()

        steps[name] = step
    for _ in range(1 + STEPS):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def drift(lr: float, steps: int = 30) -> dict[str, float]:
    """How far the certified lower sides of the layers' norms are above the target: the mean and the largest."""
    torch.manual_seed(0)
    model = gl.nn.spectral_norm_(discriminator(), (3, 32, 32))
    optimiser, found = torch.optim.Adam(model.parameters(), lr, betas=(0.0, 0.9)), list[float]()
    for step in range(steps):
        noise = torch.randn(32, 3, 32, 32)
        optimiser.zero_grad()
        (F.softplus(-model(F.avg_pool2d(noise, 3, 1, 1))) + F.softplus(model(noise))).mean().backward()
        optimiser.step()
        if step % 10 == 9:
            model(noise)  # the weights of the next forward pass, which are the ones used
            found += [gl.bound(m.eval(), size).lower - 1 for _, m, size in sized(model)]
            model.train()
    return {"mean": statistics.mean(found), "largest": max(found)}


def sized(model: nn.Module) -> list[tuple[str, nn.Module, tuple[int, int] | None]]:
    """The normalised layers with their input sizes."""
    return [(path, module, own.input_size) for path, module, _, own in gl.nn.normalised(model)]


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rows = {
        "SNGAN discriminator": prices(discriminator, torch.randn(64, 3, 32, 32)),
        "Linear 4096x4096": prices(lambda: nn.Linear(4096, 4096), torch.randn(8, 4096)),
    }
    for name, found in rows.items():
        print(name, {verb: f"{1e3 * s:.0f} ms, {s / found['plain']:.2f} of plain" for verb, s in found.items()})
    drifts = {str(lr): drift(lr) for lr in (2e-4, 1e-3)}
    print(drifts)
    header = environment(torch.device("cpu")) | {"steps": STEPS, "dtype": "float32"}
    OUT.write_text(json.dumps({"header": header, "seconds": rows, "drift": drifts}, indent=1) + "\n")
