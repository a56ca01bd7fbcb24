"""What an interval of a wide layer takes: peak memory beyond the weights in a fresh process, its width and its time.

Writes experiments/results/memory.json and the table in docs/performance.md: `python experiments/memory.py`, or with some of the names
below to measure these again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "memory.json"
PAGE = ROOT / "docs" / "performance.md"
MARKS = ("<!-- memory -->\n", "<!-- end of memory -->")

LAYERS: dict[str, tuple[tuple[int, ...], str]] = {  # the shape of the weight, and the layer's settings
    "2048 every size": ((2048, 2048, 3, 3), "padding=1"),
    "2048 n=7": ((2048, 2048, 3, 3), "input_size=7, padding=1"),
    "2048 n=7, finite=False": ((2048, 2048, 3, 3), "input_size=7, padding=1; finite=False"),
    "2048 n=14 stride 2": ((2048, 2048, 3, 3), "input_size=14, padding=1, stride=2"),
    "2048 n=7 reflect": ((2048, 2048, 3, 3), "input_size=7, padding=1, padding_mode='reflect'"),
    "2048 n=8 circular": ((2048, 2048, 3, 3), "input_size=8, padding=1, padding_mode='circular'"),
    "2048 1x1": ((2048, 2048, 1, 1), "input_size=7"),
    "2048 1x1 every size": ((2048, 2048, 1, 1), ""),
    "2048 depthwise": ((2048, 1, 3, 3), "input_size=14, padding=1, groups=2048"),
    "2048 32 groups": ((2048, 64, 3, 3), "input_size=14, padding=1, groups=32"),
    "2048 1d k=9": ((2048, 2048, 9), "input_size=64, padding=4"),
    "2048 2x2 stride 2": ((2048, 2048, 2, 2), "input_size=14, stride=2"),
    "1024 every size": ((1024, 1024, 3, 3), "padding=1"),
    "1024 n=7": ((1024, 1024, 3, 3), "input_size=7, padding=1"),
    "1024 n=14": ((1024, 1024, 3, 3), "input_size=14, padding=1"),
    "1024 n=56": ((1024, 1024, 3, 3), "input_size=56, padding=1"),
    "1024 n=14 stride 2": ((1024, 1024, 3, 3), "input_size=14, padding=1, stride=2"),
    "1024 7x7 every size": ((1024, 1024, 7, 7), "padding=3"),
    "1024 7x7 n=14": ((1024, 1024, 7, 7), "input_size=14, padding=3"),
    "1024 transposed stride 2": ((1024, 1024, 4, 4), "input_size=7, padding=1, stride=2, transposed=True"),
    "512 every size": ((512, 512, 3, 3), "padding=1"),
    "512 n=7": ((512, 512, 3, 3), "input_size=7, padding=1"),
    "512 n=14": ((512, 512, 3, 3), "input_size=14, padding=1"),
    "512 5x5 every size": ((512, 512, 5, 5), "padding=2"),
    "512 3d every size": ((512, 512, 3, 3, 3), "padding=1"),
    "512 3d n=4": ((512, 512, 3, 3, 3), "input_size=4, padding=1"),
    "512 complex n=7": ((512, 512, 3, 3), "input_size=7, padding=1; complex"),
    "1024 complex every size": ((1024, 1024, 3, 3), "padding=1; complex"),
    "1024 half n=7": ((1024, 1024, 3, 3), "input_size=7, padding=1; half"),
    "2048 to 32, 5x5": ((32, 2048, 5, 5), "padding=2"),
}

PROGRAM = """
import json, sys, time
import torch
import gramlip as gl

shape, settings, options = json.loads(sys.argv[1])
torch.set_num_threads(1)
gl.bound(gl.Conv(torch.randn(8, 8, 3, 3), input_size=9, padding=1, stride=2))
torch.manual_seed(0)
weight = torch.randn(*shape, dtype=torch.complex64 if "complex" in options else torch.float32)
weight = weight.half() if "half" in options else weight
op = eval(f"gl.Conv(weight, {settings})")
before = dict(line.split(":") for line in open("/proc/self/status"))
open("/proc/self/clear_refs", "w").write("5")
start = time.perf_counter()
found = gl.bound(op, finite=False) if "finite=False" in options else gl.bound(op)
seconds = time.perf_counter() - start
after = dict(line.split(":") for line in open("/proc/self/status"))
extra = (int(after["VmHWM"].split()[0]) - int(before["VmRSS"].split()[0])) / 1024
print(json.dumps({"MiB": round(extra), "width": found.rtol, "seconds": round(seconds, 2), "because": found.because}))
"""


def table(found: dict[str, dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = ["| layer | weight | MiB | width | s | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for name in (name for name in LAYERS if name in found):
        row, shape = found[name], "x".join(map(str, LAYERS[name][0]))
        early = "budget reached" if "budget reached" in str(row["because"]) else ""
        lines.append(f"| {name} | {shape} | {row['MiB']} | {row['width']:.2g} | {row['seconds']:.3g} | {early} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found: dict[str, dict[str, object]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[1:] or LAYERS:
        shape, settings = LAYERS[name]
        settings, _, options = settings.partition(";")
        command = [sys.executable, "-c", PROGRAM, json.dumps([shape, settings, options])]
        found[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        sys.stderr.write(f"{name}: {found[name]}\n")
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table(found) + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
