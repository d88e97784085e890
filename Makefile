# Everything runs in .venv, which the first target that needs it makes. PYTHON names the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
# One thread per test worker: two workers on two cores otherwise fight for them.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
export HF_HUB_OFFLINE ?= 1

# A benchmark by name, its options in ARGS: make bench OP=int4_matmul ARGS='--seconds 100'
OP ?= int4_matmul

.PHONY: demo test test-gpu bench check format install clean

demo: install  ## the main job: the built-in model reads the example archive and answers a question about it
	$(BIN)/salalocal ask --model builtin --file examples/beacon.tar.gz "What is the value of MAX_RETRIES in config.py?"

test: install  ## all tests that need no GPU
	$(ONE_THREAD) $(BIN)/pytest -n 2 --dist worksteal

test-gpu: install  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu tests/gpu

bench: install  ## one of benchmarks/, on the machine's CUDA device: OP=int4_matmul
	PYTHONPATH=. $(BIN)/python benchmarks/$(OP).py $(ARGS)

check: install  ## format, lint, types, who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "salalocal needs Python 3.11 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
