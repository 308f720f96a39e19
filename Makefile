# Everything lives in .venv; `make chat` and `make test` set it up first if needed.

PYTHON ?= python3
BIN := .venv/bin

LINKS ?= $(HOME)/.local/bin

.PHONY: help setup install uninstall cuda vulkan rocm cpu chat test test-clients check format bundle test-bundle clean

help:
	@echo "make setup   build .venv (compiles llama.cpp once)"
	@echo "make install  the same, and a link to localrun in ~/.local/bin; make uninstall removes it"
	@echo "make cuda    the same, llama.cpp for NVIDIA's GPUs; also: make vulkan, make rocm; make cpu: back"
	@echo "             for cards that are not in this machine: make cuda GPU_ARCH=89, make rocm GPU_ARCH=gfx1100"
	@echo "make chat    talk to the demo model"
	@echo "make test    run the tests in two processes; with PYTEST_ARGS=\"-n 0 tests/engine\" some of them in one"
	@echo "make test-clients  pi, Claude Code, Codex, OpenCode, Qwen Code and Continue from npm against localrun serve"
	@echo "make check   formatting, lint, types, import directions"
	@echo "make format  format the code"
	@echo "make bundle  a folder and a tar under dist/ for machines without a network"
	@echo "make test-bundle  install that where there is no network, and use every command"
	@echo "make clean   remove .venv and caches"

setup:
	@$(PYTHON) tools/bootstrap.py

install: setup
	@$(PYTHON) tools/link.py install "$(LINKS)"

uninstall:
	@$(PYTHON) tools/link.py uninstall "$(LINKS)"

cuda vulkan rocm cpu:
	@$(PYTHON) tools/bootstrap.py $@

chat: setup
	@$(BIN)/localrun chat

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 2 --dist worksteal $(PYTEST_ARGS)

test-clients: setup
	$(BIN)/python -m tools.test_clients $(CLIENTS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bundle: setup
	$(BIN)/python -m tools.bundle $(BUNDLE_ARGS)

test-bundle: bundle
	$(BIN)/python -m tools.bundle.prove

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
