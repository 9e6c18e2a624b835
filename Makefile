# From a fresh clone: `make serve` to try it, `make test` to check it. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL ?=
TP ?=
ARGS ?=
PYTEST_FLAGS ?=
# Tests run in as many processes as cores and memory allow (tests/workers.py); WORKERS= takes one.
WORKERS ?= -n auto --dist loadgroup

ROOT := $(CURDIR)
# This clone's code, and the metadata that announces its plug-in (see .lt below).
export PYTHONPATH := $(ROOT):$(ROOT)/.lt

# The environment is installed without bytecode. Unless Python may keep what it compiles, every process of
# every server start compiles SGLang and torch again: a minute each.
unexport PYTHONDONTWRITEBYTECODE
# A library's complaint at interpreter exit, which would hide pytest's closing line.
export PYTHONWARNINGS := ignore:builtin type swigvarlink has no __module__ attribute:DeprecationWarning

# Recursive, so that only targets that use them pay for them.
ENV_PATH = $(shell $(PYTHON) scripts/env.py path)
BIN = $(ENV_PATH)/bin
PY = $(BIN)/python
RUN = $(PY) scripts/run.py $(PY)

.PHONY: help env packages model serve run test test-unit test-property fuzz-long mutation touch-prefix test-contract test-engine test-slow test-gpu manifest manifests charts sbom ruff lint typecheck lock hooks wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo
	@echo 'make serve [MODEL=folder-or-name] [TP=2] [ARGS="--port 30001 ..."]'
	@echo 'make test [PYTEST_FLAGS="-v -k name"] [WORKERS=]     make env [PYTHON=python3.12]'

env: .lt/made ## build the Python environment, once, outside the clone

packages:
	@$(PYTHON) scripts/env.py build

# SGLang finds plug-ins through installed packages' entry points. The environment is shared between clones, so an
# editable install into it would point at whichever clone was installed last. Instead each clone has a folder .lt
# with the metadata that pip would have written; with both on PYTHONPATH, Python sees lt-sglang as installed.
.lt/made: pyproject.toml lt_sglang/__init__.py | packages
	@rm -rf .lt && mkdir .lt
	@$(PY) -c 'from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel(".lt")' > /dev/null
	@rm -r .lt/*.egg-info && touch $@

model: env ## convert the demo model, once, and print its folder
	@$(PY) -m lt_sglang.demo.smollm2

serve: env ## serve MODEL; without one, the demo model with half its layers lazy
	@exec $(PY) -m lt_sglang serve $(if $(MODEL),--model-path $(MODEL)) $(if $(TP),--tp-size $(TP)) $(ARGS)

run: env ## any command of lt-sglang: make run ARGS="plan --shape mistral-7b"
	@exec $(PY) -m lt_sglang $(ARGS)

test: lint typecheck ## lint, types and all tests without a GPU, but the slow ones
	@$(RUN) -m pytest $(WORKERS) $(PYTEST_FLAGS) -m 'not gpu and not slow' \
	    $(wildcard tests/unit tests/property tests/contract tests/loadtest tests/deploy tests/engine)

test-unit: env ## fast tests; no server
	@$(RUN) -m pytest $(PYTEST_FLAGS) tests/unit

test-property: env ## 10,000 steps of any order of events over the caches; LT_SEED, LT_STEPS
	@$(RUN) -m pytest $(PYTEST_FLAGS) tests/property

fuzz-long: export LT_STEPS ?= 400000
fuzz-long: env ## long property tests and many hostile requests: make fuzz-long EXAMPLES=20000
	@FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(RUN) -m pytest $(PYTEST_FLAGS) -s -m 'not gpu' \
	    $(wildcard tests/property tests/engine/test_fuzz.py)

mutation: env ## do the tests notice small faults? up to an hour; writes tests/mutation/score.json
	@$(RUN) -m tests.mutation.run $(ARGS)

touch-prefix: env ## how long a look at 128 waiting requests takes, over 64 to 4,096 conversations
	@$(RUN) -m tests.property.touch_prefix

test-contract: env ## the hooks against the pinned SGLang
	@$(RUN) -m pytest $(PYTEST_FLAGS) tests/contract

test-engine: env ## real servers on the CPU
	@$(RUN) -m pytest $(PYTEST_FLAGS) -m 'not gpu' tests/engine

test-slow: env ## what takes minutes each: gateway, Ray, a live Prometheus, metrics of tp 2, checkov
	@$(RUN) -m pytest $(PYTEST_FLAGS) -m slow tests

test-gpu: env ## what needs a CUDA device
	@$(RUN) -m pytest $(PYTEST_FLAGS) -m gpu tests

manifest: ## print a Kubernetes manifest: make manifest MODEL=me/my-model TP=4 ARGS="--lt-lazy-layers 8-23"
	@$(PYTHON) k8s/render.py $(MODEL) $(if $(TP),--tp $(TP)) $(ARGS)

manifests: env ## write k8s/manifests, the charts' schemas and READMEs again, after a change of a chart
	@$(PY) k8s/chart_docs.py
	@$(PY) k8s/render.py --all

charts: ## package the charts to dist/
	@$(PYTHON) k8s/render.py --package dist

sbom: ## write what the images install, as CycloneDX, to dist/
	@$(PYTHON) deploy/tools/sbom.py dist

ruff: env ## ruff's rules and format; changes nothing
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

lint: ruff ## ruff, the layers of imports (import-linter), declared packages (deptry)
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/deptry --no-ansi lt_sglang deploy k8s scripts
	@$(BIN)/deptry --no-ansi loadtest tests --exclude '^$$' --ignore DEP002,DEP004

typecheck: env ## mypy --strict, with torch's types
	@$(PY) -m mypy

lock: ## resolve the dependencies again, in seconds; UPGRADE=1 takes newer versions
	@$(PYTHON) scripts/env.py lock $(if $(UPGRADE),--upgrade)

hooks: env ## check format, rules and subject at each commit of this clone, lint and types before a push
	@$(PY) -m pre_commit install

wheel: env ## write the wheel to dist/
	@$(PY) -m build --no-isolation --wheel

clean: ## delete what make left in the clone (the environment is kept)
	@rm -rf .lt .mypy_cache .pytest_cache .ruff_cache build dist ./*.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
