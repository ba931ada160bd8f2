# make demo, make test: everything from a fresh clone. PYTHON=python3.12 chooses the interpreter for .venv,
# ASVIT_FAST_BUILD=auto|cuda|cpu|none what is compiled (see setup.py).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.h)
CLANG_FORMAT := $(filter %.cpp %.h %.cu,$(SOURCES)) $(wildcard tests/cuda_on_cpu/*.* tests/cuda_on_cpu/cuda/*.h)

.PHONY: install demo test test-threads test-integrations test-slow test-oldest sanitize kernel-report gpu lint format bench wheel test-wheel docs \
	notebooks release-check clean

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch comes first, as the extension is built with its headers
$(VENV)/.torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar off "torch>=2.11" torchvision "setuptools>=77" ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --progress-bar off --no-build-isolation --editable ".[dev]"
	@touch $@

demo: install
	$(BIN)/python -m asvit_fast.demo

# one thread each: threads of several processes on the same cores wait for each other most of the time
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(PYTEST_ARGS)

# what depends on the number of threads, with two
test-threads: install
	OMP_NUM_THREADS=2 $(BIN)/pytest $(wildcard tests/test_*_taylor.py) $(addprefix tests/,test_window_attention.py \
		test_window_attention_maps.py test_patch_embed.py test_patch_merge.py test_linear.py test_ntk.py test_scoring.py test_scoring_parts.py) \
		-k "not opcheck and not interpret"

# networks of other libraries, which are installed for this only: the extra [integrations]
$(VENV)/.integrations: $(VENV)/.installed pyproject.toml
	$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print(*extras["integrations"])' | xargs $(BIN)/python -m pip install --progress-bar off
	@touch $@

test-integrations: $(VENV)/.integrations
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(addprefix tests/test_,accelerate_transformers.py \
		accelerate_transformers_use.py accelerate_monai.py bench_sources.py detection_adapters.py) $(PYTEST_ARGS)

# what `make test` leaves out
test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow $(PYTEST_ARGS)

# The oldest torch that is supported, with its Triton and torchvision: an environment of its own, and a copy of the sources,
# as the extension is built with its headers here. Ops, models and tracers, and all Triton kernels for all GPUs.
OLDEST := .venv-oldest
OLDEST_COPY := build/oldest
OLDEST_TESTS := $(wildcard tests/test_*_taylor.py tests/test_window*.py tests/test_patch*.py tests/test_accelerate*.py) \
	$(addprefix tests/,test_fused_op.py test_linear.py test_models.py test_tracing.py test_onnx.py test_cuda_tracing.py \
	test_backends.py test_environment.py test_tile_table.py test_kernel_report.py test_taylor.py test_ntk.py test_scoring.py \
	test_position_bias.py test_dot.py test_stacked_scores.py)

$(OLDEST)/.torch:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --progress-bar off "torch==2.11.*" "torchvision==0.26.*" "setuptools>=77" ninja
	@touch $@

test-oldest: $(OLDEST)/.torch
	mkdir -p $(OLDEST_COPY)
	rm -rf $(addprefix $(OLDEST_COPY)/,asvit_fast kernels tests benchmarks csrc)
	cp -a asvit_fast kernels tests benchmarks csrc setup.py pyproject.toml README.md LICENSE MANIFEST.in $(OLDEST_COPY)
	rm -f $(OLDEST_COPY)/asvit_fast/_C.*.so $(OLDEST_COPY)/asvit_fast/_build.json
	cd $(OLDEST_COPY) && ASVIT_FAST_BUILD=$${ASVIT_FAST_BUILD:-cpu} ../../$(OLDEST)/bin/python -m pip install \
		--progress-bar off --no-build-isolation --editable ".[test]"
	cd $(OLDEST_COPY) && OMP_NUM_THREADS=1 ../../$(OLDEST)/bin/pytest -n 2 $(OLDEST_TESTS) $(PYTEST_ARGS)
	cd $(OLDEST_COPY) && OMP_NUM_THREADS=1 ../../$(OLDEST)/bin/pytest -n 2 -m slow tests/test_triton_compilation.py

# The compiled kernels, and the CUDA kernels as tests/cuda_on_cpu compiles them, under g++'s sanitizers. A sanitized
# library needs their runtime, and exceptions the C++ library, loaded before Python's own. torch keeps memory to the end:
# leaks are not looked for. With --capture=sys the sanitizers' words reach the terminal.
SANITIZE := ASVIT_FAST_BUILD=cpu ASVIT_FAST_SANITIZE=address,undefined CXX=g++
SANITIZED_TESTS := $(wildcard tests/test_*_taylor.py tests/test_window*.py) tests/test_patch_embed.py \
	tests/test_patch_merge.py tests/test_packed_linear.py tests/test_norm_linear.py tests/test_per_sample.py \
	tests/test_cuda_kernels_on_cpu.py \
	tests/test_build.py::test_sanitizer_sees_an_overrun

sanitize: install
	$(SANITIZE) $(BIN)/python setup.py --quiet build --build-lib build/sanitized
	$(SANITIZE) PYTHONPATH=$(CURDIR)/build/sanitized ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/pytest -n 2 --capture=sys -k "not compile and not export and not opcheck and not transforms and not triton" \
		$(SANITIZED_TESTS)

# Registers, spills, shared memory, occupancy and the inner loop's instructions of every CUDA and Triton kernel, for GPUs that
# need not be there, as a table and in benchmarks/results/kernel_report.csv; fails on spills on Hopper.
# KERNEL_REPORT="--arch 80,90,100 --dtype bf16,fp32" widens it, "--kernel tiled --shape N=784" narrows it.
kernel-report: install
	$(BIN)/python benchmarks/kernel_report.py $(KERNEL_REPORT)

# The first minutes on a GPU, see benchmarks/gpu_session.sh: GPU_STEPS="1 3" runs some of the steps, GPU_STEPS="all --dry-run"
# the same programs without a GPU. It needs no network and no environment: .venv if there is one, else PYTHON as it is.
GPU_STEPS ?= all

gpu:
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bash benchmarks/gpu_session.sh $(GPU_STEPS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMAT)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMAT)

bench: install
	$(BIN)/python benchmarks/bench_scores.py

# A wheel for this Python in dist/, for others: with CUDA kernels for 8.0, 9.0 and 10.0 and PTX where there is a toolkit.
# torch's own libraries are left out of it, as the torch that is installed brings them.
DIST ?= dist
NOT_IN_WHEELS := libtorch.so libtorch_cpu.so libtorch_cuda.so libtorch_python.so libc10.so libc10_cuda.so libcudart.so.*

wheel: install
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair $(foreach library,$(NOT_IN_WHEELS),--exclude '$(library)') \
		--wheel-dir $(DIST) build/wheel/asvit_fast-*.whl

# The tests of ops on that file in fresh environments with the oldest torch and with the newest
test-wheel: wheel
	ASVIT_FAST_TEST_WHEEL=$$(ls -t $(abspath $(DIST))/asvit_fast-*.whl | head -1) OMP_NUM_THREADS=1 \
		$(BIN)/pytest -m slow tests/test_packaging.py -k wheel $(PYTEST_ARGS)

# The documentation in build/docs/index.html, readable without a server and a network; a broken link is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# examples/notebooks, made from examples/*.py
notebooks: install
	$(BIN)/python examples/make_notebooks.py

# Before a release: version, date and tag agree, the source distribution holds the repository and builds alone, the wheel
# imports, requirements and their licences. It publishes nothing.
release-check: install
	$(BIN)/python .ci/release_check.py

clean:
	rm -rf build dist *.egg-info asvit_fast/_build.json asvit_fast/_C.*.so $(VENV)/.installed
	find asvit_fast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
