"""Constants around one image, of convolutional networks: `python experiments/local_images.py`; fills docs/local.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from time import process_time

import models
import torch
from torch import nn

from gramlip import audit
from gramlip.demo import demo, demo_regularised
from gramlip.operators.interval import decimals

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "experiments" / "results" / "local_images.json"
PAGE = ROOT / "docs" / "local.md"
RADII = (1e-3, 1e-2, 3e-2, 36 / 255)
NETWORKS = {
    "demo": demo,
    "demo-regularised": demo_regularised,
    "resnet20-cifar10": lambda: models.resnet20(ROOT.parent / "shared" / "models" / "resnet20-cifar10.safetensors"),
}


def rows(name: str, model: nn.Module, radii: Sequence[float | None]) -> list[dict[str, object]]:
    """One network around one image at some radii; None is everywhere."""
    x, found = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for radius in radii:
        begin = process_time()
        report = audit(model, (3, 32, 32)) if radius is None else audit(model, x, at=x, radius=radius)
        sides = {"lower": report.lower, "upper": report.upper, "seconds": process_time() - begin}
        found.append({"network": name, "radius": radius} | sides)
        print(json.dumps(found[-1]), flush=True)
    return found


def table(made: list[dict[str, object]]) -> str:
    """The rows for docs/local.md."""
    text = "| network | r | at least | at most | seconds |\n|---|---|---|---|---|\n"
    for r in made:
        least, most = (decimals(float(str(r[k])), upward=k == "upper", digits=4) for k in ("lower", "upper"))
        where = "everywhere" if r["radius"] is None else f"{r['radius']:.4g}"
        text += f"| {r['network']} | {where} | {least} | {most} | {r['seconds']:.0f} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--radii", nargs="*", type=float, help="these alone, in the place of their rows; by default all, and everywhere")
    names, some = parser.parse_args().networks, parser.parse_args().radii
    radii: tuple[float | None, ...] = (*RADII, None) if some is None else tuple(some)
    torch.set_num_threads(1)
    before = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    made = [r for r in before if r["network"] not in names or r["radius"] not in radii]
    made += [r for name in names for r in rows(name, NETWORKS[name]().eval(), radii)]
    made.sort(key=lambda r: (r["network"], r["radius"] is None, r["radius"] or 0.0))
    RESULT.write_text(json.dumps({"torch": torch.__version__, "rows": made}, indent=1) + "\n")
    begin, end = "<!-- images -->\n", "<!-- end images -->"
    head, rest = PAGE.read_text().split(begin)
    PAGE.write_text(head + begin + table(made) + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()
