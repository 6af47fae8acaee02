# Two commands do everything: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
BUDGET ?= default
MINUTES ?= 600
UV = 0.13.8
MOTO = 5.2.5
BIN = .venv/bin
# Up to four processes, each with whole files: those share what a file's fixtures train.
PYTEST = $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile

.PHONY: demo test test-slow moto soak lint setup lock clean help

demo: setup  ## train a whole cascade from nothing, paint, measure, report (BUDGET=smoke: 2 minutes)
	$(BIN)/cascade demo budget=$(BUDGET)

test: setup  ## the tests that take minutes
	$(PYTEST)

test-slow: setup  ## real trainings
	$(PYTEST) -m slow

moto: build/moto/installed  ## install the server that tests of object stores start, apart from .venv

build/moto/installed:
	$(PYTHON) -m venv build/moto
	build/moto/bin/python -m pip install --quiet --disable-pip-version-check 'moto[server]==$(MOTO)'
	touch $@

soak: setup  ## 500 faults, hours of them; the same command goes on (MINUTES=30: at most so long)
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

lint: setup  ## what CI asks of the source
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --quiet
	rm -rf build/layers && mkdir -p build/layers
	cp -r cascade build/layers && cp -r eval slurm conf build/layers/cascade  # as it is installed
	cd build/layers && ../../$(BIN)/lint-imports --no-cache ../../pyproject.toml

setup: .venv/installed  ## install the locked versions into .venv

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 2; }
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@# Compiled once: where PYTHONDONTWRITEBYTECODE is set, every start would compile torch again.
	VIRTUAL_ENV=.venv $(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock: setup  ## choose new versions of the dependencies
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --extra dev --extra web --extra store --upgrade pyproject.toml -o requirements.lock

clean:  ## remove .venv and what a build leaves
	rm -rf .venv build *.egg-info

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
