# All that people type. `make mount` and `make test` set up what they need, once.

SHELL := /bin/sh
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?=
SRC ?= build/demo/shared
MNT ?= build/demo/mnt
ARGS ?=
BIN := .venv/bin

.PHONY: help setup mount test test-guest bench fuzz lint types daemons test-packages clean

help:
	@echo "make mount [SRC=dir] [MNT=dir]  share SRC with the bundled daemon, mount it at MNT, until Ctrl-C"
	@echo "make test  [ARGS='-k name']     every test (brings the real host daemons); ARGS go to pytest"
	@echo "make test-guest [ARGS=...]      a Linux guest in QEMU mounts the share (minutes; Debian)"
	@echo "make bench [ARGS=...]           measure against native and other FUSE filesystems"
	@echo "make fuzz  [ARGS='requests --seconds 600']  what guests send to the bundled daemon, 3 minutes"
	@echo "make lint                       ruff: rules and format"
	@echo "make types                      mypy --strict"
	@echo "make setup                      system packages and .venv; instant when done"
	@echo "make clean                      remove all that make made"

setup: .venv/ready
	@:

# The stamp is newer than what decides about its content. A .venv that is there is kept and brought
# up to date, unless its interpreter is gone (a Python upgrade, a moved folder). An editable install by
# path: the default, a finder in Python, adds 40 ms to every start of the interpreter.
.venv/ready: pyproject.toml tools/system-packages.sh tools/find-python.sh
	@set -e; python=$$(tools/find-python.sh $(PYTHON)); \
	tools/system-packages.sh "$$python"; \
	echo "Setting up .venv with $$python (a minute or two, once) ..."; \
	$(BIN)/python -c '' 2>/dev/null || "$$python" -m venv --clear .venv; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check \
		--config-settings editable_mode=compat --editable '.[test,dev]'; \
	touch $@

daemons: setup
	@$(BIN)/python tools/fetch_daemons.py

test-packages: setup
	@tools/system-packages.sh $(BIN)/python test

# The defaults are made on the spot; folders that you name are yours to make.
build/demo/mnt:
	@mkdir -p build/demo/shared
	@mkdir -p build/demo/mnt 2>/dev/null || true # fails on a dead mount; vfsmount says what to do
	@echo "This file lives in build/demo/shared on the host." > build/demo/shared/hello.txt

# exec, so that the SIGTERM that make hands to its child reaches vfsmount. It unmounts, and only then
# does make end: 0 after `vfsmount umount`, not 0 when the mount failed, make's own "Interrupt" after
# Ctrl-C (a clean end, too).
mount: setup $(filter build/demo/mnt,$(MNT)) $(if $(filter build/demo/shared,$(SRC)),build/demo/mnt)
	@echo "Mounting $(SRC) at $(MNT); Ctrl-C unmounts."
	@exec $(BIN)/vfsmount "$(MNT)" --source "$(SRC)"

test: setup test-packages daemons
	@$(BIN)/python -m pytest $(ARGS)

test-guest: setup test-packages daemons
	@tools/system-packages.sh $(BIN)/python guest
	@$(BIN)/python tools/fetch_guest.py
	@$(BIN)/python -m pytest -m guest -o faulthandler_timeout=300 $(ARGS)

bench: setup test-packages daemons
	@tools/system-packages.sh $(BIN)/python bench || true # a subject that cannot run says why
	@$(BIN)/python -m benchmarks $(ARGS)

# As root on a small tmpfs in a mount namespace of its own. Inputs are kept in build/fuzz.
fuzz: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -qq --disable-pip-version-check \
		--config-settings editable_mode=compat --editable '.[fuzz]'
	@$(BIN)/python -m benchmarks.fuzz $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

# Never through a mount: --one-file-system, and a live demo mount is unmounted first.
clean:
	@! mountpoint -q build/demo/mnt || fusermount3 -u build/demo/mnt
	rm -rf --one-file-system .venv .cache build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
