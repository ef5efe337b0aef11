# Five targets for newcomers: demo, test, bench, lint, wheel; two more where there is a GPU: test-gpu, bench-gpu;
# sanitize for whoever changed C++, bench-docs for whoever measured anew.
# Each creates .venv and builds what is missing first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= auto
export SAFT_CUDA ?= AUTO

NATIVE := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

# One OpenMP thread per test process: several processes share the cores. Tests that need more ask for them.
# worksteal keeps neighbouring tests in one process, where they share what their module sets up, until another has none left.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help demo test bench bench-docs lint sanitize wheel test-gpu bench-gpu build clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+(-docs)?:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'on a machine with a GPU:'
	@awk -F ':.*## ' '/^[a-z]+-gpu:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build  ## fine-tune the built-in tiny CLIP with SAFT and with full fine-tuning, and compare (about 3 minutes)
	$(BIN)/saft demo

test: build  ## run all tests
	$(PYTEST)

bench: build  ## time every kernel beside its baselines (2 minutes; python -m bench --help measures whole steps and memory)
	$(BIN)/python -m pytest bench -q --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname

bench-docs: build  ## write the figures of README.md and docs/ from the newest result in bench/results
	$(BIN)/python -m bench report --brief --figures docs/figures --update README.md
	$(BIN)/python -m bench report --update docs/benchmarks.md
	$(BIN)/python -m bench report --case step_account --update docs/step_account.md
	$(BIN)/python -m bench.roofline --measured bench/results/nvidia-h200-*.json --update docs/gpu.md

lint: build  ## check style, types and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror \
	  $$(find csrc tests/ptxsim tests/sanitized tests/simulated -regex '.*\.\(h\|cpp\|cu\|cuh\)')

sanitize: build  ## run the tests of the CPU's kernels under sanitizers of memory, arithmetic and threads (3 minutes)
	cd tests && $(abspath $(BIN))/python -m sanitized --jobs $(JOBS)

wheel: build  ## build the wheel into dist/
	rm -rf dist build/lib* build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@test "$$(ls dist | wc -l)" = 1 && ls dist/saft_kernels-*-py3-none-*.whl \
	  || { echo "expected exactly one py3-none wheel in dist/, found: $$(ls dist)"; exit 1; }

# In one process: tests of streams look at what the GPU does meanwhile.
test-gpu: build  ## run the tests of the kernels and of the whole data path on the GPU
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() \
	  or sys.exit(f"there is no GPU to test on: torch {torch.__version__} sees none; make test needs none")'
	$(BIN)/python -m pytest -m gpu

bench-gpu: build  ## measure kernels, memory and training steps on the GPU
	$(BIN)/python -m bench gpu

build: $(VENV)/built

# Changes when what is to be built for GPUs does, so that this takes effect on a checkout that is built already.
CUDA_CHOICE := $(VENV)/cuda-$(SAFT_CUDA)-$(subst ;,-,$(SAFT_CUDA_ARCHITECTURES))

$(CUDA_CHOICE): $(VENV)/installed
	@rm -f $(VENV)/cuda-*
	@touch $@

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed, $$($(PYTHON) --version) was found; run: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@command -v $${CXX:-c++} >/dev/null \
	  || { echo "a C++ compiler is needed (Debian: apt-get install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned requirements (torch is large: some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(CUDA_CHOICE) $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

clean:
	rm -rf build dist *.egg-info saft_kernels/*.so
	rm -f $(VENV)/built
