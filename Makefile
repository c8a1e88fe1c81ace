# `make demo` and `make test` set up everything that they need in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo sweep test test-slow test-all integrations lint docs notebooks lock clean

# The locked environment is for CPUs. Without this, its TPU compiler, which tests use, looks for TPUs and complains.
demo sweep: export JAX_PLATFORMS ?= cpu
demo: .venv/.installed
	$(BIN)/spatialvla-jax demo --workdir runs/demo

sweep: .venv/.installed
	$(BIN)/spatialvla-jax sweep --config sweeps/grid_resolution --workdir runs/grid_resolution

# `test` is quick, `test-slow` runs the rest, `test-all` both.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

test: .venv/.installed
	$(PYTEST) -m "not slow"

test-slow: .venv/.installed
	$(PYTEST) -m slow

test-all: test test-slow

# LeRobot's and vla-eval's released packages, each in an environment under build/: 10 GB, so it is not in test-all.
integrations: .venv/.installed
	$(BIN)/python integrations/check.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

# The site, in site/; a warning or a broken link is an error.
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/.installed
	$(BIN)/mkdocs build --strict --quiet

notebooks: export XLA_FLAGS = --xla_backend_optimization_level=0
notebooks: .venv/.installed
	$(BIN)/python notebooks/execute.py

# Tests drive the server with it. It requires NumPy 1, so it can't be in the lock, but it runs with NumPy 2.
OPENPI_CLIENT := openpi-client==0.1.2

# Exact versions, so that a fresh clone gets the tested environment; `make lock` renews them.
.venv/.installed: requirements.lock pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps $(OPENPI_CLIENT)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock:
	$(BIN)/python -m pip install --upgrade --editable '.[torch,beam,lerobot,serve,gcs,s3,view,docs,dev]'
	$(BIN)/python -m pip freeze --exclude-editable --exclude openpi-client > requirements.lock

# Only what make has made: runs/ holds users' trained models.
clean:
	test ! -e .venv/.installed || rm -rf .venv
	rm -rf build site *.egg-info
