# One command a chore; CI calls the same ones.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/*.proto)
# Tests that time a whole fleet, and so want the machine for themselves.
ALONE := tests/cluster tests/faults

.PHONY: demo test check protos kernels bench soak clean

demo: $(VENV)/runtime ## three CPU workers answer alone and as an ensemble, over gRPC
	$(BIN)/conclave demo

test: $(VENV)/development ## every test that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(ALONE))
	$(BIN)/python -m pytest $(ALONE)

check: $(VENV)/development ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

protos: $(VENV)/development ## regenerate the protobuf modules
	$(BIN)/python -m grpc_tools.protoc -I.root --python_out=.root --pyi_out=.root \
		--grpc_python_out=.root $(addprefix .root/conclave/,$(PROTOS))

kernels: $(VENV)/development ## compile every GPU kernel for every card, into kernels/bundle.zip; needs no GPU
	$(BIN)/python -m conclave.kernels.launching.bundle

bench: $(VENV)/development ## serving figures on this machine, into benchmarks/results
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.report

soak: $(VENV)/development ## every kind of fault twenty times (an hour), into benchmarks/results
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.report

clean: ## forget the virtual environment
	rm -rf $(VENV)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Conclave needs Python 3.11 or 3.12; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/development: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/runtime
