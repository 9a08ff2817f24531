# GNU make 3.81 (macOS) and later. `make` alone lists the targets.

PROFILE ?= laptop
NOTEBOOK ?=
# The first interpreter that is new enough; `make setup PYTHON=/path/to/python3` chooses another.
PYTHON ?= $(firstword $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p; done) python3)
# Linux without a GPU: PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" avoids the CUDA packages.
PIP_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed-from
# For `make benchmark`: an environment of its own.
PEERS := .venv-peers
# What to hand to the program behind reproduce, benchmark and gpu-evidence.
ARGS ?=
# Compiled anew by every process, the libraries would take most of a minute to import.
unexport PYTHONDONTWRITEBYTECODE
# notebooks/ holds the package `companion`, which is not installed.
PYTHONPATH := $(CURDIR)/notebooks$(if $(PYTHONPATH),:$(PYTHONPATH))
# Threads that wait for others soon sleep: spinning, they slow down whatever else runs, and themselves.
OMP_WAIT_POLICY ?= PASSIVE
GOMP_SPINCOUNT ?= 1000
export PYTHONPATH OMP_WAIT_POLICY GOMP_SPINCOUNT
# Tests marked `network` or `slow` run where CI is set (`make test CI=1`); the share of code that tests must reach is for all.
MARKED := $(if $(CI),,-m "not network and not slow" --cov-fail-under=0)

.PHONY: help setup reproduce publish pages test test-notebooks lm benchmark gpu-evidence lock lab clean

help: ## list the targets (default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  PROFILE=name (of notebooks/profiles; default laptop), NOTEBOOK=NN, PYTHON=python3.11, PIP_ARGS="..."'

# Compared by content: times of files say nothing after a clone.
setup: ## make .venv from requirements.lock, if it is missing or the lock has changed
	@cat requirements.lock pyproject.toml | cmp -s - $(INSTALLED) || $(MAKE) --no-print-directory install

.PHONY: install
install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or later is needed, and $(PYTHON) is not one: install it, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(RUN) || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); } || { \
		echo "could not make $(VENV): on Debian and Ubuntu, install the package python3-venv; then run make again" >&2; rm -rf $(VENV); exit 1; }
	@echo "installing requirements.lock into $(VENV) (about 1 GB, some minutes; more on Linux with CUDA)"
	@# Compiling all of it now would take as long as the rest; Python compiles what is imported.
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -r requirements.lock
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@cat requirements.lock pyproject.toml > $(INSTALLED)
	@echo "$(VENV) is ready"

reproduce: setup ## run the notebooks that are not up to date; write figures/; print the facts
	@$(RUN) -m companion.rails.reproduce --profile $(PROFILE) $(if $(NOTEBOOK),--notebook $(NOTEBOOK)) $(ARGS)

publish: setup ## copy another PROFILE's finished results to figures/PROFILE, to be committed
	@$(RUN) -m companion.rails.reproduce --publish --profile $(PROFILE) $(if $(NOTEBOOK),--notebook $(NOTEBOOK))

pages: setup ## write the ledger, figures/README.md and README's tables anew from the results (ARGS=--check: compare)
	@$(RUN) -m companion.rails.claims $(ARGS)

test: setup ## lint, unit tests with coverage, and the notebooks whose results are at hand
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	@# Torch's builds for CPUs come without Triton, whose interpreter runs the kernels for GPUs; only Linux has it.
	@$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps "triton>=3.8,<4" 2>/dev/null || true
	@$(RUN) tests/chromium.py || true # without one, the browser tests are skipped, and pytest says so
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile $(MARKED) --cov
	@$(RUN) -m companion.rails.checks

test-notebooks: setup ## run every notebook and compare each output with the committed one (MINUTES=n: begin none later)
	@$(RUN) -m companion.rails.checks --all $(if $(MINUTES),--minutes $(MINUTES))

lm: setup ## train the embedded language model from scratch (about an hour on 2 cores)
	$(RUN) -m companion.subject.train_lm

benchmark: ## speed and quality beside other SAE libraries, installed into an environment of their own (ARGS="--help")
	@$(MAKE) --no-print-directory setup VENV=$(PEERS)
	@cmp -s requirements-peers.lock $(PEERS)/peers-installed-from || { echo "installing requirements-peers.lock into $(PEERS)"; \
		$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) --no-deps -r requirements-peers.lock \
		&& cp requirements-peers.lock $(PEERS)/peers-installed-from; }
	@# The table is only as good as the adapters.
	@OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -q -p no:cacheprovider -k adapter tests/companion/test_benchmark.py
	@OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -q -p no:cacheprovider tests/jumprelu/test_peer_formats.py
	@$(PEERS)/bin/python -m companion.speed.benchmark $(ARGS)

gpu-evidence: setup ## measure kernels, steps and a harvest at the paper's scale on this machine's GPU (ARGS="--help")
	@$(RUN) -m companion.speed.gpu_evidence $(ARGS)

lab: setup ## open the notebooks in JupyterLab
	cd notebooks && ../$(RUN) -m jupyterlab

lock: setup ## write requirements.lock again, from what .venv holds
	@{ sed -n '/^#/p' requirements.lock; $(RUN) -m pip freeze --all --exclude pip --exclude jumprelu --exclude triton | sed 's/+.*//'; } > $(VENV)/lock
	@mv $(VENV)/lock requirements.lock
	@echo "wrote requirements.lock"

clean: ## remove what can be made again: results, failed runs, caches (not .venv, nor the checkpoints of make lm)
	test ! -d .cache || find .cache -mindepth 1 -maxdepth 1 ! -name lm -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .coverage .figures-* build *.egg-info
	find jumprelu tests notebooks -name __pycache__ -prune -exec rm -rf {} +
