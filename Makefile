# Everything here works on a machine with Python 3.10 or newer and nothing else: each target makes what it needs.
# The environment (.venv) is made once, and again when pyproject.toml, setup.py or constraints.txt change.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
INSTALL ?=
JOBS   ?= 2
OUT    ?= runs/gpu

.DEFAULT_GOAL := help
.PHONY: help install train test mutate lint format types emulate audit matrix bench gpu cluster wheel clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "heiretsu needs Python 3.10 or newer; say which with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for what a run needs, one for what the checks need on top of it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed ## make .venv with what a run needs

train: $(VENV)/.installed ## train a small GPT on the embedded corpus (ARGS="--max_iters 50" adds flags)
	$(BIN)/python train.py --fused --batch_size 8 --max_iters 2500 --learning_rate 3e-3 --warmup_iters 100 --min_lr 1e-4 \
	    --eval_interval 500 --log_file runs/make-train.jsonl $(ARGS)

test: $(VENV)/.installed-dev ## run every test that is quick, the Triton kernels in the interpreter included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not full" $(ARGS)

mutate: $(VENV)/.installed-dev ## edit the product at random and see whether a test notices (ARGS="--seed 1 --count 200")
	$(BIN)/python -m tests.mutation $(ARGS)

lint: types ## ruff (lint and format) and the type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## let ruff sort imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev package-for-mypy ## the type check alone
	$(BIN)/mypy -p heiretsu
	$(BIN)/mypy $(filter-out setup.py,$(wildcard *.py))

.PHONY: package-for-mypy
package-for-mypy:
	@mkdir -p build/types/heiretsu
	@for folder in kernels parallel model data run offgpu bench; do ln -sfn "$(CURDIR)/$$folder" build/types/heiretsu/$$folder; done

emulate: $(VENV)/.installed-dev ## run the compiled kernels' PTX on the emulator, for A100 and H100, and the emulator's own tests
	$(BIN)/python -m pytest tests/kernels --emulate sm_80 $(ARGS)
	$(BIN)/python -m pytest tests/kernels --emulate sm_90 $(ARGS)
	$(BIN)/python -m pytest tests/offgpu/emulator -m "emulate_full or not emulate_full" $(ARGS)

audit: $(VENV)/.installed-dev ## compile every kernel ahead of time and check registers, spills and bounds
	$(BIN)/python bench/kernels.py --audit $(ARGS)

matrix: $(VENV)/.installed-dev package-for-mypy ## the checks that depend on a release of torch or triton, on each pair of them (ARGS)
	$(BIN)/python -m tests.matrix $(ARGS)

cluster: $(VENV)/.installed-dev ## several machines, as two hosts on this one, with a Slurm (root; INSTALL=yes lets apt-get bring it)
	@$(BIN)/python -m tests.cluster $(if $(INSTALL),--install)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile tests/cluster $(ARGS)

bench: $(VENV)/.installed-dev ## measure the kernels against their alternatives
	$(BIN)/python bench/kernels.py $(ARGS)

# With the Python that is there, and what is installed in it: a rented machine may have no network, and has its own torch.
gpu: GPU_PYTHON := $(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(PYTHON))
gpu: ## on a machine with a GPU: is it right, how fast, does it train (OUT=DIR, ARGS="--minutes 5")
	@$(GPU_PYTHON) -c 'import heiretsu.bench' 2>/dev/null || \
	    $(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(GPU_PYTHON) bench/gpu.py --out $(OUT) $(ARGS)

wheel: $(VENV)/.installed-dev ## build dist/heiretsu-*.whl
	$(BIN)/python -m build --wheel

clean: ## remove the environment, caches and what was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
