# Two commands: `make demo` and `make test`. Both set up .venv first, each with only what it needs.

MODEL  := data/models/SmolLM2-135M-Instruct.Q4_1.gguf
PROMPT := What is the capital of France?

BIN := .venv/bin
RUN := $(BIN)/python -m
PIP_INSTALL := $(RUN) pip install --require-hashes
compiler := $(firstword $(CC))

.PHONY: help demo lab test test-all soak test-browser notebooks sanitize fuzz test-arm wheel-macos wheels audit lock lint format clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make demo      set up .venv, fetch SmolLM2 (93 MB) and ask it a question"
	@echo "make lab       set up .venv for notebooks and open the course in JupyterLab"
	@echo "make test      set up .venv for tests (adds torch and transformers) and run them"
	@echo "make test-all  the same, with the tests that take minutes"
	@echo "make soak      hundreds of interrupts, threads and forks, 100,000 tokens: an hour, with figures"
	@echo "make test-browser  try the playground and the stepper in JupyterLab, and the server's page, in Chromium"
	@echo "make notebooks execute the notebooks and write what changed, in them and in notebooks/src/"
	@echo "make sanitize  run the C backend's tests under the address, undefined-behaviour and thread sanitizers"
	@echo "make fuzz      throw files and prompts that nobody would write at all that reads them; MINUTES=5 TARGET=gguf JOBS=2"
	@echo "make test-arm  run the C backend's tests on emulated Arm processors (Debian or Ubuntu, with qemu-user)"
	@echo "make wheel-macos  cross-compile the wheel for Apple's processors into dist/, and look inside"
	@echo "make wheels    build and test the wheel for this kind of computer with cibuildwheel (on Linux: in Docker)"
	@echo "make audit     ask PyPI which of the pinned packages have known vulnerabilities"
	@echo "make lock      write requirements/ anew after a change of pyproject.toml; UPGRADE=yes takes the newest versions"
	@echo "make lint      check style with ruff"
	@echo "make format    let ruff format the code"
	@echo "make clean     remove caches and build products; .venv and data/models stay"
	@echo "Another Python (3.11 or newer) than the first on PATH: make demo PYTHON=/path/to/python3"

demo: .venv/demo.installed $(MODEL)
	@$(RUN) tinyllama generate --model smollm2 --chat --prompt "$(PROMPT)" --temp 0 --n_predict 64

lab: .venv/notebooks.installed
	@$(RUN) jupyterlab --LabApp.default_url=/lab/tree/notebooks/00_map.ipynb

test: .venv/test.installed $(MODEL)
	@$(RUN) pytest
	@$(MAKE) --no-print-directory sanitize

test-all: .venv/test.installed $(MODEL)
	@$(RUN) pytest -m "not browser"
	@$(MAKE) --no-print-directory sanitize

soak: .venv/test.installed $(MODEL)
	@$(RUN) pytest -s -m long tests/machine/test_interrupts.py tests/test_concurrency.py tests/serve

test-browser: .venv/browser.installed $(MODEL)
	@$(RUN) pytest -m browser tests/browser

notebooks: .venv/test.installed
	@$(BIN)/python notebooks/sync.py

# Their library must be in the process before Python is: LD_PRELOAD, so Linux and GCC.
LIBASAN := $(if $(findstring clang,$(shell $(compiler) --version)),,\
  $(filter /%,$(shell $(compiler) -print-file-name=libasan.so)))
SANITIZE := -g1 -fno-var-tracking -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
ifeq ($(shell uname -sm),Linux x86_64)
TILES := build/sanitize/tiles.so
SANITIZE += -DTINYLLAMA_EMULATE_TILES
endif
POOL := $(addprefix ext/,threads.c operations.c ahead.c weights.c pack.c ref.c) tests/ext/pool.c
sanitize: .venv/test.installed
ifeq ($(LIBASAN),)
	@echo "$(compiler) is not GCC with libasan.so: the C backend is not tested under sanitizers."
