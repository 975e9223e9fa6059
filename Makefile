# The verbs a person types and CI calls. `demo` and `test` install what they need on the first run.
#   make test ARGS="-k sampling"                 passes arguments on
#   make check BASE=main                         the wire contract against that of another commit than the last one
#   make setup PYTHON=python3.12                 another interpreter
#   make setup TORCH_ARGS="--index-url URL"      another index for torch: PyTorch's install page names that of the small CPU builds
#   make setup TORCH=torch==2.11.0               another torch
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
ARGS ?=
BASE ?= HEAD

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILD := $(VENV)/.check
PROTOS := $(wildcard proto/speculator/v1/*.proto)
PROTOC = $(BIN)/python -m grpc_tools.protoc -Iproto -I$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: setup demo test check proto gpu bench

setup: $(STAMP)

# torch first and by itself: the plain pin takes whatever build pip is pointed at, and the rest then keeps it
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH_ARGS) $(TORCH)
	@echo "Installing the other dependencies, about a minute"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[server,train,bench,dev]"
	touch $@

demo: setup
	$(BIN)/speculator demo $(ARGS)

test: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not gpu" -n auto --maxprocesses 8 --dist loadfile $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	rm -rf $(BUILD) && mkdir -p $(BUILD)/stubs
	$(PROTOC) --include_imports --include_source_info --descriptor_set_out=$(BUILD)/speculator.binpb $(PROTOS)
	$(BIN)/buf lint $(BUILD)/speculator.binpb --config proto/buf.yaml
	mkdir $(BUILD)/base
	if test -e .git; then git archive $(BASE) proto | tar -x -C $(BUILD)/base; else cp -r proto $(BUILD)/base; fi
	$(subst -Iproto,-I$(BUILD)/base/proto,$(PROTOC)) --include_imports --include_source_info \
		--descriptor_set_out=$(BUILD)/base.binpb $(BUILD)/base/proto/speculator/v1/*.proto
	$(BIN)/buf breaking $(BUILD)/speculator.binpb --against $(BUILD)/base.binpb --exclude-imports --config proto/buf.yaml
	$(PROTOC) --python_out=$(BUILD)/stubs --pyi_out=$(BUILD)/stubs --grpc_python_out=$(BUILD)/stubs $(PROTOS)
	diff -r -x __pycache__ -x __init__.py $(BUILD)/stubs/speculator/v1 speculator/v1 || { echo "Stubs differ: run make proto"; exit 1; }
	$(BIN)/python -m pytest -q tests/unit/test_ground.py
	rm -rf $(BUILD)

proto: setup
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

# a machine with a GPU often brings its own python with a CUDA build of torch; it is used when there is no .venv
gpu:
	$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) -m pytest -m gpu $(ARGS)

bench: setup
	$(BIN)/speculator bench latency $(ARGS)
