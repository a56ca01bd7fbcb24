"""Where rounding decides: converged float32 Gram iteration against the truth, beside the certified interval.

`python experiments/convergence.py` writes experiments/results/convergence.json: how many of 100,000 Gaussian 64x48 matrices
have a plain float32 value below the float64 singular value, and how many a certified upper (lower) end on the wrong side of it.
The singular value itself is known to a few units of float64 rounding; ends are compared with that allowance against us: an
upper end counts as wrong unless it is at least the computed singular value.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

import gramlip as gl
from gramlip.certify import certify_all

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--out", type=Path, default=RESULTS / "convergence.json")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    below = wrong_upper = wrong_lower = done = 0
    worst = widest = 0.0
    for _ in tqdm(range(-(-args.count // BATCH))):
        matrices = torch.randn(min(BATCH, args.count - done), 64, 48, generator=generator)
        truth = torch.linalg.svdvals(matrices.double())[:, 0]
        plain = gl.gram_norm(matrices, n_iter=20).double()
        below += int((plain < truth).sum())
        worst = min(worst, float((plain / truth - 1).min()))
        for bound, exact in zip(certify_all([gl.Dense(m) for m in matrices], rtol=args.rtol), truth.tolist(), strict=True):
            wrong_upper += float(bound.upper) < exact
            wrong_lower += bound.lower > exact * (1 + 1e-13)
            widest = max(widest, bound.rtol)
        done += len(matrices)
    found = {
        "matrices": done,
        "shape": [64, 48],
        "plain_float32_below_the_truth": below,
        "plain_float32_worst": worst,
        "certified_upper_below_the_truth": wrong_upper,
        "certified_lower_above_the_truth": wrong_lower,
        "certified_widest": widest,
        "torch": torch.__version__,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
