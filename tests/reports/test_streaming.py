"""A checkpoint is read tensor by tensor: an audit takes the memory of the largest one and of the work on it, not that of the file."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

# Anonymous memory, which nothing but the process itself can hold: pages of a mapped file go when others need the room.
SCRIPT = """
import sys, threading, time
import torch
from pathlib import Path
from gramlip.reports.checkpoint import Weights
from gramlip.reports.formats import read

def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) << 10

Weights("x", read(Path(sys.argv[1]))).audit(rtol=0.3)  # whatever torch sets up at first
most, before, stop = [0], held(), threading.Event()
def watch():
    while not stop.wait(0.001):
        most[0] = max(most[0], held() - before)
watcher = threading.Thread(target=watch)
watcher.start()
rows = Weights("x", read(Path(sys.argv[2]))).audit(rtol=0.3).layers
stop.set()
watcher.join()
print(len(rows), most[0])
"""


# What is freed goes back at once: else what is counted is also what the allocator happens to keep, from 3 to 13 tensors.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak(first, path):
    command, environment = [sys.executable, "-c", SCRIPT, str(first), str(path)], os.environ | ENVIRONMENT
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    return int(found[0]), int(found[1])


def write(folder, kind, count):
    """So many matrices of 3 MiB, which are searched one by one, on shards of two or in one checkpoint."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {f"w{i}": torch.randn(1024, 768, generator=generator) for i in range(count)}
    if kind == "checkpoint":
        torch.save(state, folder / "x.pt")
        return folder / "x.pt"
    places = {name: f"{i // 2}.safetensors" for i, name in enumerate(state)}
    for shard in set(places.values()):
        save_file({name: value for name, value in state.items() if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel of Linux says of a process")
@pytest.mark.parametrize("kind", ["shards", "checkpoint"])
def test_the_peak_is_that_of_the_largest_tensor(tmp_path, kind):
    tensor, count = 1024 * 768 * 4, 40
    cap = 12 * tensor  # the values in float64, their Gram matrix and the factors of it: about nine times
    found, most = peak(write(tmp_path / "small", kind, 2), write(tmp_path / "large", kind, count))
    assert found == count
    assert most <= cap <= count * tensor / 3
