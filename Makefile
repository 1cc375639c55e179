# `make test` and `make demo` work on a fresh clone: they make their own environment in .venv.
# On a machine with its own torch (a GPU machine), name its Python: make test PYTHON=python3 ENVIRONMENT=
PYTHON ?= .venv/bin/python
ENVIRONMENT ?= .venv/installed
TORCH ?= torch==2.13.0
JOBS ?= 2
# Shared by all tests, so that what one compiled another finds; one thread each, since tests run side by side.
TEST_ENV = OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.pytest_cache/inductor

.PHONY: test demo lint types bench clean

test: $(ENVIRONMENT)
	$(TEST_ENV) $(PYTHON) -m pytest -n $(JOBS) --dist worksteal -q

demo: $(ENVIRONMENT)
	$(PYTHON) -m torch_mamba_ops demo

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(MAKE) types

types: $(ENVIRONMENT)
	$(PYTHON) -m mypy

bench: $(ENVIRONMENT)
	$(PYTHON) benchmarks/reference_ssd.py
	$(PYTHON) benchmarks/overhead.py

.venv/installed: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet "$(TORCH)" "triton>=3.7,<3.8" "transformers==5.17.0"
	.venv/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
