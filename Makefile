# make demo   audits the network that ships with gramlip, and shows beside it what training with a penalty changed
# make test   formatter, linter, type checker and the whole test suite
# make test-integrations  gramlip beside packages that it does not need (integrations/), in a venv of their own
# make docs   builds the site into site/: warnings are errors, links are checked, nothing is asked of the network after the first time
# make wheel  builds the wheel into dist/ and runs the command line from it, with its runtime dependencies alone
# make bench  measures, about half an hour of both cores, and fills docs/performance.md
# make clean  removes what these made
#
# All but the last set up a venv the first time: .venv, .venv-integrations or .venv-docs. PYTHON and TORCH can be given: make demo PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
BESIDE := .venv-integrations/bin
BESIDE_READY := .venv-integrations/.ready
DOCS := .venv-docs/bin
DOCS_READY := .venv-docs/.ready
# One thread for each test worker: more of them wait for each other.
ONE := OMP_NUM_THREADS=1

.PHONY: demo test test-integrations docs wheel bench clean

demo: $(READY)
	@$(BIN)/gramlip audit gramlip.demo:demo --input 3,32,32
	@echo
	@echo "The same network, trained with a penalty on the norms of its layers (B):"
	@echo
	@$(BIN)/gramlip diff gramlip.demo:demo gramlip.demo:demo_regularised --input 3,32,32

test: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(ONE) $(BIN)/pytest -n $(WORKERS)

test-integrations: $(BESIDE_READY)
	@$(ONE) $(BESIDE)/pytest integrations

docs: $(DOCS_READY)
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --quiet --strict
	@echo "site/index.html"

wheel:
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" tools/wheel.sh

bench: $(READY)
	@$(BIN)/gramlip bench --full --json benchmarks/results/bench-cpu.json
	@$(BIN)/python benchmarks/tables.py

$(READY): EXTRA := dev
$(BESIDE_READY): EXTRA := integrations
# without their dependencies, which are PyTorch's CUDA packages: see integrations/vision.py
$(BESIDE_READY): ALONE := timm torchvision
$(READY) $(BESIDE_READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1); expected Python 3.10 or newer: type make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(@D) (once; PyTorch is a large download)" >&2
	@$(PYTHON) -m venv $(@D) || { echo "no virtual environment; expected Python's venv: on Debian type apt install python3-venv" >&2; exit 1; }
	@{ $(@D)/bin/pip install --quiet $(TORCH) && $(@D)/bin/pip install --quiet $(TORCH) -e '.[$(EXTRA)]' && \
	  { [ -z "$(ALONE)" ] || $(@D)/bin/pip install --quiet --no-deps $(ALONE); }; } || \
	  { echo "the packages above were not installed; expected access to PyPI: check the network and type make $(MAKECMDGOALS) again" >&2; exit 1; }
	@touch $@

# The site reads the code without importing it: no PyTorch is needed here, so the extra's packages are installed without the package.
$(DOCS_READY): pyproject.toml
	@$(PYTHON) -m venv .venv-docs || { echo "no virtual environment; expected Python's venv: on Debian type apt install python3-venv" >&2; exit 1; }
	@$(DOCS)/pip install --quiet $$(sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d '",') || \
	  { echo "the packages above were not installed; expected access to PyPI: check the network and type make docs again" >&2; exit 1; }
	@touch $@

clean:
	rm -rf .venv .venv-integrations .venv-docs .venv-wheel site dist build .pytest_cache .ruff_cache .hypothesis
