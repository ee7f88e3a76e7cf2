# Two commands do it all on a fresh machine: make demo, make test.
#
#   make demo TENSORFLOW='tensorflow[and-cuda]==2.21.0'   the GPU build
#   make demo TENSORFLOW=tensorflow-cpu==2.18.1 CONSTRAINTS=/dev/null
#   make demo PYTHON=python3.12 ARGS='--config.seed=3'

PYTHON ?= python3
TENSORFLOW ?= tensorflow-cpu==2.21.0
CONSTRAINTS ?= constraints.txt
WORKDIR ?= runs/demo
ARGS ?=

export TFDS_DATA_DIR ?= $(CURDIR)/data
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Every job has a time limit, and ends its own processes.
HOROVODRUN = timeout --kill-after=10 $(1) horovodrun -np 2
TRAIN_DEMO = python -m horovod_recipes.train --config=demo

.PHONY: demo test lint unit-tests parallel-tests demo-seeds clean

demo: .venv/done data/mnist5k
	$(call HOROVODRUN,900) $(TRAIN_DEMO) --workdir=$(WORKDIR) --overwrite $(ARGS)
	@cat $(WORKDIR)/summary.json

test: lint unit-tests parallel-tests

lint: .venv/done
	ruff check .
	ruff format --check .

# The doctests are those of the README and of the docstrings.
unit-tests: .venv/done data/mnist5k
	timeout --kill-after=10 1200 python -m pytest

parallel-tests: .venv/done data/mnist5k
	$(call HOROVODRUN,900) python -m pytest tests/parallel

# The demo over five seeds, for the README: 5 minutes on 2 cores.
demo-seeds: .venv/done data/mnist5k
	mkdir -p docs/results
	rm -f docs/results/demo_seeds.jsonl
	for seed in 0 1 2 3 4; do \
	  $(call HOROVODRUN,900) $(TRAIN_DEMO) --config.seed=$$seed \
	    --workdir=runs/seed$$seed --overwrite || exit 1; \
	  cat runs/seed$$seed/summary.json >> docs/results/demo_seeds.jsonl; \
	done
	@cat docs/results/demo_seeds.jsonl

.venv/done: setup.py pyproject.toml constraints.txt horovod_recipes/install_horovod.py
	$(PYTHON) -m venv .venv
	pip install --quiet --constraint $(CONSTRAINTS) "$(TENSORFLOW)" \
	  --editable ".[recipes,demo,test]"
	python -m horovod_recipes.install_horovod
	touch $@

data/mnist5k: | .venv/done
	python -m horovod_recipes.datasets mnist5k

clean:
	rm -rf .venv data runs build *.egg-info
