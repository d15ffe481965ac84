# Everything a newcomer runs. Each target sets up what it needs; `make setup` runs once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-long check format bench clean-demo

setup: .venv/complete

# torch first: deepspeed's build looks for it.
.venv/complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ltx,wandb,dev]'
	touch $@

demo: setup  ## clips -> shards -> ZeRO-3 training in two processes -> generated clips and a table of scores
	bash benchmarks/demo.sh

test: setup  ## within 8 minutes on 2 cores
	$(BIN)/pytest -m "not long and not gpu" -n 2 --dist loadgroup

test-long: setup  ## kills, mutants and other tests of minutes, within 30 minutes on 2 cores
	$(BIN)/pytest -m "long and not gpu" --timeout 1500

check: setup  ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_floors.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## studies: each writes JSON and a picture under benchmarks/results
	$(BIN)/python benchmarks/packing.py --json benchmarks/results/packing.json --picture benchmarks/results/packing.png
	$(BIN)/python benchmarks/length_law.py --json benchmarks/results/length_law.json --picture benchmarks/results/length_law.png
	$(BIN)/python benchmarks/gaussian_law.py --json benchmarks/results/gaussian_law.json
	$(BIN)/python benchmarks/claims.py --budget quick --json benchmarks/results/claims.json --pictures docs/images --page docs/claims.md

clean-demo:
	rm -rf demo