else
	@echo "The C backend under the address, undefined-behaviour and thread sanitizers:"
	@OPTIMIZE=-O1 CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build --build-base build/sanitize \
	  --build-lib build/sanitize/lib
	@$(if $(TILES),$(compiler) -O2 $(SANITIZE) -shared -fPIC tests/ext/tiles.c -lm -o $(TILES))
	@LD_PRELOAD="$(strip $(LIBASAN)) $(TILES)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib \
	  $(BIN)/pytest -p no:faulthandler tests/ext tests/fuzz/test_targets.py -k "ext or native" --ignore=tests/ext/test_amx.py
	@$(compiler) -O1 -g -ffp-contract=off -fsanitize=thread $(POOL) -o build/sanitize/pool -lpthread -lm
	@build/sanitize/pool
endif

# MINUTES for each target, JOBS of them at once; TARGET: one of fuzz/targets/, or several.
fuzz: .venv/fuzz.installed
	@$(RUN) fuzz run --minutes $(or $(MINUTES),1) --jobs $(or $(JOBS),1) $(TARGET)

test-arm: .venv/cross.installed
	@PYTHON=$(BIN)/python tools/arm_tests.sh

wheel-macos: .venv/cross.installed
	@wheel=$$($(BIN)/python tools/cross_wheel.py macos dist) && echo "$$wheel" && \
	  MACOS_WHEEL="$$wheel" $(RUN) pytest tests/project/test_macos_wheel.py

wheels: .venv/wheels.installed
	@$(RUN) cibuildwheel --output-dir dist

audit: .venv/audit.installed
	@$(BIN)/python tools/audit.py

lock: .venv/lock.installed
	@$(BIN)/python tools/lock.py $(if $(UPGRADE),--upgrade)

lint: .venv/lint.installed
	@$(RUN) ruff check
	@$(RUN) ruff format --check

format: .venv/lint.installed
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# ---- set-up: .venv/NAME.installed says that what NAME needs has been installed, and since when ----

$(MODEL): # after any of the .installed, in the order in which the goals above name them
	@$(RUN) tinyllama download smollm2

.venv/test.installed .venv/browser.installed .venv/fuzz.installed .venv/cross.installed: TORCH := yes

# requirements/NAME.txt has the version and the SHA-256 of every package; pip refuses any other file.
.venv/%.installed: $(BIN)/python $(BIN)/pip pyproject.toml setup.py $(wildcard ext/*.[ch] requirements/*.txt)
	@echo "Setting up .venv for make $* (the first time takes a minute) ..."
	@$(if $(TORCH),$(PIP_INSTALL) --no-deps --retries 1 --requirement requirements/torch.txt)
	@$(PIP_INSTALL) --quiet --requirement requirements/$*.txt
	@$(MAKE) --silent .venv/tinyllama.built
	@touch $@

# After the requirements, which bring setuptools; once for all goals, since it compiles the extension.
.venv/tinyllama.built: pyproject.toml setup.py $(wildcard ext/*.[ch])
	@$(RUN) pip install --quiet --no-deps --no-build-isolation --editable .
	@$(RUN) compileall -q tinyllama  # which pip does of what it copies; a start is slow where Python may not
	@touch $@

$(BIN)/pip: | $(BIN)/python
	@$(RUN) ensurepip --default-pip >/dev/null

$(BIN)/python:
	$(check_tools)@"$(FOUND)" -m venv --clear --without-pip .venv

# The newest Python on PATH, unless PYTHON names one; empty where none is 3.11 or newer.
CANDIDATES := $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)
IS_NEW := import sys; sys.exit(sys.version_info < (3, 11))
FOUND = $(shell for python in $(CANDIDATES); do \
	"$$python" -c "$(IS_NEW)" 2>/dev/null && echo "$$python" && break; done)

# Stops with one line that names what is missing.
check_tools = $(strip \
  $(if $(FOUND),,$(error Python 3.11 or newer is needed; here $(python_here). \
    Name another with PYTHON=/path/to/python3)) \
  $(if $(shell "$(FOUND)" -c "import ensurepip, venv" 2>/dev/null && echo ok),,$(error The venv module of \
    $(FOUND) is missing (Debian: apt-get install python3-venv))) \
  $(if $(shell command -v $(compiler) 2>/dev/null),,$(error A C compiler is needed; here $(compiler) is missing \
    (Debian: apt-get install gcc, macOS: xcode-select --install))))
python_here = $(lastword $(CANDIDATES)) is $(or $(shell "$(lastword $(CANDIDATES))" -V 2>/dev/null),missing)
