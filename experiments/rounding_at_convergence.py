"""How often a claimed norm of a float32 Gaussian matrix is below the truth, decided in rational arithmetic.

`python experiments/rounding_at_convergence.py --count 100000` compares the converged Gram iteration in plain float32, the
largest singular value by LAPACK in float32, and `gramlip.bound`, on small matrices whose Gram matrix is formed exactly: a
claim t is below the truth if and only if `t^2 I - A^T A` is not positive semidefinite, decided by elimination of fractions.
Writes experiments/results/rounding_at_convergence.json.
"""

from __future__ import annotations

import argparse
import json
import math
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

import gramlip as gl
from gramlip.norm.certify import certify_all

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 64


def below(matrix: torch.Tensor, claim: float) -> bool:
    """Whether the norm of a matrix with two columns exceeds the claim, exactly."""
    a, b = ([Fraction(x) for x in column] for column in matrix.double().mT.tolist())
    p, q, r = (sum((x * y for x, y in zip(u, v, strict=True)), Fraction(0)) for u, v in ((a, a), (a, b), (b, b)))
    square = Fraction(claim) ** 2
    return square < p or square < r or (square - p) * (square - r) < q * q


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "rounding_at_convergence.json")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    counts = {"plain float32 Gram iteration": 0, "float32 SVD": 0, "gramlip.bound": 0, "gramlip.bound, lower side above": 0}
    for start in tqdm(range(0, args.count, BATCH)):
        matrices = torch.randn(min(BATCH, args.count - start), 3, 2, generator=generator)
        plain, svd = gl.gram_norm(matrices, n_iter=16).tolist(), torch.linalg.svdvals(matrices)[:, 0].tolist()
        intervals = certify_all([gl.Dense(matrix) for matrix in matrices], rtol=args.rtol)
        for matrix, gram, value, interval in zip(matrices, plain, svd, intervals, strict=True):
            counts["plain float32 Gram iteration"] += below(matrix, gram)
            counts["float32 SVD"] += below(matrix, value)
            counts["gramlip.bound"] += below(matrix, float(interval.upper))
            counts["gramlip.bound, lower side above"] += not below(matrix, math.nextafter(interval.lower, 0.0))
    found = {"matrices": args.count, "shape": [3, 2], "rtol": args.rtol, "seed": args.seed, "below_the_truth": counts}
    args.out.write_text(json.dumps(found | {"torch": torch.__version__}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
