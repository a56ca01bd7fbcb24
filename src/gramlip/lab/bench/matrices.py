"""Rows on matrices: a square one against its own product and factorisation, a large one by the memory that it takes."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter

import torch

from gramlip.errors import UnsupportedError
from gramlip.lab.bench.counting import count
from gramlip.lab.bench.result import OURS, Claim, Entry, Options, Row, contest
from gramlip.norm.bound import bound
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Dense

LARGE = (8192, 28672)  # a weight of a large language model's feed-forward layer
MEMORY = 6 << 30


def dense(options: Options) -> Row:
    """A square matrix, against one product of it and one Cholesky factorisation in float64."""
    row, side = "dense", 128 if options.quick else 4096
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(options.device, options.dtype)
    wide = weight.double()
    spd = wide @ wide.mT
    spd.diagonal().add_(spd.diagonal().sum() / side)
    product, factor = f"one product, {str(options.dtype).removeprefix('torch.')}", "one Cholesky, float64"
    works: dict[str, Callable[[], Bound | float]] = {
        OURS: lambda: bound(Dense(weight)),
        product: lambda: float((weight @ weight)[0, 0]),
        factor: lambda: float(torch.linalg.cholesky_ex(spd)[0][0, 0]),
    }
    case = f"{side}x{side}"
    truth = float(torch.linalg.eigvalsh(wide.mT @ wide)[-1].sqrt())
    found = Row(contest(row, case, works, options, truths={OURS: truth}, counts={OURS: count(works[OURS])}))
    allowed = 3 * found.of(case, product).median + found.of(case, factor).median
    found.claims = [Claim(row, "gramlip over three products and a factorisation", found.of(case, OURS).median / allowed, 1, False)]
    # products and the factorisation are no contenders: their value is no norm
    found.entries = [e if e.contender == OURS else _bare(e) for e in found.entries]
    if options.full:
        _large(found, options)
    else:
        found.notes.append(f"{LARGE[0]}x{LARGE[1]} was left out: type --full")
    return found


def _bare(e: Entry) -> Entry:
    return Entry(e.row, e.case, e.contender, e.minimum, e.median, e.ratio)


def _large(found: Row, options: Options) -> None:
    """In a process of its own, so that its memory is its own: once, without warm-up."""
    shape = (64, 256) if options.quick else LARGE
    options.say(f"dense: {shape[0]}x{shape[1]}")
    command = [sys.executable, "-m", "gramlip.lab.bench.matrices", *map(str, shape), str(options.device), str(torch.get_num_threads())]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        msg = f"{shape[0]}x{shape[1]} ended with exit code {run.returncode}; expected enough memory: leave --full out"
        raise UnsupportedError(msg)
    seconds, lower, upper, memory = map(float, run.stdout.split())
    case = f"{shape[0]}x{shape[1]}, once, in a process of its own"
    found.entries.append(Entry("dense", case, OURS, seconds, seconds, 1.0, upper, upper / lower - 1, memory=int(memory)))
    found.claims.append(Claim("dense", f"{shape[0]}x{shape[1]}: memory over {MEMORY >> 30} GiB", memory / MEMORY, 1, False))
    found.claims.append(Claim("dense", f"{shape[0]}x{shape[1]}: width of the interval", upper / lower - 1, 1e-2, False))


def alone(rows: int, columns: int, device: str, threads: int) -> str:
    """Seconds, lower side, upper side and peak memory in bytes of this process, which does nothing else."""
    torch.set_num_threads(threads)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / math.sqrt(columns)
    weight = weight.to(device)
    start = perf_counter()
    found = bound(Dense(weight))
    seconds = perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if weight.is_cuda:
        memory = torch.cuda.max_memory_allocated(weight.device)
    return f"{seconds!r} {found.lower!r} {float(found.upper)!r} {memory}"


if __name__ == "__main__":
    sys.stdout.write(alone(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
