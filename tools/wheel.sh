#!/usr/bin/env bash
# Builds the wheel into dist/, checks what it holds, and runs the command line from it outside of the repository.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
rm -rf dist .venv-wheel
"$python" -m venv .venv-wheel
bin="$PWD/.venv-wheel/bin"
"$bin/pip" install --quiet ${TORCH:-torch==2.13.0}
"$bin/pip" wheel --quiet --no-deps --wheel-dir dist .
"$bin/pip" install --quiet dist/*.whl
"$python" - dist/*.whl <<'CHECK'
import sys
import zipfile

held = set(zipfile.ZipFile(sys.argv[1]).namelist())
needed = {f"gramlip/{name}" for name in ("py.typed", "data/demo.safetensors", "data/demo-regularised.safetensors")}
if needed - held:
    sys.exit(f"{sys.argv[1]} lacks {', '.join(sorted(needed - held))}")
CHECK
(
  cd /
  "$bin/gramlip" --help
  "$bin/gramlip" audit demo
)
