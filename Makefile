# Each target makes the virtual environment it needs. `make gpu-test VENV=` uses the Python at hand instead.

VENV   ?= .venv
TORCH  ?= torch==2.13.0
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(if $(shell $(name) -c $(SUPPORTED) 2>/dev/null && echo yes),$(name))) python3)
ARGS   ?=
JOBS   ?= 2

SUPPORTED = 'import sys; sys.exit(sys.version_info < (3, 11))'
ROOTS     = $(CURDIR):$(CURDIR)/plugins:$(CURDIR)/kernels
PIP       = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

ifeq ($(VENV),)
  PY = PYTHONPATH=$(ROOTS)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
else
  PY       = $(VENV)/bin/python
  DEMO_ENV = $(VENV)/demo.stamp
  TEST_ENV = $(VENV)/test.stamp
  DOWNSTREAM_ENV = $(VENV)/downstream.stamp
endif

HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE
export TOKENIZERS_PARALLELISM = false
# threads that wait give up the core: spinning makes a shared machine many times slower
export OMP_WAIT_POLICY = passive

STEPS = ruff format imports types kernels suite

.PHONY: help demo test lint gpu-test downstream gpu-bench gpu-bench-ops gpu-bench-training clean $(STEPS)

help:
	@echo "make demo       train a small model through TRL with the backend on (ARGS=\"--steps 100\", ...)"
	@echo "make test       linters, types and all tests that need no GPU"
	@echo "make lint       linters and types only"
	@echo "make gpu-test   the tests that need a CUDA GPU; VENV= uses the Python at hand"
	@echo "make downstream the tests of TRL, PEFT, transformers and accelerate with the backend on (ARGS=\"trl-sft --source DIR\")"
	@echo "make gpu-bench  time ops, offloading and training on a CUDA GPU, into docs/benchmarks; VENV= as above"
	@echo "                gpu-bench-ops or gpu-bench-training for one part, with its ARGS=\"--only full,ctx\""
	@echo "make clean      remove the environment and everything that was built"

demo: $(DEMO_ENV)
	$(PY) -m sloth_backend.cli demo $(ARGS)

test: $(TEST_ENV)
	@failed=; summary=; for step in $(STEPS); do \
	  printf '\n== %s\n' "$$step"; start=$$(date +%s); \
	  if $(MAKE) --no-print-directory "$$step"; then verdict=passed; else verdict=FAILED; failed="$$failed $$step"; fi; \
	  summary="$$summary$$(printf '\n  %-8s %s in %s s' "$$step" "$$verdict" "$$(( $$(date +%s) - start ))")"; \
	done; \
	printf '\n== summary%s\n' "$$summary"; \
	if [ -n "$$failed" ]; then echo "FAILED:$$failed"; exit 1; fi; echo "all passed"

lint: ruff format imports types

ruff: $(TEST_ENV)
	$(PY) -m ruff check .
format: $(TEST_ENV)
	$(PY) -m ruff format --check .
imports: $(TEST_ENV)
	$(PY) -c 'from importlinter.cli import lint_imports_command as lint; lint()'
types: $(TEST_ENV)
	$(PY) -m pyright --pythonpath "$(if $(VENV),$(VENV)/bin/python,$(shell command -v $(PYTHON)))"
kernels: $(TEST_ENV)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "not gpu" \
	  integration_tests/sameness/test_sameness.py integration_tests/ops \
	  -k "not test_sameness or full and float32 and (llama or gemma2 or phi3 or ernie4_5)"
suite: $(TEST_ENV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu and not slow" integration_tests
test-slow: $(TEST_ENV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile -m "slow and not gpu" integration_tests

gpu-test: $(TEST_ENV)
	$(PY) -m pytest -m gpu integration_tests $(ARGS)

downstream: $(DOWNSTREAM_ENV)
	OMP_NUM_THREADS=1 $(PY) -m integration_tests.downstream.run $(ARGS)

gpu-bench: gpu-bench-ops gpu-bench-training
gpu-bench-ops: $(TEST_ENV)
	$(PY) integration_tests/benchmarks/ops.py --out docs/benchmarks $(ARGS)
	$(PY) integration_tests/benchmarks/offload.py > docs/benchmarks/offload.tmp
	mv docs/benchmarks/offload.tmp docs/benchmarks/offload.json
	$(PY) integration_tests/benchmarks/plot.py docs/benchmarks
gpu-bench-training: $(TEST_ENV)
	$(PY) -m integration_tests.benchmarks.training.run --out docs/benchmarks $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c $(SUPPORTED) || { echo "Python 3.11 or newer is needed, $(PYTHON) is older or missing; say make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml integration_tests/requirements-demo.txt | $(VENV)/bin/python
	$(PIP) "$(TORCH)" -r integration_tests/requirements-demo.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/test.stamp: pyproject.toml integration_tests/requirements.txt integration_tests/requirements-demo.txt | $(VENV)/bin/python
	$(PIP) "$(TORCH)" -r integration_tests/requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/demo.stamp

$(VENV)/downstream.stamp: integration_tests/requirements-downstream.txt | $(VENV)/test.stamp
	$(PIP) -r integration_tests/requirements-downstream.txt
	@touch $@

clean:
	rm -rf .venv demo build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
