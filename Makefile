# Every target sets up its own environment: only Python 3.11+, make and git are needed.
PYTHON ?= python3
LOSS ?= sigmoid
RUN ?= runs/quickstart-$(LOSS)
BIN := .venv/bin
# uv knows where PyTorch keeps its wheels without CUDA, and takes them where there is no GPU; pip does not. UV= keeps
# to pip.
UV ?= $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python --torch-backend auto,$(BIN)/python -m pip install --quiet)
# Without a GPU a process for each core, up to four: as fast as one with threads, which wait for each other on a busy
# machine (benchmarks/busy.py).
RANKS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || (nproc || sysctl -n hw.ncpu || echo 1) 2>/dev/null | \
	awk '{print($$1 >= 4 ? 4 : $$1 >= 2 ? 2 : 1)}')
# What accelerate would assume anyway: saying so spares a warning, and --quiet its traceback after our error line.
PLAIN := --quiet --num_machines 1 --mixed_precision no --dynamo_backend no

OLDEST = tests/interop/test_few_packages.py tests/interop/test_transformers_reading.py \
	tests/interop/test_transformers_writing.py tests/interop/test_open_clip_round_trips.py \
	tests/interop/test_timm_round_trips.py tests/interop/test_onnx_export.py tests/interop/test_hub.py \
	tests/models/test_packed_text.py tests/optim tests/train/test_pretrain.py tests/train/test_starting.py \
	tests/train/test_fsdp.py tests/train/test_launchers.py tests/train/test_start_ranks.py tests/data/test_tables.py \
	tests/data/test_table_text.py tests/data/test_write_shards.py tests/data/test_decode.py \
	tests/data/test_tokenizer.py tests/evaluate/test_heads.py tests/evaluate/test_embedding_store.py tests/test_config.py

.PHONY: help setup lint test test-slow test-faults test-oldest test-wheel quickstart vlm docs clean

help:
	@echo "make quickstart [LOSS=softmax]  train on rendered scenes, then score zero-shot (minutes, on a CPU)"
	@echo "make quickstart ARGS=--resume  continue one that was interrupted"
	@echo "make vlm                        a captioning model on its image tower (minutes more)"
	@echo "make test                       all tests but the slowest"
	@echo "make test-slow                  those: whole benchmarks at toy size, second variants of runs"
	@echo "make test-faults                kills, full disks, damage: all of them, and a table (up to half an hour)"
	@echo "make test-oldest                those that touch other libraries, with the oldest versions allowed"
	@echo "make test-wheel                 the built wheel at work in an empty environment, from an empty folder"
	@echo "make lint                       ruff"
	@echo "make docs                       the documentation as a site, in site/"
	@echo "make setup                      .venv with everything installed"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
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

test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(OLDEST)

# What the wheel needs comes with it; nothing of the clone can be found from the folder it runs in.
test-wheel: setup
	rm -rf build/wheel && mkdir -p build/wheel/empty
	$(BIN)/python -m build --no-isolation --outdir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet build/wheel/*.whl
	cd build/wheel/empty && ../venv/bin/contrastive --version
	cd build/wheel/empty && OMP_NUM_THREADS=1 ../venv/bin/contrastive pretrain --loss sigmoid --train.steps 5 --out run
	cd build/wheel/empty && OMP_NUM_THREADS=1 ../venv/bin/contrastive zero-shot run --data scenes:test --limit 64

quickstart: setup
	$(BIN)/python -m contrastive.distributed.start_ranks --nproc_per_node $(RANKS) scripts/pretrain.py --loss $(LOSS) --out $(RUN) $(ARGS)
	$(BIN)/python scripts/zero_shot.py $(RUN) --data scenes:test
	$(BIN)/python scripts/zero_shot.py $(RUN) --data scenes:heldout

vlm: setup
	test -d $(RUN)/final || $(MAKE) quickstart
	$(BIN)/accelerate launch $(PLAIN) --num_processes 1 examples/vlm/train.py $(RUN) $(ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-oldest build dist site *.egg-info
