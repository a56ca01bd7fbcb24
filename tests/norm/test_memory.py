"""Memory: what an interval takes beyond the weights, measured in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
import gramlip as gl

torch.set_num_threads(1)
torch.manual_seed(0)
gl.bound(gl.Conv(torch.randn(8, 8, 3, 3), input_size=9, padding=1, stride=2))
weight = torch.randn({channels}, {channels}, 3, 3)
status = dict(line.split(":") for line in open("/proc/self/status"))
open("/proc/self/clear_refs", "w").write("5")
gl.bound(gl.Conv(weight, {options}), rtol={rtol})
after = dict(line.split(":") for line in open("/proc/self/status"))
print(int(after["VmHWM"].split()[0]) - int(status["VmRSS"].split()[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("channels", "options", "limit"), [(1056, "", 210), (768, "input_size=14, padding=1, stride=2", 260)])
def test_a_bound_takes_little_memory(channels: int, options: str, limit: int) -> None:
    """Too wide for copies of the kernel, and the first for taps in double: it would take 213 MiB for these alone.

    glibc keeps freed blocks of up to 32 MiB in a heap that fragments, from 164 to 270 MiB in runs that hold the same 130 MiB: here
    every block above 256 KiB goes back to the system when it is freed, so that what is measured is what is held.
    """
    program = PROGRAM.format(channels=channels, options=options, rtol=0.5)
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=settings, timeout=300)
    assert int(found.stdout) < limit << 10
