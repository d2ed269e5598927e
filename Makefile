# In the order of use. Everything runs from .venv, which `setup` makes.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: setup demo test test-slow test-s3 bench-samplers bench-backbone bench-encode bench-reader bench-train bench-learning check format clean

setup: .venv/.ready  ## the virtual environment, versions locked in infra/constraints.txt

.venv/.ready: pyproject.toml infra/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0 -c infra/constraints.txt
	$(BIN)/pip install --quiet -e '.[pipelines,dev]' -c infra/constraints.txt
	touch $@

demo: setup  ## raw files to an answered request; leaves demo/report.html
	$(BIN)/ldm demo image-s --root demo --data demo/data

test: setup  ## the whole suite but the slow part, on two processes; first without Ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m "not ray and not slow"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "ray and not slow"

test-slow: setup  ## minutes, not seconds
	$(BIN)/python -m pytest --timeout 3600 -m slow

test-s3: setup  ## what reads and writes buckets, on a real S3 server: Ceph's, from Debian's packages
	OMP_NUM_THREADS=1 infra/local/s3.py run $(BIN)/python -m pytest --timeout 3600 -k "s3 or bucket"

bench-samplers: setup  ## solvers beside diffusers' and k-diffusion's: evaluations against error
	$(BIN)/pip install --quiet --no-deps k-diffusion==0.1.1.post1 torchsde trampoline torchdiffeq
	PYTHONPATH=tests $(BIN)/python tests/benchmarks/bench_samplers.py

bench-backbone: setup  ## our transformers against diffusers', in one run; ARGS="--models dit"
	$(BIN)/python tests/benchmarks/bench_backbone.py $(ARGS)

bench-encode: setup  ## the encode job against its encoders alone and a plain loop
	$(BIN)/python tests/benchmarks/bench_encode.py $(ARGS)

bench-reader: setup  ## the training reader against Ray Data and DataLoaders, local and S3
	$(BIN)/pip install --quiet datasets -c infra/constraints.txt
	PYTHONPATH=tests $(BIN)/python tests/benchmarks/bench_reader.py $(ARGS)

bench-train: setup  ## the training loop against its network alone and a plain loop of diffusers' kind
	PYTHONPATH=tests $(BIN)/python tests/benchmarks/bench_train.py $(ARGS)

bench-learning: setup  ## what image-s learns in minutes, choice by choice; ARGS="--minutes 20"
	$(BIN)/python tests/benchmarks/bench_learning.py $(ARGS)

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## everything but sources and the demo's products
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
