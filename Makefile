# Every target sets up .venv by itself when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
# by files, so that what the tests of a file share is made once; in the order of tests/conftest.py
# and one process more than cores, for they also wait: for Slurm, for servers, for what must time out
BESIDE := --numprocesses $(shell expr $$(nproc) + 1) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-all check lint type fmt bench docs clean

demo: $(READY)          ## text to a trained ensemble, with a rank killed on the way: some minutes
	$(BIN)/python -m launcher.demo

test: $(READY)          ## every test but the long ones
	$(PYTEST) $(BESIDE) -m "not e2e" tests

test-long: $(READY)     ## whole jobs with real faults, every ZeRO stage; what measures time comes last, one by one
	$(PYTEST) $(BESIDE) -m "e2e and not alone" tests
	$(PYTEST) -m "e2e and alone" tests

test-all: test test-long ## all there are

check: lint type        ## what CI checks before it tests

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(READY)
	$(BIN)/mypy

fmt: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)         ## the figures of docs/BENCHMARKS.md
	$(BIN)/python -m benchmarks step --size tiny
	$(BIN)/python -m benchmarks step --size 10m
	$(BIN)/python -m benchmarks data
	$(BIN)/python -m benchmarks checkpoint
	$(BIN)/python -m benchmarks start

docs: $(READY)          ## the generated parts: configs/base.yaml, the tables of mixers, certificates, models and files
	$(BIN)/python -m launcher.manual > configs/base.yaml
	$(BIN)/python -m launcher.tables README.md docs/ARCHITECTURE.md docs/MIXERS.md

# torch first and under the constraint: any other way brings gigabytes of CUDA to a machine without a GPU
$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
