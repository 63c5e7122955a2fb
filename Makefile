# `make demo` and `make test` need nothing but python3 (3.11 or newer), pip and make.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/quick
INSTALLED := .venv/.installed

.PHONY: demo test test-slow check docs benchmarks clean

demo: $(INSTALLED)
	$(BIN)/lossray run quick --out $(OUT)
	$(BIN)/lossray tables $(OUT)
	for table in runs curvature eigenvalues angles; do $(BIN)/lossray tables $(OUT) $$table --rows 4; done

test: $(INSTALLED) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m lossray.storage.tables > docs/tables.md

benchmarks: $(INSTALLED)
	$(BIN)/python -m benchmarks.packs
	$(BIN)/python -m benchmarks.utilisation

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,bench]"
	touch $@

clean:
	rm -rf .venv out build *.egg-info
