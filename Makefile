PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# .venv/installed names the Python of an environment that was filled to the end, and where it lies. An environment that
# was broken off, was moved, has lost its Python or has another one than the PYTHON given is replaced.
IDENTITY := import sys; print("%d.%d" % sys.version_info[:2], sys.prefix)
FOUND := $(shell { $(BIN)/python -c 'import pip; $(IDENTITY)' || echo nothing that runs; } 2>/dev/null)
ifeq ($(FOUND),$(shell cat $(VENV)/installed 2>/dev/null))
READY := $(if $(filter file,$(origin PYTHON)),yes,$(filter \
	$(firstword $(FOUND)),$(firstword $(shell $(PYTHON) -c '$(IDENTITY)' 2>&1))))
endif

# Old Pythons must understand it, too.
CHECK_PYTHON := import sys; v = sys.version_info[:3]; (3, 11) <= v[:2] <= (3, 13) or sys.exit("maskbeam needs Python 3.11 \
to 3.13, but $(PYTHON) is Python %d.%d.%d. Name another one, for example: make PYTHON=python3.12" % v)

# While pip is at work there is no .venv/installed. If pip itself gives up (no network), what was there is left alone.
define pip_install
	@mv -f $(VENV)/installed $(VENV)/unfinished
	@trap 'exit 130' INT TERM; $(BIN)/python -m pip install --editable '$(1)'; \
		code=$$?; mv -f $(VENV)/unfinished $(VENV)/installed; exit $$code
endef

.PHONY: help environment install demo check test test-clients test-engines lint format bench soak

# Tests at once. Whoever has more cores gives more: make test WORKERS=8. worksteal keeps a module's tests together until
# a worker has none left, so most of what tests of a module share is made once.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
EVERYDAY := not (processes or browser or model or slow or clients or engines)

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(VENV)/installed  ## create .venv and install maskbeam into it

environment:
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@if [ -n "$$(ls -A $(VENV) 2>/dev/null)" ]; then \
		[ -e $(VENV)/pyvenv.cfg ] && { [ $(VENV) = .venv ] || [ -e $(VENV)/installed ] || [ -e $(VENV)/unfinished ]; } || \
		{ echo "$(VENV) was not made by make, which would empty it: remove it, or name another place with VENV=" >&2; exit 1; }; \
		echo "$(VENV) is not finished or not of this Python and place: it is made again."; \
	fi
	@echo "Installing maskbeam, TensorFlow, Keras, Beam and what they need into $(VENV):"
	@echo "about 900 MB to download and 2.8 GB on disk. It takes minutes."
	@$(PYTHON) -m venv --clear $(VENV)
	@: > $(VENV)/installed

$(VENV)/installed: pyproject.toml $(if $(READY),,environment)
	$(call pip_install,.)
	@$(BIN)/python -c '$(IDENTITY)' > $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests need into $(VENV): about 320 MB to download and 1.6 GB on disk."
	$(call pip_install,.[dev])
	@touch $@

demo: install  ## label the shipped photos with the embedded model and draw the masks, into demo/
	$(BIN)/maskbeam demo --output demo

check: $(VENV)/installed-dev  ## style, types and the everyday tests
	@echo "Running ruff, mypy and the tests that need no process, browser or network of Keras. It takes minutes."
	@trap 'exit 130' INT TERM; \
	{ $(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && $(BIN)/mypy; } > $(VENV)/checked 2>&1 & lint=$$!; \
	tests=passed; $(PYTEST) -m "$(EVERYDAY)" || tests="FAILED (exit code $$?)"; \
	types=passed; wait $$lint || types="FAILED (exit code $$?)"; cat $(VENV)/checked; \
	echo "everyday tests: $$tests"; echo "style and types: $$types"; [ "$$tests $$types" = "passed passed" ]

test: $(VENV)/installed-dev  ## run the product's tests, the model's on both backends: half an hour at most on 2 cores
	@echo "Running the product's tests, then the model's on JAX, whatever the first say. It takes half an hour at most on 2 cores."
	@trap 'exit 130' INT TERM; all=passed; jax=passed; \
	$(PYTEST) -m "not (clients or engines)" || all="FAILED (exit code $$?)"; \
	KERAS_BACKEND=jax $(PYTEST) tests/transforms/models || jax="FAILED (exit code $$?)"; \
	echo "all tests: $$all"; echo "the model's tests on JAX: $$jax"; [ "$$all $$jax" = "passed passed" ]

test-clients: $(VENV)/installed-dev  ## read the output with other programs: pandas, DuckDB, datasets, pycocotools
	$(BIN)/python -m pytest -q -m clients

test-engines: $(VENV)/installed-dev  ## run the pipeline on other engines: Beam's portable runner, Dataflow's stub
	$(BIN)/python -m pytest -q -m engines

lint: $(VENV)/installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed  ## measure against the reference (installs torch); ARGS="--model vit_b" for flags
	$(call pip_install,.[bench])
	$(BIN)/python -m benchmarks.compare $(ARGS)

soak: install  ## the long run: 3,000 images, kills, damaged files; ARGS="--images 1200 --kills 5" for sizes
	$(BIN)/python -m benchmarks.soak $(ARGS)
