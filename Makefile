# make demo       quantize and click through a phantom study; pictures, table and report in demo-output/
# make test       ruff, mypy, each part by itself, and the server as a whole
# make test-all   these, and what takes long: browsers, a fuzzer, full disks, sanitizers, benchmarks, GPU kernels
# make lint       ruff and mypy alone
# make kernels    compile the GPU kernels, for GPUs from Turing to Blackwell; needs nvcc 12.8 or later, no GPU
# make gpu-check  on a machine with an NVIDIA GPU, after `make kernels`: correctness, then the benchmark
#
# PYTHON chooses the interpreter of the environment (3.10, 3.11 or 3.12); by default the first that works.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; \
	done)

# CUTLASS is used as headers alone; its package's dependencies are not needed.
CUTLASS := nvidia-cutlass==4.2.0.0
CUTLASS_DIR := build/$(CUTLASS)
NVCC ?= $(or $(shell command -v nvcc),/usr/local/cuda/bin/nvcc)
JOBS ?= 2

# One thread for each process of tests: more would wait for one another.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15

.PHONY: demo test test-all lint kernels gpu-check clean

demo: $(VENV)/.installed
	$(BIN)/dfqsam demo

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: $(CUTLASS_DIR)
	@test -x "$(NVCC)" || { echo "no nvcc at '$(NVCC)': install the CUDA toolkit, 12.8 or later, or name it: make kernels NVCC=/path/to/nvcc" >&2; exit 1; }
	@command -v cmake >/dev/null || { echo "no cmake: install version 3.24 or later" >&2; exit 1; }
	cmake -S kernels/cuda -B build/cuda -D CMAKE_CUDA_COMPILER="$(NVCC)" \
		-D DFQSAM_CUTLASS="$(CURDIR)/$(CUTLASS_DIR)/cutlass_library/source"
	cmake --build build/cuda --parallel $(JOBS)
	@# By a rename: a server that has the old library open keeps it.
	cp build/cuda/libdfqsam_cuda.so monailabel_dfqsam/ops/.libdfqsam_cuda.so.partial
	mv monailabel_dfqsam/ops/.libdfqsam_cuda.so.partial monailabel_dfqsam/ops/libdfqsam_cuda.so

gpu-check: $(VENV)/.installed
	$(BIN)/python kernels/check_gpu.py

$(CUTLASS_DIR): | $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@.partial $(CUTLASS)
	mv $@.partial $@

# Installing compiles kernels/cpu where there is a C++ compiler.
$(VENV)/.installed: pyproject.toml hatch_build.py $(wildcard kernels/cpu/*)
	@test -n "$(PYTHON)" || { echo "no Python 3.10, 3.11 or 3.12 found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]'
	@# What is installed editable, uv does not compile; and some machines forbid Python to do it at the first start.
	$(BIN)/python -m compileall -q monailabel_dfqsam
	@touch $@

clean:
	rm -rf $(VENV) demo-output build dist
