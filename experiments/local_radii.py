"""Certified accuracy by the constant of all inputs and by constants around each image: fills docs/training.md.

    python experiments/local_radii.py [--networks demo ...]

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
from gramlip.demo import demo, demo_regularised
from gramlip.lab.recipes import MEAN, RECIPES, STD, build, load, normalised
from gramlip.operators.interval import decimals
from gramlip.robust.accuracy import Everywhere, Run

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


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[float, ...], tuple[float, ...]], int, int]] = {
    "demo": (demo, ONE, 10, 2),
    "demo-regularised": (demo_regularised, ONE, 10, 3),
    "resnet20-cifar10": (lambda: models.resnet20(SHARED / "models" / "resnet20-cifar10.safetensors"), (MEAN, STD), 10, 2),
    "small-penalised": (small, (RECIPES["small-penalised"].mean, RECIPES["small-penalised"].std), 100, 10),
}
"""Name -> the network, mean and std of its input, and how many images are certified at EPS and to the largest radius."""


def everywhere(model: nn.Module, std: tuple[float, ...]) -> Everywhere:
    """The constant of all inputs, of the whole network or, where it ends in a linear layer, of what stands before it."""
    body, last = model, None
    if isinstance(model, nn.Sequential) and isinstance(end := model[-1], nn.Linear):
        body, last = model[:-1], end
    return Everywhere(audit(body, (3, 32, 32)).upper, std, last)


def rows(name: str, known: dict[str, Any]) -> None:
    """The images of one network that are not done."""
    make, (mean, std), at_eps, largest = NETWORKS[name]
    model = make().eval()
    images, labels = load(str(SHARED / "data" / "cifar10"), "test", max(at_eps, largest))
    batches = list(zip(normalised(images.float() / 255, mean, std).split(1), labels.split(1), strict=True))
    given = everywhere(model, std)
    wide, runs = Run(model, batches[0][0], given, EPS, False, None), {"largest": True, "eps": "eps"}
    for kind, count in (("eps", at_eps), ("largest", largest)):
        done: list[dict[str, Any]] = known.setdefault(name, {}).setdefault(kind, [])
        if len(done) < count:
            near = Run(model, batches[0][0], given, EPS, runs[kind], None)
        for batch in batches[len(done) : count]:
            radius, right = wide.radii(*batch)
            begin = process_time()
            around, _ = near.radii(*batch)
            sides = {"everywhere": float(radius), "around": float(around)}
            done.append({"right": bool(right)} | sides | {"seconds": process_time() - begin})
            save(known)
            print(name, kind, len(done), json.dumps(done[-1]), flush=True)


def save(known: dict[str, Any]) -> None:
    RESULT.write_text(json.dumps({"torch": torch.__version__, "networks": known}, indent=1) + "\n")


def table(known: dict[str, Any]) -> str:
    """For docs/training.md."""
    text = "| network | images | right, % | at 1/255, everywhere | around | at 36/255, everywhere | around | seconds an image |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    for name in NETWORKS:
        done = known[name]["eps"]
        shares = [100 * sum(r[kind] > e for r in done) / len(done) for e in EPS for kind in ("everywhere", "around")]
        right, seconds = 100 * sum(r["right"] for r in done) / len(done), sum(r["seconds"] for r in done) / len(done)
        text += f"| {name} | {len(done)} | {right:.1f} | " + " | ".join(f"{s:.1f}" for s in shares) + f" | {seconds:.1f} |\n"
    text += "\n| network | right images | radius everywhere, median | around, median | gain, median | seconds an image |\n"
    text += "|---|---|---|---|---|---|\n"
    for name in NETWORKS:
        done = [r for r in known[name]["largest"] if r["right"]]
        sides = [torch.tensor([r[k] for r in done], dtype=torch.float64) for k in ("everywhere", "around")]
        radii = [decimals(float(side.median()), upward=False, digits=3) for side in sides]
        gain, seconds = float((sides[1] / sides[0]).median()), sum(r["seconds"] for r in done) / len(done)
        text += f"| {name} | {len(done)} | {radii[0]} | {radii[1]} | {gain:.3g} | {seconds:.0f} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--page", action="store_true", help="only write the page, from what is done")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULT.read_text())["networks"] if RESULT.exists() else {}
    for name in [] if args.page else args.networks:
        rows(name, known)
    begin, end = "<!-- local radii -->\n", "<!-- end of local radii -->"
    head, rest = PAGE.read_text().split(begin)
    PAGE.write_text(head + begin + table(known) + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()
