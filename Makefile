# Common commands. Each target sets up what it needs; `make setup` runs once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

BENCHES := bench-packing bench-length-law bench-gaussian-law bench-claims bench-faults bench-planning bench-loading

.PHONY: setup setup-mds demo test test-long check format bench $(BENCHES) bench-gpu clean-demo

setup: .venv/complete

# torch first, because deepspeed's build requires it.
.venv/complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ltx,wandb,remote,dev]'
	touch $@

setup-mds: .venv-mds/complete  ## a second environment with mosaicml-streaming, for MDS sets

# The declared dependencies of mosaicml-streaming (transformers < 5, numpy < 2.2, torchvision, four cloud SDKs) conflict
# with diffusers and are not installed; flowception/shards/mds.py imports only the parts that do not need them.
.venv-mds/complete: pyproject.toml constraints.txt constraints-mds.txt
	$(PYTHON) -m venv .venv-mds
	.venv-mds/bin/pip install --quiet --constraint constraints.txt --upgrade pip setuptools wheel
	.venv-mds/bin/pip install --quiet --constraint constraints.txt torch numpy
	.venv-mds/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,remote]' transformers
	.venv-mds/bin/pip install --quiet --no-deps --requirement constraints-mds.txt
	.venv-mds/bin/pip install --quiet --constraint constraints.txt cramjam
	touch $@

demo: setup  ## clips -> shards -> ZeRO-3 training in two processes -> generated clips and a table of scores
	bash benchmarks/demo.sh

test: setup  ## about 4 minutes on 2 cores
	$(BIN)/pytest -m "not long and not gpu and not mds" -n 2 --dist loadgroup

test-long: setup setup-mds  ## kills, faults, mutants and other slow tests, about 12 minutes on 2 cores
	$(BIN)/pytest -m "long and not gpu and not mds" -n 2 --dist loadgroup --timeout 1500
	.venv-mds/bin/pytest -m mds --timeout 1500 tests/shards

check: setup  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup setup-mds  ## studies: each writes JSON and a plot or page; reports missed goals at the end
	$(MAKE) --keep-going --jobs=1 $(BENCHES)

bench-packing: setup
	$(BIN)/python benchmarks/packing.py --json benchmarks/results/packing.json --picture benchmarks/results/packing.png

bench-length-law: setup
	$(BIN)/python benchmarks/length_law.py --json benchmarks/results/length_law.json --picture benchmarks/results/length_law.png

bench-gaussian-law: setup
	$(BIN)/python benchmarks/gaussian_law.py --json benchmarks/results/gaussian_law.json

bench-claims: setup
	$(BIN)/python benchmarks/claims/run.py --budget quick --json benchmarks/results/claims.json --pictures docs/images --page docs/claims.md

bench-faults: setup
	$(BIN)/python benchmarks/faults.py --faults 200 --seed 0 --json benchmarks/results/training_faults.json --page docs/training_faults.md

bench-planning: setup
	$(BIN)/python benchmarks/planning.py --json benchmarks/results/planning.json --picture benchmarks/results/planning.png

bench-loading: setup-mds
	.venv-mds/bin/python benchmarks/loading.py --json benchmarks/results/loading.json --picture benchmarks/results/loading.png

bench-gpu:  ## twelve checks of the CUDA path on one GPU, under nine minutes; no setup needed with torch and .whl/
	bash benchmarks/gpu.sh
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) benchmarks/gpu/page.py

clean-demo:
	rm -rf demo
