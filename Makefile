# Two commands on a new machine: `make run` and `make test`. Needs Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup run test lint types arrows tests faults proofs bench bench-flavor bench-queue bench-compare bench-inference gpu audit dist docs ui clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"rankwise needs Python 3.11 or newer, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.12 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing rankwise and the libraries it was tested with into $(VENV): some minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(STAMP)  ## create .venv and install

run: setup  ## the main job: a rank sweep on real data
	$(BIN)/rankwise run experiments/diamonds-rank.yaml

test: setup lint types arrows tests  ## every check

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

arrows: setup
	$(BIN)/lint-imports

tests: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

faults: setup  ## the slow proofs under injected faults
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	$(BIN)/python -m pytest -m faults

proofs: setup  ## other slow proofs: a real base, a fresh environment
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,proofs]'
	$(BIN)/python -m pytest -m proof

bench: setup  ## speed and memory against TRL and a plain peft loop, 25 minutes on 2 cores; ARGS="--help"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	PYTHONPATH=tests $(BIN)/python -m benchmarks $(ARGS)

bench-flavor: setup  ## what stored adapters and the cache of quantized bases cost: bytes, seconds, memory; 2 minutes
	PYTHONPATH=tests $(BIN)/python -m benchmarks.flavor_figures $(ARGS)

bench-queue: setup  ## the queue on both databases: claims a second, 10,000 arms, 100,000 jobs; sweeps; time to the first step; 8 minutes
	PYTHONPATH=tests $(BIN)/python -m benchmarks.queue_figures $(ARGS)

bench-compare: setup  ## compare and report of 1,000 arms in a real MLflow store, beyond start-up; 6 minutes
	PYTHONPATH=tests $(BIN)/python -m benchmarks.compare_figures $(ARGS)

bench-inference: setup  ## batch inference against peft and generate: speed, answers of uneven length, rounding, evaluation, first row, memory; 7 minutes
	PYTHONPATH=tests $(BIN)/python -m benchmarks.inference_figures $(ARGS)

gpu: setup  ## the checks that need a CUDA GPU, and the tables of `make bench` and `make bench-inference` on it with the shape of an 8B model
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m pytest -m gpu tests/gpu
	PYTHONPATH=tests $(BIN)/python -m gpu $(ARGS)

audit: setup  ## known vulnerabilities of the tested versions; asks the advisory service of PyPI, fails without it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[audit]'
	$(BIN)/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement constraints.txt

dist: setup  ## the wheel and the source distribution in dist/, checked as a package index checks them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# Without --quiet: with it, mkdocs counts no warnings and strict mode always passes.
docs: setup  ## the documentation as a site, in site/; a broken link or anchor is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file platform/mkdocs.yml
	@echo "open site/index.html"

ui: setup  ## the MLflow UI on the local store, on loopback
	$(BIN)/rankwise ui

clean:  ## remove the virtual environment and the tools' caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache .hypothesis
