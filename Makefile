# Every target sets up .venv by itself; once that is done, a target starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUITES := brax,craftax,jumanji,navix,pgx,playground,xminigrid
SUITES_VENV := .venv-suites
SUITES_READY := $(SUITES_VENV)/.ready
DEMO := runs/demo
BENCH := runs/bench
SEEDS := 5
JOBS := 1

.PHONY: demo test test-suites lint format docs dist bench bench-full clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "grpo-jax needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	@# First, on its own: a torch that is there already is taken as it is, also a build for CPUs.
	$(BIN)/python -m pip install -q $$(grep '^torch==' requirements.txt)
	$(BIN)/python -m pip install -q -c requirements.txt -e '.[sb3,dev,docs]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/cartpole_sb3.py --out $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

# An environment of its own: people install grpo-jax without them, and the other tests must pass so.
$(SUITES_READY): pyproject.toml requirements.txt requirements-suites.txt
	test -x $(SUITES_VENV)/bin/python || $(PYTHON) -m venv $(SUITES_VENV)
	$(SUITES_VENV)/bin/python -m pip install -q --upgrade pip
	$(SUITES_VENV)/bin/python -m pip install -q -c requirements.txt -c requirements-suites.txt -e '.[$(SUITES),render]' \
		hypothesis pytest pytest-timeout pytest-xdist
	@# The tests skip what cannot be imported; here that is a fault.
	$(SUITES_VENV)/bin/python -W ignore -c 'import $(subst playground,mujoco_playground,$(SUITES))'
	touch $(SUITES_READY)

test-suites: $(SUITES_READY)
	@# Pictures of robots need EGL where there is no window.
	MUJOCO_GL=$$(MUJOCO_GL=egl $(SUITES_VENV)/bin/python -c 'import mujoco' 2>/dev/null && echo egl) \
		$(SUITES_VENV)/bin/python -m pytest -n 2 --dist loadfile -q \
		tests/worlds/test_suites.py tests/worlds/test_suite_details.py tests/worlds/test_suite_presets.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, in both languages, in site/; a link that leads nowhere is an error.
docs: $(READY)
	@# Not --quiet, which would hide warnings from --strict.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and source archive in dist/, as an index of packages would take them.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --quiet
	$(BIN)/python -m twine check --strict dist/*

# Some minutes: few environments. Rows that are there are not run again: remove $(BENCH) to measure other code.
bench: $(READY)
	$(BIN)/python benchmarks/bench.py --short --jobs $(JOBS) --out $(BENCH)-short

# Hours: all environments, all libraries; goes on where it was stopped.
bench-full: $(READY)
	$(BIN)/python benchmarks/bench.py --seeds $(SEEDS) --jobs $(JOBS) --out $(BENCH) --report docs/results

clean:
	rm -rf $(VENV) $(SUITES_VENV) runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
