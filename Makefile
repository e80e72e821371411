PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install demo test lint format bench soak

help:  ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

install: $(VENV)/installed  ## create .venv and install maskbeam into it

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install  ## label the shipped photos with the embedded model and draw the masks, into demo/
	$(BIN)/maskbeam demo --output demo

test: $(VENV)/installed-dev  ## run the tests, the model's on both backends
	$(BIN)/python -m pytest -q
	KERAS_BACKEND=jax $(BIN)/python -m pytest -q tests/test_sam.py tests/test_golden.py

lint: $(VENV)/installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed  ## measure against the reference (installs torch); ARGS="--model vit_b" for flags
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks.compare $(ARGS)

soak: install  ## the long run: 3,000 images, kills, damaged files; ARGS="--images 1200 --kills 5" for sizes
	$(BIN)/python -m benchmarks.soak $(ARGS)
