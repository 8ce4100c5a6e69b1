# make install: .venv with all that is needed.   make demo: from nothing to a filled mask and a fine-tuned classifier.   make test: lint and all but the long tests.   make test-long: those.   make faults: a hundred disturbed runs, 10,000 damaged files; another choice of them: make faults SEED=1.   All make .venv first.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
# Two worker processes share the tests, with one thread each (tests/conftest.py sets it).
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# Without a number accelerate gives a process on a CPU one thread.
LAUNCH := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo install test test-long lint faults

demo: .venv/installed runs/demo-tokenizer/tokenizer.json
	$(LAUNCH) pretrain.py --config recipe/configs/pretrain/tiny.yaml --resume_from_checkpoint latest
	$(BIN)/python -m recipe.demo runs/demo
	$(LAUNCH) finetune_glue.py --config recipe/configs/glue/tiny.yaml

install: .venv/installed

runs/demo-tokenizer/tokenizer.json: | .venv/installed
	$(BIN)/python train_tokenizer.py --config recipe/configs/tokenizer/tiny.yaml

test: lint
	$(PYTEST) -m "not long"

test-long: .venv/installed
	$(PYTEST) -m long

faults: .venv/installed
	$(BIN)/python -m testing.faults.storm --disturbances 100 --seed $(SEED)
	$(BIN)/python -m testing.faults.fuzz --cases 10000 --seed $(SEED)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d; name another: make PYTHON=python3.11" \
		% sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,trackers,plots]'
	touch $@
