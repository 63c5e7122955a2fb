# `make demo` and `make test` need nothing but python3 (3.11 or newer), pip and make.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/quick
DEVICE ?= cuda
INSTALLED := .venv/.installed
PEERS := .venv/.peers
# Rooms whose numbers hang on how a processor computes, and the instructions that every x86-64 processor has.
NUMERICAL := $(addprefix tests/,spectra operators nullity geometry networks training storage study connectivity ensembles measures findings)
# What the first of the two processes of `make test` takes, so that both are of about the same length.
NUMBERS := $(NUMERICAL) tests/device
# Rooms that compute with numpy and pandas alone, for which OLDEST changes nothing.
PANDAS := $(addprefix tests/,storage study findings)
# Slow tests of the second process of `make test-slow`.
OTHER_SLOW := tests/findings tests/device
OLDEST := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41

.PHONY: demo test test-numbers test-flows test-slow test-long test-rates test-oldest check docs benchmarks gpu-check clean

demo: $(INSTALLED)
	$(BIN)/lossray run quick --out $(OUT)
	$(BIN)/lossray tables $(OUT)
	for table in runs curvature eigenvalues angles; do $(BIN)/lossray tables $(OUT) $$table --rows 4; done

# Two processes side by side: the numerical rooms, and what drives them, with and without Ray.
test: $(INSTALLED) check
	$(MAKE) --no-print-directory -j2 test-numbers test-flows

test-numbers: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -m "not slow" $(NUMBERS)

test-flows: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(addprefix --ignore=,$(NUMBERS))

# Two processes side by side, of about the same length.
test-slow: $(INSTALLED)
	$(MAKE) --no-print-directory -j2 test-long test-rates

test-long: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -m slow $(addprefix --ignore=,$(OTHER_SLOW))

test-rates: test-oldest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -m slow $(OTHER_SLOW)

test-oldest: $(INSTALLED)
	OMP_NUM_THREADS=1 $(OLDEST) $(BIN)/python -m pytest -m "not slow and not ray and not cluster" $(filter-out $(PANDAS),$(NUMERICAL))

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m lossray.storage.tables > docs/tables.md
	$(BIN)/python -m lossray.study.settings_page > docs/settings.md

benchmarks: $(INSTALLED) $(PEERS)
	$(BIN)/python -m benchmarks.packs
	$(BIN)/python -m benchmarks.packed_analysis
	$(BIN)/python -m benchmarks.curvature
	$(BIN)/python -m benchmarks.curves
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.script
	$(BIN)/python -m benchmarks.utilisation

# On a machine with a GPU, below eight minutes, in PYTHON as it is: nothing is installed. DEVICE=cpu: a dry run.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --device $(DEVICE)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# The peers of the extra `bench`, without their own dependencies: those would bring another torch.
$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps \
		"hessian-eigenthings>=1.0.0a5" pyhessian
	touch $@

clean:
	rm -rf .venv out build *.egg-info
