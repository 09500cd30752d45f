# make demo      a live demonstration on any machine: needs Python 3.11 or newer, no sensors
# make install   the environment for developers, in .venv
# make test      install, then every test
# make test-devices  the tests that need kernel devices, in a guest that has them (QEMU, Debian's kernel; no KVM)
# make lint      ruff, mypy --strict, import-linter
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo install test test-devices lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.base
	$(BIN)/sensorium run configs/demo.yaml
	@echo 'next: . $(BIN)/activate, then "sensorium devices" (what is here), or docs/tutorial.md (a model of your own)'

install: $(VENV)/.dev

# Two at a time: half of them wait for something most of the time. One test is handed out after the other, in order.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --maxschedchunk 1 $(PYTEST)

# The guest: one that lies beside this checkout, or else our own, which exits with 77 where it lacks something.
GUEST := $(firstword $(wildcard ../shared/devices/with-devices) tests/devices/guest)
GUEST_PYTEST := $(BIN)/python -m pytest -p no:cacheprovider -p no:randomly --color=no

test-devices: $(VENV)/.dev
	$(GUEST) -t 1200 -- $(GUEST_PYTEST) tests/devices
	SENSORS_IIO=1 $(GUEST) -t 300 -- $(GUEST_PYTEST) tests/devices/test_imu_guest.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# The stamps lie inside the environment, so that they vanish with it; a change of pyproject.toml installs anew.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer is here. On Debian 12 or Ubuntu 24.04 type: sudo apt-get install python3 python3-venv   (or name one: make PYTHON=/path/to/python3.12)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv or no pip. On Debian or Ubuntu type: sudo apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(BIN)/python
	@test -e $@ || echo "installing Sensorium into $(VENV), once; this takes a minute or two"
	$(PIP) --editable .
	@touch $@

# torch first, in the version that the tests are run with; silero-vad is only a model in a wheel, whose declared
# dependencies would bring more of it.
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) 'torch==2.13.0'
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps 'silero-vad==6.2.3' 'ouster-sdk==1.0.1'
	@touch $@ $(VENV)/.base
