# make demo    compile the bundled model, run it, measure it, show the report
# make test    ruff, mypy, pytest
# All of it happens in a virtual environment of its own; only Python 3.11+ with pip must be there.

PYTHON ?= python3
VENV ?= .venv
# A CPU build of torch is enough. Where pip would fetch a CUDA build by itself (Linux without a GPU),
# TORCH_FLAGS='--index-url URL' can name an index of CPU wheels.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
TEST_JOBS ?= 2

bin := $(VENV)/bin
installed := $(VENV)/.tokenmill-installed

.PHONY: demo test lint format clean

demo: $(installed)
	$(bin)/python examples/demo.py

test: lint
	$(bin)/python -m pytest -n $(TEST_JOBS)

# mypy takes the package's name from its directory, and a clone may be called anything.
lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	mkdir -p build/mypy && ln -sfn ../.. build/mypy/tokenmill
	cd build/mypy && $(abspath $(bin))/mypy -p tokenmill \
	  --config-file ../../pyproject.toml --no-namespace-packages --exclude /tests/

format: $(installed)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf build $(installed)

$(installed): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'tokenmill needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install $(TORCH_FLAGS) '$(TORCH)' || $(bin)/python -m pip install 'torch>=2.11'
	$(bin)/python -m pip install -e '.[hf,onnx,dev]'
	touch $@
