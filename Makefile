# Two commands do it all on a fresh machine: make demo, make test.
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

# The interpreter itself, also where PYTHON is that of an active environment.
BASE_PYTHON := $(shell $(PYTHON) -c 'import sys; print(sys._base_executable)')
ifeq ($(BASE_PYTHON),)
$(error $(PYTHON) does not run; name a Python 3.10 to 3.12: make PYTHON=...)
endif

BIN := $(CURDIR)/.venv/bin
export TFDS_DATA_DIR ?= $(CURDIR)/data
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

MPICXX := $(shell command -v mpicxx 2> /dev/null)
NO_MPI = no mpicxx here (Debian: libopenmpi-dev, openmpi-bin): no test under MPI

DATA := $(TFDS_DATA_DIR)/mnist5k/1.0.0/dataset_info.json
SETTINGS := $(BASE_PYTHON) $(TENSORFLOW) $(CONSTRAINTS)

# Every job has a time limit, in seconds, and ends its own processes. Without
# --gloo, horovodrun takes MPI where Horovod was built with it.
TWO_RANKS = timeout --kill-after=10 1800 \
  $(BIN)/horovodrun --gloo -np 2 $(BIN)/python
TWO_MPI_RANKS = timeout --kill-after=10 1800 \
  $(BIN)/horovodrun --mpi -np 2 $(BIN)/python
# A test that hangs, on either rank, has both write the stacks of their threads
# and end.
PARALLEL_PYTEST = -m pytest -o faulthandler_exit_on_timeout=true
TRAIN_DEMO = -m horovod_recipes.train --config=demo --overwrite

ANY_BACKEND_TESTS = $(addprefix tests/keras_lars/, \
  exactness_test.py schedules_test.py callbacks_test.py)

.PHONY: demo test lint unit-tests parallel-tests mpi-tests job-tests \
  test-cluster slurm-tests torch-tests gpu-build-test demo-seeds bench clean \
  always

demo: .venv/done $(DATA)
	$(TWO_RANKS) $(TRAIN_DEMO) --workdir=$(WORKDIR) $(ARGS)
	@cat $(WORKDIR)/summary.json

test: lint unit-tests parallel-tests

lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The doctests are those of the README and of the docstrings.
unit-tests: .venv/done $(DATA)
	timeout --kill-after=10 1800 $(BIN)/python -m pytest
	KERAS_BACKEND=jax timeout --kill-after=10 600 $(BIN)/python -m pytest \
	  $(ANY_BACKEND_TESTS)

# PyPI's torch for Linux brings CUDA, several GB; the CPU's is on its own index.
torch-tests: .venv/done
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps "$(TIMM)"
	KERAS_BACKEND=torch timeout --kill-after=10 600 $(BIN)/python -m pytest \
	  $(ANY_BACKEND_TESTS)
	timeout --kill-after=10 600 $(BIN)/python -m pytest \
	  tests/keras_lars/exactness_test.py -k timm

parallel-tests: .venv/done $(DATA)
	$(TWO_RANKS) $(PARALLEL_PYTEST) tests/parallel

# The same under MPI, and whole jobs.
mpi-tests: .venv/done $(DATA)
ifdef MPICXX
	$(TWO_MPI_RANKS) $(PARALLEL_PYTEST) tests/parallel
	timeout --kill-after=10 1200 $(BIN)/python -m pytest tests/mpi_jobs
else
	@echo "$(NO_MPI)"
endif

# Builds Horovod for GPUs, in an environment of its own, and loads it on this
# machine, which needs no GPU. Downloads 2 GB.
gpu-build-test:
	$(BASE_PYTHON) -m venv --clear build/gpu
	build/gpu/bin/python -m pip install --quiet --constraint constraints.txt \
	  "$(GPU_TENSORFLOW)" pytest
	build/gpu/bin/python -m horovod_recipes.install_horovod --gpu
	timeout --kill-after=10 600 build/gpu/bin/python -m pytest tests/gpu_build
	rm -rf build/gpu

# Whole jobs: killed, resumed; ImageNet's recipes, on photos that this downloads.
job-tests: .venv/done $(DATA)
	$(BIN)/python -m benchmarks.photos
	timeout --kill-after=10 3000 $(BIN)/python -m pytest tests/whole_jobs

# As root on Linux, with iproute2 and openssh-server: jobs on two hosts made of
# network namespaces, of which links are cut and ranks are killed.
test-cluster: .venv/done $(DATA)
	$(BIN)/python -m tests.cluster.hosts
	timeout --kill-after=30 2400 $(BIN)/python -m pytest tests/cluster

# As root on Debian: installs Slurm, and starts it for one node.
slurm-tests: .venv/done $(DATA)
	timeout --kill-after=10 1200 tests/slurm/run.sh

# The demo over five seeds, for the README: 11 minutes on 2 cores.
demo-seeds: .venv/done $(DATA)
	mkdir -p docs/results
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
	  assert sum(top1) / 5 >= 97 and min(top1) >= 96.5'

# What is measured of speed, into docs/results/report.md: half an hour on 2 cores
# that have nothing else to do. PyTorch and timm are among the peers.
bench: .venv/done
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps "$(TIMM)"
	$(BIN)/python -m benchmarks.photos
	$(BIN)/python -m benchmarks.speed.bench

# With other settings the environment is made anew: two builds of TensorFlow
# in one environment overwrite each other.
.venv/done: .settings .mpi setup.py constraints.txt horovod_recipes/install_horovod.py
	$(BASE_PYTHON) -m horovod_recipes.install_horovod --check
	$(BASE_PYTHON) -m venv $(if $(filter .settings,$?),--clear) .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) \
	  "$(TENSORFLOW)" --editable ".[recipes,demo,test]"
	$(BIN)/python -m horovod_recipes.install_horovod
	touch $@

.settings: always
	@echo "$(SETTINGS)" | cmp --silent - $@ || echo "$(SETTINGS)" > $@

# Where MPI comes or goes, Horovod alone is installed anew.
.mpi: always
	@echo "$(MPICXX)" | cmp --silent - $@ || echo "$(MPICXX)" > $@

$(DATA): | .venv/done
	$(BIN)/python -m horovod_recipes.data mnist5k

clean:
	rm -rf .venv .settings .mpi data runs build *.egg-info
