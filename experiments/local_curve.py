"""The constant around one image against the radius: experiments/results/local_curve.json, which `tools/pictures.py radius` draws.

The penalised demo network around `torch.rand(1, 3, 32, 32)` of a generator seeded with 0. What is done is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import process_time

import torch

from gramlip import audit
from gramlip.demo import demo_regularised

RESULT = Path(__file__).resolve().parent / "results" / "local_curve.json"
RADII = (None, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 0.1, 0.3, 1.0)


def main() -> None:
    torch.set_num_threads(1)
    model, x = demo_regularised(), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for radius in RADII:
        if any(row["radius"] == radius for row in rows):
            continue
        begin = process_time()
        report = audit(model, (3, 32, 32)) if radius is None else audit(model, x, at=x, radius=radius, effort=0.0)
        rows.append({"radius": radius, "lower": report.lower, "upper": report.upper, "seconds": process_time() - begin})
        print(json.dumps(rows[-1]), flush=True)
        RESULT.write_text(json.dumps({"network": "demo-regularised", "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
