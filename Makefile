# Everything runs in .venv. Every target that needs it makes it first; where nothing changed that takes no time.
#
#   PYTHON=...   the interpreter that .venv is made with (3.11 to 3.13)
#   WORKERS=...  test processes

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && echo $$p && break; \
	done)
WORKERS ?= 2
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: help setup demo test test-all lint bench clean

help:
	@echo "make setup     make .venv with everything in it"
	@echo "make demo      compare the methods on the embedded task; ends with a table and a report page"
	@echo "make test      lint, types and the quick tests"
	@echo "make test-all  lint, types and all tests"
	@echo "make lint      ruff and mypy"
	@echo "make bench     run the benchmarks and append to benchmarks/results"
	@echo "make clean     remove .venv, caches and build products; runs/ stays"

setup:
	@python="$(PYTHON)"; if [ -z "$$python" ]; then \
		echo "make: no Python 3.11, 3.12 or 3.13 was found; install one, or say make PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; "$$python" scripts/setup.py

demo: setup
	$(BIN)/fedpeft demo

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy scripts/setup.py benchmarks

bench: setup
	$(BIN)/python -m benchmarks.imports
	$(BIN)/python -m benchmarks.null_client
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.peak
	$(BIN)/python -m benchmarks.steptime --threads 1
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.cohort --clients 10
	$(BIN)/python -m benchmarks.cohort --clients 30
	$(BIN)/python -m benchmarks.cohort --clients 10 --data random --length 64
	$(BIN)/python -m benchmarks.cohort --clients 10 --dtype bfloat16
	$(BIN)/python -m benchmarks.prefix
	$(BIN)/python -m benchmarks.rounds
	$(BIN)/python -m benchmarks.difficulty
	$(BIN)/python -m benchmarks.quantize
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.decoding --small demo-small --large demo-large
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.shares
	$(BIN)/python -m benchmarks.merged
	$(BIN)/python -m benchmarks.gap --threads 1

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
