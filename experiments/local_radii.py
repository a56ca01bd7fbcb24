"""Certified accuracy by the constant of all inputs and by constants around each image: fills docs/training.md.

    python experiments/local_radii.py [--networks demo ...] [--images 10]

Each image is kept in experiments/results/local_radii.json as it is done, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import models
import torch
from safetensors.torch import load_file
from torch import nn

from gramlip import audit
from gramlip.cli.lab import parts
from gramlip.demo import demo, demo_regularised
from gramlip.lab.recipes import MEAN, RECIPES, STD, build, load, normalised
from gramlip.operators.interval import decimals
from gramlip.robust import Everywhere, Run

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULT = ROOT / "experiments" / "results" / "local_radii.json"
PAGE = ROOT / "docs" / "training.md"
EPS = (1 / 255, 36 / 255)
ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def small() -> nn.Module:
    """`gramlip train small-penalised --data DIR --out runs/small-penalised`."""
    model = build(RECIPES["small-penalised"].model, "plain")
    model.load_state_dict(load_file(ROOT / "runs" / "small-penalised" / "weights.safetensors"))
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "demo": (demo, ONE),
    "demo-regularised": (demo_regularised, ONE),
    "resnet20-cifar10": (lambda: models.resnet20(SHARED / "models" / "resnet20-cifar10.safetensors"), (MEAN, STD)),
    "small-penalised": (small, (RECIPES["small-penalised"].mean, RECIPES["small-penalised"].std)),
}
"""Name -> the network, and mean and std of its input."""


def everywhere(model: nn.Module, std: tuple[float, ...]) -> Everywhere:
    """The constant of all inputs, of the whole network or, where it ends in a linear layer, of what stands before it."""
    body, last = parts(model)
    return Everywhere(audit(body, (3, 32, 32)).upper, std, last)


def rows(name: str, count: int, known: dict[str, list[dict[str, Any]]]) -> None:
    """The images of one network that are not done: whether each is right, its radius everywhere and around it, and CPU seconds."""
    make, (mean, std) = NETWORKS[name]
    model, done = make().eval(), known.setdefault(name, [])
    images, labels = load(str(SHARED / "data" / "cifar10"), "test", count)
    batches = list(zip(normalised(images.float() / 255, mean, std).split(1), labels.split(1), strict=True))
    given = everywhere(model, std)
    wide, near = (Run(model, batches[0][0], given, EPS, local, None) for local in (False, "eps"))
    for batch in batches[len(done) :]:
        radius, right = wide.radii(*batch)
        begin = process_time()
        around, _ = near.radii(*batch)
        sides = {"everywhere": float(radius), "around": float(around)}
        done.append({"right": bool(right)} | sides | {"seconds": process_time() - begin})
        save(known)
        print(name, len(done), json.dumps(done[-1]), flush=True)


def save(known: dict[str, list[dict[str, Any]]]) -> None:
    RESULT.write_text(json.dumps({"torch": torch.__version__, "networks": known}, indent=1) + "\n")


def table(known: dict[str, list[dict[str, Any]]]) -> str:
    """For docs/training.md."""
    text = "| network | images | right | above 1/255, everywhere | around | above 36/255, everywhere | around "
    text += "| median radius, everywhere | around | seconds |\n|---|---|---|---|---|---|---|---|---|---|\n"
    for name, done in ((name, known[name]) for name in NETWORKS if name in known):
        counts = [sum(r[kind] > e for r in done) for e in EPS for kind in ("everywhere", "around")]
        right = [r for r in done if r["right"]]
        sides = [torch.tensor([r[kind] for r in right], dtype=torch.float64) for kind in ("everywhere", "around")]
        radii = [decimals(float(side.median()), upward=False, digits=3) for side in sides]
        cells = [name, len(done), len(right), *counts, *radii, f"{sum(r['seconds'] for r in right) / len(right):.1f}"]
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--page", action="store_true", help="only write the page, from what is done")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULT.read_text())["networks"] if RESULT.exists() else {}
    for name in [] if args.page else args.networks:
        rows(name, args.images, known)
    begin, end = "<!-- local radii -->\n", "<!-- end of local radii -->"
    head, rest = PAGE.read_text().split(begin)
    PAGE.write_text(head + begin + table(known) + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()
