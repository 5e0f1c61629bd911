# Every target sets up .venv by itself; set-up does nothing when it is already done.
#   PYTHON=python3.12      the Python that .venv is made with (3.11 to 3.14)
#   TORCH_INDEX=...        where to take torch's CPU build from, if pip does not find it
#   RUN=runs/x ARGS=...    demo's run folder; further arguments for mtp-graft or pytest
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
export TORCH_INDEX
# Compiled modules are kept: vLLM's, compiled anew, cost each of its processes 15 seconds of a core.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test setup setup-dev check lint types imports container format clean

help:
	@echo "make demo        set up .venv, then run the pipeline on the bundled tiny model"
	@echo "make test        set up .venv with the development tools, then run the tests"
	@echo "make check       ruff, mypy, import-linter, shellcheck and hadolint"
	@echo "make format      rewrite the code as ruff formats it"
	@echo "make clean       remove the environment and the tools' caches"

demo: setup
	.venv/bin/mtp-graft demo $(if $(RUN),--run $(RUN)) $(ARGS)

test: setup-dev
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

setup:
	@$(PYTHON) tools/setup_venv.py

setup-dev:
	@$(PYTHON) tools/setup_venv.py --dev

check: lint types imports container

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup-dev
	.venv/bin/mypy

imports: setup-dev
	.venv/bin/lint-imports

container: setup-dev
	.venv/bin/shellcheck docker/entrypoint.sh .ci/run benchmarks/*.sh
	.venv/bin/hadolint docker/Dockerfile

format: setup-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
