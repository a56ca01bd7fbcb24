"""How often a claimed norm of a float32 Gaussian matrix is below the truth, decided in rational arithmetic.

`python experiments/rounding_at_convergence.py --count 100000` compares the converged Gram iteration in plain float32, the
largest singular value by LAPACK in float32, and `gramlip.bound`, on small matrices whose Gram matrix is formed exactly: a
claim t is below the truth if and only if `t^2 I - A^T A` is not positive semidefinite, decided by elimination of fractions.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from fractions import Fraction

import torch
from tqdm import tqdm

import gramlip as gl


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
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    counts = {"plain float32 Gram iteration": 0, "float32 SVD": 0, "gramlip.bound": 0, "gramlip.bound, lower side above": 0}
    for _ in tqdm(range(args.count)):
        matrix = torch.randn(3, 2, generator=generator)
        counts["plain float32 Gram iteration"] += below(matrix, float(gl.gram_norm(matrix, n_iter=16)))
        counts["float32 SVD"] += below(matrix, float(torch.linalg.svdvals(matrix)[0]))
        interval = gl.bound(matrix, rtol=args.rtol)
        counts["gramlip.bound"] += below(matrix, float(interval.upper))
        counts["gramlip.bound, lower side above"] += not below(matrix, math.nextafter(interval.lower, 0.0))
    print(json.dumps({"matrices": args.count, "rtol": args.rtol, "seed": args.seed, "below_the_truth": counts}))


if __name__ == "__main__":
    main()
