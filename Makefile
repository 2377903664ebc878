# HLFS: `make help` lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Debian's own interpreter, whatever else is first in PATH.
PYTHON := /usr/bin/python3
VENV_PYTHON := .venv/bin/python
PYTHON_SOURCES := hlfsfs mountd tests contrib bench
CORE_SOURCES = $(shell find hlfsfs/core tests bench -name '*.cpp' -o -name '*.hpp' -o -name '*.c')
JOBS := $(shell nproc)
# Tests wait half of their time: for disks, guests, and each other.
TEST_PROCESSES := 4
# How much longer than `make test` the fuzzers of `make hunt` run.
HUNT_TIMES := 20
# Rounds of each of the core's tests that are at random; a usual one does two to ten.
HUNT_ROUNDS := 20
# Several people or jobs may build in one checkout: they take turns.
LOCKED := flock build/.lock

.PHONY: help setup build demo test check bench manual package hunt clean packages native core-tests fuzzers fuzz

help:  ## List the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: build build/guest/stamp build/promtool  ## Install packages, make .venv, build the core, fetch what tests need

build: packages .venv/stamp native  ## Build the native core again where needed

demo: setup  ## Show it: a virtual machine boots from a volume, writes to it, and the data is there after a remount
	@$(VENV_PYTHON) -m contrib.demo

test: setup core-tests fuzz  ## Run all tests: the core's own under sanitizers, then the rest
	timeout --foreground --signal=INT 1800 $(VENV_PYTHON) -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder

check: setup fuzzers  ## Lint, formatting, types and layering; the core by a second compiler
	.venv/bin/ruff check $(PYTHON_SOURCES)
	.venv/bin/ruff format --check $(PYTHON_SOURCES)
	.venv/bin/mypy $(PYTHON_SOURCES)
	clang-format --dry-run -Werror $(CORE_SOURCES)
	$(VENV_PYTHON) -m pytest --quiet tests/test_layering.py

bench: setup  ## Measure against the raw disk and qemu-storage-daemon
	$(VENV_PYTHON) -m bench all
	$(VENV_PYTHON) -m bench chart

manual: setup  ## Make man pages, and completion for shells, in build/manual
	$(VENV_PYTHON) -m contrib.manual build/manual

package: packages  ## Build the Debian package in build/package, and try it in a clean Debian 12 (root, 5 minutes)
	contrib/setup/packages.sh package
	contrib/debian/try.sh build/package

hunt: setup  ## Search for faults at random, for longer than `make test` does
	contrib/setup/fuzz.sh $(JOBS) $(HUNT_TIMES)
	HLFS_ROUNDS=$(HUNT_ROUNDS) contrib/setup/core-tests.sh $(JOBS) address
	$(VENV_PYTHON) -m pytest --numprocesses=2 --dist=loadfile -m hunt --timeout=0 -o faulthandler_timeout=0 --hypothesis-profile=hunt

clean:  ## Remove everything that was built
	rm -rf build dist .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache hlfsfs/_core*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

packages:
	@contrib/setup/packages.sh build check test

build/.lock:
	@mkdir -p build && touch $@

.venv/stamp: pyproject.toml contrib/setup/venv.sh | packages build/.lock
	$(LOCKED) contrib/setup/venv.sh $(PYTHON)
	@touch $@

native: .venv/stamp | packages build/.lock
	@$(LOCKED) contrib/setup/native.sh $(JOBS)

build/guest/stamp: contrib/setup/guest-kernel.sh | packages build/.lock
	$(LOCKED) contrib/setup/guest-kernel.sh build/guest
	@touch $@

build/promtool: contrib/setup/promtool.sh | packages build/.lock
	$(LOCKED) contrib/setup/promtool.sh $@

core-tests: | packages build/.lock
	@contrib/setup/core-tests.sh $(JOBS) address thread

fuzzers: | packages build/.lock
	@contrib/setup/fuzz.sh $(JOBS) 0

fuzz: | packages build/.lock
	@contrib/setup/fuzz.sh $(JOBS)
