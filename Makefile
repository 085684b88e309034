# One command per chore, the same ones CI calls. `make` lists them.
# A fresh machine needs Python 3.11 or newer and make; the rest comes into .venv and the model cache.

PYTHON ?= python3
MODEL  ?= smollm2-135m
ARGS   ?=

BIN  := .venv/bin
CUDA := .venv/cuda
# The environment is ready when a stamp of this very content exists: what was asked for, and where.
KEY   := $(shell { cat pyproject.toml constraints.txt; pwd; } | cksum | tr ' ' '-')
STAMP := .venv/.ready-$(KEY)
ifneq ($(shell test -x $(BIN)/python && echo yes),yes)
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help setup model demo test test-nightly test-hostile soak chaos test-gpu test-nccl test-nixl lint types format proto pins bench-overhead bench-engine bench-kv bench-handoff bench-router bench-prefix bench-quality bench-burst bench-goodput bench-policy bench-promises cost-model profile clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv with everything pinned in constraints.txt (once; then it costs nothing)
	@:

$(STAMP):
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "Baton needs Python 3.11 or newer, and there is no '$(PYTHON)': name one, as in make setup PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Baton needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1): name another, as in make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up .venv: a few minutes, once"
	@# A copied or moved .venv has the old place written into its programs: then it is made anew.
	@grep -qsF "$(CURDIR)/.venv/" $(BIN)/pip && test -x $(BIN)/python || "$(PYTHON)" -m venv --clear .venv || \
	  { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --upgrade pip
	@$(BIN)/python -m pip install -qq -c constraints.txt --build-constraint constraints.txt --editable . --group dev
	@rm -f .venv/.ready-* && touch $@

model: $(STAMP) ## fetch the embedded model into the cache (94 MB, once)
	@$(BIN)/baton model fetch $(MODEL)

demo: model ## start a cluster of one prefill and one decode worker and answer three prompts
	@$(BIN)/baton demo

test: model ## all tests that need neither a GPU nor a night; ARGS="-k name" selects
	$(BIN)/python -m pytest -m "not nightly and not gpu" $(ARGS)

test-nightly: model ## the long tests
	$(BIN)/python -m pytest -m "nightly and not gpu" $(ARGS)

test-hostile: model ## what one request, pause or container may not do, with the real timeouts (9 minutes); ARGS="name ..." selects
	$(BIN)/python -m tests.hostile $(ARGS)

soak: model ## 10,000 requests through one worker of each role: flat memory, no slowdown (minutes)
	$(BIN)/python -m pytest -m nightly -s tests/cluster/test_soak.py $(ARGS)

chaos: $(STAMP) ## kill and stop workers of a cluster under load, and check every stream; ARGS="--seed 7 --minutes 3"
	$(BIN)/baton chaos $(ARGS)

test-gpu: model ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-nccl: $(CUDA)/.ready-$(KEY) model ## the nccl transport with the real library (the extra [cuda]); with a GPU, on it
	$(CUDA)/bin/python -m pytest tests/kvtransfer/transports/test_nccl_library.py tests/kvtransfer/transports/test_nccl_gpu.py $(ARGS)

# An environment inside .venv, on top of it: the extra is half a gigabyte, and nothing else needs it.
$(CUDA)/.ready-$(KEY): $(STAMP)
	@echo "Setting up $(CUDA): a minute, once"
	@$(BIN)/python -m venv --clear --without-pip $(CUDA)
	@$(BIN)/python -c 'import pathlib, sys, sysconfig; \
	  pathlib.Path(sys.argv[1], pathlib.Path(sysconfig.get_path("purelib")).relative_to(sys.prefix), "below.pth") \
	  .write_text("import site; site.addsitedir(%r)\n" % sysconfig.get_path("purelib"))' $(CUDA)
	@$(BIN)/python -m pip --python $(CUDA)/bin/python install -qq --disable-pip-version-check \
	  -c constraints.txt --build-constraint constraints.txt --editable '.[cuda]'
	@touch $@

test-nixl: $(STAMP) ## install the extra nixl (480 MB, once) and run the tests of its transport
	@$(BIN)/python -c 'import nixl' 2>/dev/null || $(BIN)/python -m pip install -qq -c constraints.txt --editable '.[nixl]'
	$(BIN)/python -m pytest tests/kvtransfer -k nixl $(ARGS)

lint: $(STAMP) ## style, import layers, and the wire contract with its generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/python scripts/stubs.py --check

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy
	$(BIN)/mypy scripts

format: $(STAMP) ## let the formatters rewrite the sources and the wire contract
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

proto: $(STAMP) ## regenerate the stubs in baton/v1 from proto/
	@$(BIN)/python scripts/stubs.py

pins: $(STAMP) ## write constraints.txt from what .venv has now
	@$(BIN)/python scripts/pins.py

bench-overhead: model ## what the cluster adds to the engine's own time to first token
	$(BIN)/python -m benchmarks.compute.overhead $(ARGS)

bench-engine: model ## our engine beside the peers of PEERS=DIR, or beside the hardware's limit alone
	$(BIN)/python -m benchmarks.compute.engine $(if $(PEERS),--peers $(PEERS)) $(ARGS)

bench-router: model ## what the router costs a placement, a token and a request, with simulated workers
	$(BIN)/python -m benchmarks.serving.router $(ARGS)

cost-model: model ## the JSON for --cost-model: what a step of the real engine costs on this machine
	$(BIN)/python -m benchmarks.compute.costs

bench-quality: model ## what each weight and KV format costs in quality, and deterministic mode in time
	$(BIN)/python -m benchmarks.quality.quality $(ARGS)

bench-burst: model ## what a burst of long prompts does to streams in progress; PEERS=DIR puts vLLM beside it
	$(BIN)/python -m benchmarks.serving.burst $(if $(PEERS),--peers $(PEERS)) $(ARGS)

bench-goodput: model ## the highest rate that keeps 90 % of requests within CORNER=tpot|ttft|middle; TRACE=FILE replays lengths
	$(BIN)/python -m benchmarks.serving.goodput --corner $(or $(CORNER),tpot) $(if $(TRACE),--trace $(TRACE)) $(ARGS)

bench-policy: model ## the same three ways in simulated time: thousands of requests in seconds, the same every time
	$(BIN)/python -m benchmarks.simulated.policy $(if $(CORNER),--corner $(CORNER)) $(if $(TRACE),--trace $(TRACE)) $(ARGS)

bench-promises: model ## whether promised first tokens come in time, below and above the capacity (8 minutes)
	$(BIN)/python -m benchmarks.serving.promises $(ARGS)

bench-kv: model ## block transfers beside plain copies, a raw socket and, where it is installed, NIXL
	$(BIN)/python -m benchmarks.transfer.kv $(ARGS)

bench-handoff: model ## what the handoff costs an idle 1+1, and what it costs those that decode
	$(BIN)/python -m benchmarks.transfer.handoff $(ARGS)

bench-prefix: $(STAMP) ## prefilled tokens that cached prefixes save, beside a perfect cache; TRACE=FILE replays a Mooncake trace
	$(BIN)/python -m benchmarks.simulated.prefix $(if $(TRACE),--trace $(TRACE)) $(ARGS)

profile: model ## where a step's time goes
	$(BIN)/python -m benchmarks.compute.profile $(ARGS)

clean: ## remove caches and build output; .venv and the model stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
