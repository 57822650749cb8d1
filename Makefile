# The front door. Every target sets up what it needs: `make demo` and `make test` run on a fresh machine with
# Python 3.11 or later and a C++17 compiler (without one everything still runs, on the slow torch reference).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN = runs/demo
NATIVE = $(wildcard kernels/cpu/* bindings/include/*)

.PHONY: help setup demo test test-triton test-ptx test-oldest test-hosts lint format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.installed  ## virtual environment with everything, native library built

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch -e '.[train,dev,bench]'
	$(BIN)/zo-core doctor
	touch $@

demo: setup  ## fine-tune SmolLM2-135M on movie reviews into runs/demo (12 to 20 minutes on 2 cores)
	$(BIN)/zo-core finetune --output $(RUN) --overwrite

# Tests run in a process for each core, as many as 8, and each of them in one thread.
PYTEST = OMP_NUM_THREADS=1 TRITON_CACHE_DIR=$(abspath $(VENV))/.triton $(BIN)/python -m pytest -q \
	-n logical --maxprocesses=8 --dist worksteal
KERNEL_TESTS = tests/test_cases.py tests/test_triton.py

test: setup test-triton test-ptx  ## all tests, also those on the default model and data (downloaded once)
	ZO_CORE_TEST_ASSETS=1 $(PYTEST) --durations=10 --ignore=tests/ptx

test-triton: setup  ## the Triton kernels in the interpreter, in processes of their own
	TRITON_INTERPRET=1 $(PYTEST) $(KERNEL_TESTS) tests/test_selfcheck.py::test_every_backend_gives_the_known_answers

# Half of the cases on each: what compiles in a few minutes. ZO_CORE_PTX_ALL=1 runs all cases on both.
test-ptx: setup  ## the Triton kernels as compiled for sm_90 and sm_80, in an emulator of PTX; and mutants of them
	ZO_CORE_PTX=90 $(PYTEST) $(KERNEL_TESTS)
	ZO_CORE_PTX=80 $(PYTEST) tests/test_cases.py tests/ptx

test-oldest: setup  ## Trainer and PEFT on the oldest transformers that is supported, in an environment over the usual one
	$(call over,oldest,transformers==5.0.0)
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -q tests/test_transformers.py tests/test_peft.py

test-hosts: setup  ## what is skipped where TRL, Lightning and ml_dtypes are not installed, in such an environment
	$(call over,hosts,-c constraints.txt torch lightning ml_dtypes trl)
	OMP_NUM_THREADS=1 $(VENV)-hosts/bin/python -m pytest -q tests/test_trl.py tests/test_docs.py tests/test_arrays.py tests/test_examples.py

# $(call over,NAME,PACKAGES): an environment that has these packages, and all others from $(VENV)
define over
test -x $(VENV)-$(1)/bin/python || $(PYTHON) -m venv $(VENV)-$(1)
site='import site; print(site.getsitepackages()[0])' && \
	$(BIN)/python -c "$$site" > "$$($(VENV)-$(1)/bin/python -c "$$site")/shared.pth"
$(VENV)-$(1)/bin/python -m pip install -q --disable-pip-version-check $(2)
endef

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
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-hosts build dist *.egg-info bindings/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
