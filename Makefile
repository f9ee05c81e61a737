# Every target bootstraps what it needs. `make help` lists them.
#
#   PYTHON       interpreter used to create .venv (3.11 or newer)
#   TORCH_INDEX  index URL to take torch from (PyTorch's CPU wheel index spares the CUDA download)
#   IMAGES       photographs for `make demo`, space separated
#   PYTEST_ARGS  further arguments for `make test`
#   JSON         folder where the `make bench-...` targets also write their rows
#   VQ_ISA       tier of the CPU kernels for `make test`: baseline, avx2, avx512 or avx512_vbmi

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .tools
TOOLS_BIN := $(TOOLS)/bin
PYTHON_DIRS := engine services clients/python loadtests examples tests
PROTOS = $(shell cd proto && find vqstack -name '*.proto' | LC_ALL=C sort)
EXTRAS := cpu,demo,dev,load

# uv finds local wheels where pip finds them; on most machines both are empty.
export UV_FIND_LINKS := $(if $(UV_FIND_LINKS),$(UV_FIND_LINKS),$(PIP_FIND_LINKS))
# Two busy cores and nested thread pools do not mix: one thread per test process.
TEST_ENV = PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo serve stop test check lint types imports proto-check proto format bench bench-scq bench-quant bench-llm bench-gpu soak load docker-lint tools clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A venv with pip in it; packages come through uv when it can be had, through pip otherwise.
define create_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vqstack needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1) || { \
	  echo "could not create $(1); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(1)/bin/uv || $(1)/bin/pip install --quiet --disable-pip-version-check uv \
	  || echo "uv cannot be had here; using pip, which takes some minutes"
endef

# $(call install,VENV,ARGUMENTS)
define install
	@if test -x $(1)/bin/uv; then $(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2); \
	else $(1)/bin/pip install --quiet --disable-pip-version-check $(2); fi
endef

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt proto/pyproject.toml clients/python/pyproject.toml $(shell find csrc -type f 2>/dev/null)
	@echo "Setting up $(VENV) (once; a minute or so)"
	$(call create_venv,$(VENV))
	$(call install,$(VENV),$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) )torch==2.13.0)
	$(call install,$(VENV),-c constraints.txt -e proto -e clients/python -e '.[$(EXTRAS)]')
	@$(BIN)/python -m vqkernels
	@touch $@

$(TOOLS)/.ready: deploy/tools-requirements.txt
	@echo "Setting up $(TOOLS) (once; linters for protobuf, Docker, Helm and Kubernetes)"
	$(call create_venv,$(TOOLS))
	$(call install,$(TOOLS),-r deploy/tools-requirements.txt)
	@touch $@

tools: $(TOOLS)/.ready ## install the deployment linters into .tools

demo: $(VENV)/.ready ## photograph -> codes -> picture, labels and an answer, through both services
	@OMP_NUM_THREADS=2 PYTHONPATH=examples $(BIN)/python -m demo $(if $(IMAGES),--images $(IMAGES)) $(if $(BITS),--bits $(BITS))

serve: $(VENV)/.ready ## run both services until Ctrl-C
	@PYTHONPATH=examples $(BIN)/python -m demo.serve $(if $(BITS),--bits $(BITS))

stop: $(VENV)/.ready ## stop the services that make demo left up
	@PYTHONPATH=examples $(BIN)/python -m demo.background

test: $(VENV)/.ready $(TOOLS)/.ready ## run every test that needs no GPU
	@$(TEST_ENV) $(BIN)/python -m pytest -m "not gpu" -n 3 --dist loadfile $(PYTEST_ARGS)

check: lint types imports proto-check docker-lint ## lint, types, import direction, contract drift, Dockerfiles

lint: $(VENV)/.ready
	@$(BIN)/ruff check $(PYTHON_DIRS)
	@$(BIN)/ruff format --check $(PYTHON_DIRS)

types: $(VENV)/.ready
	@$(BIN)/mypy $(PYTHON_DIRS)

imports: $(VENV)/.ready
	@$(BIN)/lint-imports

format: $(VENV)/.ready ## rewrite the Python sources in the house format
	@$(BIN)/ruff check --fix $(PYTHON_DIRS)
	@$(BIN)/ruff format $(PYTHON_DIRS)

proto: $(VENV)/.ready ## regenerate the committed protobuf stubs
	@find proto/vqstack -name '*_pb2*.py*' -delete
	@cd proto && PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc -I. \
	  --python_out=. --mypy_out=quiet:. --grpc_python_out=. --mypy_grpc_out=quiet:. $(PROTOS)

proto-check: $(TOOLS)/.ready proto
	@$(TOOLS_BIN)/buf lint proto
	@git diff --exit-code --stat -- proto \
	  || { echo "committed stubs differ from the protos: commit the result of 'make proto'" >&2; exit 1; }

bench: $(VENV)/.ready ## measure the native kernels side by side with their peers
	@$(BIN)/python -m vqkernels.bench

bench-scq: $(VENV)/.ready ## measure the SCQ solvers and the frame codec side by side with their peers
	@OMP_NUM_THREADS=1 $(BIN)/python -m scq.bench_solver $(if $(JSON),--json $(JSON)/solver.json)
	@OMP_NUM_THREADS=1 $(BIN)/python -m scq.bench_codec $(if $(JSON),--json $(JSON)/codec.json)

bench-quant: $(VENV)/.ready ## measure the quantizers side by side with their peers
	@$(BIN)/python -m vqllm.evaluation.bench $(MODELS) $(if $(JSON),--json $(JSON)/quantization.json) \
	  $(if $(SEEDS),--seeds $(SEEDS)) $(if $(WINDOWS),--windows $(WINDOWS)) $(if $(ONLY),--only "$(ONLY)") \
	  $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP)) $(if $(GPTQMODEL_PYTHON),--gptqmodel-python $(GPTQMODEL_PYTHON))

bench-llm: $(VENV)/.ready ## measure decoding and prefill side by side with ONNX Runtime and llama.cpp
	@PYTHONPATH=examples $(BIN)/python -m demo.bench $(if $(JSON),--json $(JSON)/llm.json) \
	  $(if $(BITS),--bits $(BITS)) $(if $(GGUF),--gguf $(GGUF)) \
	  $(if $(PROMPT),--prompt $(PROMPT)) $(if $(BATCH),--batch $(BATCH)) $(if $(ROUNDS),--rounds $(ROUNDS))

# Needs no set-up but torch with CUDA and nvcc (or the NVRTC that torch brings): runs from the tree.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
bench-gpu: ## check and measure the CUDA kernels on this machine's GPU
	@PYTHONPATH=engine $(GPU_PYTHON) -m vqkernels.cuda.bench $(if $(JSON),--json $(JSON)/gpu.json)

soak: $(VENV)/.ready ## half an hour of clients that come, leave and give up (SECONDS=1800)
	@PYTHONPATH=examples $(BIN)/python -m demo.soak --seconds $(or $(SECONDS),1800)

load: $(VENV)/.ready ## short open-loop load test of both services on loopback
	@PYTHONPATH=examples $(BIN)/python -m demo.load

docker-lint: $(TOOLS)/.ready ## lint the Dockerfiles
	@$(TOOLS_BIN)/hadolint deploy/docker/*.Dockerfile

clean: ## remove everything that the targets made here (the model cache stays)
	rm -rf $(VENV) $(TOOLS) build dist demo-out .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
