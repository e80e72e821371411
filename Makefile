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

.PHONY: help environment install demo test lint format bench soak

help:  ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

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

test: $(VENV)/installed-dev  ## run the tests, the model's on both backends: half an hour on 2 cores
	@echo "Running all tests, then the model's on JAX, whatever the first say. It takes half an hour on 2 cores."
	@trap 'exit 130' INT TERM; all=passed; jax=passed; \
	$(BIN)/python -m pytest -q || all="FAILED (exit code $$?)"; \
	KERAS_BACKEND=jax $(BIN)/python -m pytest -q tests/transforms/models || jax="FAILED (exit code $$?)"; \
	echo "all tests: $$all"; echo "the model's tests on JAX: $$jax"; [ "$$all $$jax" = "passed passed" ]

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
