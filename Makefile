# make test    lint and all tests
# make quick   lint and the tests that train nothing: within a minute
# make demo    all of LAPO on one game, in minutes on two CPU cores; results in exp_results/demo/
# make same BASE=<revision>   whether this work tree computes what an earlier revision computed
# make gpu     what a CUDA device makes of the stages: right, without waiting, how fast; ARGS=--dry on a CPU
# make soak    the recorder and every stage killed 50 times, and continued: minutes
# make venv    only the environment: .venv with the pinned requirements and this checkout
# All but `gpu` install what they need. Another interpreter: make test PYTHON=python3.11

PYTHON ?= python3

# The demo's game, how many expert frames are recorded for it, in whole chunks of 32,768 and 4,096, and in
# which share of them the expert does something at random: actions that can be foreseen teach stage 1 little.
GAME ?= jumper
FRAMES ?= 49152
TEST_FRAMES ?= 12288
NOISE ?= 0.2

VENV_PYTHON := .venv/bin/python
# Newer than the requirements when .venv holds exactly those.
INSTALLED := .venv/installed
START := $(shell date +%s)
# `make gpu` runs with the Python that is named or there, and installs nothing.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(if $(wildcard $(VENV_PYTHON)),$(VENV_PYTHON),$(PYTHON)),$(PYTHON))
# Two processes, each with a thread; more cores make the suite little faster.
PYTEST := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv lint test quick soak same gpu demo

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(firstword $(MAKEFILE_LIST))

venv: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v < (3, 13) or sys.exit("error: lapo runs on Python 3.10 to 3.12, and $(PYTHON) is %d.%d; name another, as in: make venv PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -r requirements.txt
	$(VENV_PYTHON) -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check

test: lint
	$(PYTEST)

quick: lint
	$(PYTEST) -m "not slow"

soak: $(INSTALLED)
	LAPO_INTERRUPTIONS=50 $(VENV_PYTHON) -m pytest -k stopped_at_random_moments

same: $(INSTALLED)
	$(VENV_PYTHON) tests/same.py $(BASE)

gpu:
	$(GPU_PYTHON) -m lapo.benchmarks.gpu $(ARGS)

demo: $(INSTALLED)
	$(VENV_PYTHON) lapo/record_expert.py --env $(GAME) --frames $(FRAMES) --test-frames $(TEST_FRAMES) \
		--expert planner --noise $(NOISE) --visuals plain --data-dir expert_data/demo
	bash lapo/launch.sh $(GAME) --preset demo --modes offline,bc,online,scratch
	$(VENV_PYTHON) lapo/report.py --env $(GAME) --preset demo
	@s=$$(($$(date +%s) - $(START))) && echo "make demo took $$((s / 60)) min $$((s % 60)) s"
