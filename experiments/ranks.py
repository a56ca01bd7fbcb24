"""How much sooner several ranks finish an audit of weights than one: seconds on the clock, one thread a rank, nothing else running.

Writes experiments/results/ranks.json and the table in docs/scale.md: `python experiments/ranks.py`, a minute on two cores.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import gramlip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "ranks.json"
PAGE = ROOT / "docs" / "scale.md"
MARKS = ("<!-- ranks -->\n", "<!-- end of ranks -->")
RANKS = (1, 2)
TRIALS = 2  # the faster one counts

BLOCK = ((1024, 1024), (256, 1024), (2816, 1024), (1024, 2816))
FILES: dict[str, list[tuple[int, int]]] = {
    "six blocks of 1024x1024, 256x1024, 2816x1024 and 1024x2816": [*BLOCK * 6],
    "one matrix of 2048x16384, its columns shared": [(2048, 16384)],
    "one matrix of 16384x2048, its rows shared": [(16384, 2048)],
}

PROGRAM = """
import json, sys, time
import torch
import torch.distributed.tensor
from pathlib import Path
from gramlip.distributed import gathered, joined, ranked
from gramlip.reports.checkpoint import Weights
from gramlip.reports.formats import read

torch.set_num_threads(1)
with joined():
    Weights("warm-up", read(Path(sys.argv[1]))).audit()
    seconds = []
    for _ in range(int(sys.argv[3])):
        gathered(None)
        start = time.perf_counter()
        report = Weights("audit", read(Path(sys.argv[2]))).audit()
        seconds.append(max(gathered(time.perf_counter() - start)))
    if ranked() == 0:
        Path(sys.argv[4]).write_text(json.dumps([min(seconds), max(row.bound.rtol for row in report.layers)]))
sys.stdout.flush()
import os
os._exit(0)
"""


def write(path: Path, shapes: list[tuple[int, int]]) -> Path:
    """Matrices of normally distributed float32 entries."""
    generator = torch.Generator().manual_seed(0)
    save_file({f"w{i}": torch.randn(*shape, generator=generator) for i, shape in enumerate(shapes)}, path)
    return path


def measured(folder: Path, path: Path, ranks: int) -> tuple[float, float]:
    """Seconds of the slowest rank, and the widest interval."""
    program, small = folder / "program.py", write(folder / "small.safetensors", [(8, 8)])
    program.write_text(PROGRAM)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    out = folder / "out.json"
    subprocess.run([*line, str(small), str(path), str(TRIALS), str(out)], env=environment, check=True, capture_output=True)
    seconds, width = json.loads(out.read_text())
    return seconds, width


def header() -> dict[str, object]:
    """Where and with what this was measured."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    model = next((line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "commit": commit,
        "gramlip": gramlip.__version__,
        "torch": torch.__version__,
        "machine": f"{model or platform.machine()}, {os.cpu_count()} cores",
        "dtype": "float32",
        "rtol": 1e-2,
        "threads": "1 a rank",
        "backend": "gloo",
        "trials": f"{TRIALS}, the faster one counts; a small audit before",
        "load": os.getloadavg()[0],
    }


def table(rows: list[dict[str, object]]) -> str:
    """The table of docs/scale.md."""
    lines = ["| file | " + " | ".join(f"{n} rank{'s' * (n > 1)}" for n in RANKS) + " | speed-up |", "|---" * (len(RANKS) + 2) + "|"]
    for row in rows:
        seconds: dict[str, float] = row["seconds"]  # type: ignore[assignment]
        each = [seconds[str(n)] for n in RANKS]
        lines.append(f"| {row['file']} | " + " | ".join(f"{s:.2f}" for s in each) + f" | {each[0] / each[-1]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and write both files."""
    about, rows = header(), list[dict[str, object]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, shapes in FILES.items():
            path = write(folder / "weights.safetensors", shapes)
            found = {str(n): measured(folder, path, n) for n in RANKS}
            rows.append({"file": file, "seconds": {n: s for n, (s, _) in found.items()}, "width": max(w for _, w in found.values())})
    RESULTS.write_text(json.dumps({"header": about, "rows": rows}, indent=2) + "\n")
    before, after = PAGE.read_text().split(MARKS[0])[0], PAGE.read_text().split(MARKS[1])[1]
    PAGE.write_text(before + MARKS[0] + table(rows) + MARKS[1] + after)


if __name__ == "__main__":
    main()
