# Every target sets up its own environment: only Python 3.11+, make and git are needed.
PYTHON ?= python3
LOSS ?= sigmoid
RUN ?= runs/quickstart-$(LOSS)
BIN := .venv/bin
# Without a GPU a process for each core, up to four: as fast as one with threads, which wait for each other on a busy
# machine (benchmarks/busy.py).
RANKS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || (nproc || sysctl -n hw.ncpu || echo 1) 2>/dev/null | \
	awk '{print($$1 >= 4 ? 4 : $$1 >= 2 ? 2 : 1)}')
# What accelerate would assume anyway: saying so spares a warning, and --quiet its traceback after our error line.
PLAIN := --quiet --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: help setup lint test test-slow test-faults quickstart vlm docs clean

help:
	@echo "make quickstart [LOSS=softmax]  train on rendered scenes, then score zero-shot (minutes, on a CPU)"
	@echo "make quickstart ARGS=--resume  continue one that was interrupted"
	@echo "make vlm                        a captioning model on its image tower (minutes more)"
	@echo "make test                       all tests but the slowest"
	@echo "make test-slow                  those: whole benchmarks at toy size, second variants of runs"
	@echo "make test-faults                kills, full disks, damage: all of them, and a table (up to half an hour)"
	@echo "make lint                       ruff"
	@echo "make docs                       the documentation as a site, in site/"
	@echo "make setup                      .venv with everything installed"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Processes of one thread: models of a few thousand weights are slower on two, and a loaded machine makes that worse.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow and not slow_fault"

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults tests/security/test_mended_stores.py --fault-table

quickstart: setup
	$(BIN)/python -m contrastive.distributed.start_ranks --nproc_per_node $(RANKS) scripts/pretrain.py --loss $(LOSS) --run_folder $(RUN) $(ARGS)
	$(BIN)/python scripts/zero_shot.py $(RUN) --data scenes:test
	$(BIN)/python scripts/zero_shot.py $(RUN) --data scenes:heldout

vlm: setup
	test -d $(RUN)/final || $(MAKE) quickstart
	$(BIN)/accelerate launch $(PLAIN) --num_processes 1 examples/vlm/train.py $(RUN) $(ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build site *.egg-info
