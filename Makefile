# make shards | train | test | test-all | interop | bench | bench-peers | lint   each sets up .venv first, when it is missing or its requirements changed

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# the user's own data: make shards RECORDS=chat.json IMAGES=images.zip OUT=data
RECORDS ?=
IMAGES ?=
OUT ?= data
PACK_OPTIONS ?=
NPROC ?= 2
TRAIN_OPTIONS ?=

.PHONY: shards train test test-all interop bench bench-peers lint clean

shards: $(READY)
ifeq ($(strip $(RECORDS)),)
	$(BIN)/shardify demo demo
	$(BIN)/shardify pack demo/chat.json --images demo/images.zip --out $(OUT) --shards 8 $(PACK_OPTIONS)
else
	$(BIN)/shardify pack $(RECORDS) $(addprefix --images ,$(IMAGES)) --out $(OUT) $(PACK_OPTIONS)
endif

train: shards
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train.py --shards $(OUT) $(TRAIN_OPTIONS)

# more processes than cores: many tests wait for processes of their own; each with one thread for sums, which would wait for one another busily
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist worksteal --durations 15

test: $(READY)
	$(PYTEST)

# all examples of property tests, all moments of kills, every real picture
test-all: $(READY)
	SHARDIFY_THOROUGH=1 $(PYTEST)

# our shards in other loaders' own environment, .venv-interop
interop: $(READY)
	tests/interop/run.sh

bench: $(READY)
	$(BIN)/python -m benchmarks

# against other loaders, in .venv-peers; then the plots and tables of docs/
bench-peers: $(READY)
	benchmarks/peers/setup.sh
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.raw
	$(BIN)/python -m benchmarks.shuffle
	.venv-peers/bin/python -m benchmarks.plot

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first and alone: a resolver that sees it among others may prefer a build with gigabytes of CUDA. uv takes seconds for what takes pip
# minutes; where it finds no packages (an index that only pip's settings name) pip does it.
# mistral-common in a folder of its own: tests read a SentencePiece model that it ships; where it could be imported without all that it
# depends on, transformers would make no processor
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OURSELVES := -e '.[train,demo,ray,aws,dev]'

$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch uv
	UV_NATIVE_TLS=1 $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt $(OURSELVES) || $(PIP) $(OURSELVES)
	$(PIP) --no-deps --upgrade --target $(VENV)/models mistral-common
	touch $@

clean:
	rm -rf $(VENV) .venv-interop .venv-peers build *.egg-info demo
