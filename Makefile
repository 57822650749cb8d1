# The front door. Every target sets up what it needs: `make demo` and `make test` run on a fresh machine with
# Python 3.11 or later and a C++17 compiler (without one everything still runs, on the slow torch reference).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = runs/demo
NATIVE = $(wildcard kernels/cpu/* bindings/include/*)

.PHONY: help setup demo test test-triton lint format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.installed  ## virtual environment with everything, native library built

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch -e '.[train,dev,bench]'
	$(BIN)/zo-core doctor
	touch $@

demo: setup  ## fine-tune SmolLM2-135M on movie reviews into runs/demo (about 12 minutes on 2 cores)
	$(BIN)/zo-core finetune --output $(RUN) --overwrite

test: setup test-triton  ## all tests, also those on the default model and data (downloaded once)
	ZO_CORE_TEST_ASSETS=1 $(BIN)/python -m pytest -q --durations=10

test-triton: setup  ## the Triton kernels in the interpreter, in a process of their own, and the instruction budgets
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/test_cases.py tests/test_triton.py
	$(BIN)/python -m bench.sass

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite to the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## passes and whole steps against the published way, as JSON in bench/results
	$(BIN)/python -m bench.passes --json bench/results/passes.json
	$(BIN)/python -m bench.step --json bench/results/step.json
	$(BIN)/python -m bench.step --autocast --json bench/results/step_autocast.json

clean:  ## remove what make made, but not runs
	rm -rf $(VENV) build dist *.egg-info bindings/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
