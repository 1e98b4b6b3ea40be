# The two commands of a new user are `make quickstart` and `make test`; both build .venv once through `make setup`.
# Only relative paths are used, so that a checkout in a path with a space works.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup serve-env quickstart quickstart-vision test test-long test-serve test-serve-long test-unit parity check format bench clean \
        deepspeed-ops browser

PY := .venv/bin/python
STAMP := .venv/.rayswift-stamp
SERVE_STAMP := .venv-serve/.rayswift-stamp
OPS_STAMP := .venv/.deepspeed-ops-stamp
QUICKSTART_DIR ?= quickstart
UNIT := tests/unit tests/property
# One process a core; the other suites start several themselves. By file, as the tests of one share what is slow to make.
SIDE_BY_SIDE := --numprocesses=auto --maxprocesses=4 --dist=loadfile
export OMP_NUM_THREADS ?= 1

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP)  ## build .venv once (again when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt .ci/setup
	@bash .ci/setup
	@touch $(STAMP)

serve-env: $(SERVE_STAMP)  ## build .venv-serve, the environment of vLLM, once; serving then uses it

$(SERVE_STAMP): $(STAMP) pyproject.toml constraints-serve.txt .ci/setup-serve .ci/name_vllm.py .ci/torchvision_python.py
	@bash .ci/setup-serve
	@touch $(SERVE_STAMP)

quickstart: $(STAMP)  ## pretrain, fine-tune, export, serve and ask a small model on this machine
	@$(PY) -m rayswift.cli quickstart text --output "$(QUICKSTART_DIR)" --force

quickstart-vision: $(STAMP)  ## teach a small model to read real pictures of digits, export, serve and ask it
	@$(PY) -m rayswift.cli quickstart vision --output "$(QUICKSTART_DIR)-vision" --force

deepspeed-ops: $(STAMP)  ## build the extension that offloading to NVMe needs, once; needs libaio-dev
	@$(PY) -m rayswift.parallel.deepspeed_ops

# What cannot be built is told, and its test skipped.
$(OPS_STAMP): $(STAMP)
	@$(PY) -m rayswift.parallel.deepspeed_ops || true
	@touch $(OPS_STAMP)

test: $(STAMP) $(OPS_STAMP)  ## every suite but the long tests, with the slowest listed
	@$(PY) -m pytest $(UNIT) $(SIDE_BY_SIDE) -m "not long" --durations=10
	@$(PY) -m pytest $(addprefix --ignore=,$(UNIT)) -m "not long and not vllm" --durations=25

browser:  ## install Debian's Chromium, which the test of the chat page needs (it is skipped without)
	@bash .ci/browser

test-long: $(STAMP) $(OPS_STAMP)  ## the tests that take minutes each
	@$(PY) -m pytest -m "long and not vllm" --durations=25

test-serve: $(STAMP) $(SERVE_STAMP)  ## the tests of the real vLLM, in the environment that this builds
	@$(PY) -m pytest -m "vllm and not long" --durations=25

test-serve-long: $(STAMP) $(SERVE_STAMP)  ## more of them: images, embeddings, S3, beside vLLM's own server
	@$(PY) -m pytest -m "vllm and long" --durations=25

test-unit: $(STAMP)  ## unit and property tests only
	@$(PY) -m pytest $(UNIT) $(SIDE_BY_SIDE) -m "not long" --durations=10

parity: $(STAMP) $(OPS_STAMP)  ## every layout and every architecture against one process; keeps the results (half an hour)
	@failed=0; $(PY) bench/parity.py --keep || failed=1; $(PY) bench/architectures.py --keep || failed=1; exit $$failed

check: $(STAMP)  ## formatting, lint, strict types, unit tests
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) -m pytest $(UNIT) $(SIDE_BY_SIDE) -m "not long" -q

format: $(STAMP)  ## format and fix what ruff can fix
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

bench: $(STAMP)  ## every measurement of speed under bench/, each printing its own result
	@for file in $(filter-out bench/parity.py bench/architectures.py,$(wildcard bench/*.py)); do echo "== $$file"; $(PY) "$$file"; done

clean:  ## remove what the targets above made
	rm -rf .venv .venv-serve .pytest_cache .mypy_cache .ruff_cache .hypothesis rayswift.egg-info "$(QUICKSTART_DIR)"
