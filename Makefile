# Every target sets itself up: a virtual environment in .venv with the versions pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# A file of tests on each core, in the order of tests/conftest.py.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
# All of them: make test-clusters CLUSTERS=clusters
CLUSTERS ?= clusters and not wide
STYLE := $(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && $(BIN)/codespell && $(BIN)/mypy

.PHONY: help demo check test test-faults test-clusters test-vllm test-all chaos bench docs ui image test-image install clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1  \t/p' Makefile

demo: install  ## train with and without sleep, compare, draw (minutes)
	$(BIN)/powernap demo

check: install  ## lint, types, and the tests that start no process (within a minute, the second time)
	$(STYLE)
	$(BIN)/python -m pytest $(TWO) --quick -q -r fE

test: install .venv/kernels  ## lint, types, and a test of everything promised: four to seven minutes on two cores
	$(STYLE)
	$(BIN)/python -m pytest $(TWO)

test-faults: install  ## runs that are stopped, killed, damaged and taken up in other layouts
	$(BIN)/python -m pytest $(TWO) -m "faults and not wide"

test-clusters: install  ## jobs on a real SLURM and a real Kubernetes API server; gets what is missing of them
	.ci/install-slurm
	.ci/build-kube-apiserver
	POWERNAP_TEST_CLUSTERS=1 $(BIN)/python -m pytest $(TWO) -m "$(CLUSTERS)" tests/launch

test-vllm: install  ## exports in Hugging Face's format, served by vLLM on the CPU; gets vLLM (3.5 GB)
	.ci/install-vllm
	POWERNAP_TEST_VLLM=1 $(BIN)/python -m pytest tests/train/hugging_face/test_vllm.py

test-all: install .venv/kernels  ## tests, faults, and what is wide: grids in full, long walks (an hour or more)
	$(BIN)/python -m pytest $(TWO) -m "wide or not wide"

chaos: install  ## 100 runs killed, stopped or damaged at random moments, resumed and compared
	$(BIN)/python -m tests.helpers.chaos --trials 100

bench: install  ## measure speed and memory on this machine, into benchmarks/results/
	$(BIN)/python -m benchmarks

docs: install  ## these pages as a site, in runs/site; a broken link is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build

ui: install  ## browse the runs in MLflow on http://127.0.0.1:5000
	$(BIN)/powernap ui

# Asked for on the command line: BASE_IMAGE, IMAGE (its name), EXTRAS, BUILDER (docker, podman or buildah); docker/README.md.
image:  ## the image for clusters, with docker, podman or buildah
	@docker/build

test-image:  ## the same image on a plain Debian base, built without a daemon and tried; as root, with apt-get
	@.ci/build-image

install: .venv/installed  ## the virtual environment alone

# torch alone first, at one version: pip must not pick another for a library that asks for any. Where PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL offer a CPU wheel of it, pip prefers that one.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "powernap needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh .ci/install-venv
	@echo "Installing into .venv: about 2.5 GB, some minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[text,test]'
	@touch $@

# FLA's kernels for tests that interpret them; apart, since transformers would call them where no GPU is. Where there is no wheel of
# Triton the tests are skipped.
.venv/kernels: constraints.txt
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps --upgrade --target $@ triton fla-core || echo "no Triton here"

clean:  ## remove the virtual environment (runs/ and data/ stay)
	rm -rf .venv
