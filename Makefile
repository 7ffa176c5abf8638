# Targets are one to three lines; CI calls only these. VENV=… uses another environment.
VENV ?= .venv
BIN := $(VENV)/bin
EXP ?= medical_qa
SITE ?= local
N ?= 100
STORE ?= local
ARGS ?=
PYTHON ?= python3
# Where pip finds torch; for the small CPU build: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
STAMP := $(VENV)/.installed
# These need services that the tests' own targets install.
ELSEWHERE := --ignore tests/slurm --ignore tests/containers --ignore tests/stores --ignore tests/vllm
PIP := $(BIN)/python -m pip install -q --no-deps
# Images: a pip.conf for the build (never kept), the engine's command, more words for it.
IMAGE ?= baton
DOCKER ?= docker
PIP_CONF ?=
PIP_SECRET = --secret id=pip,src=$(PIP_CONF)
BUILD = DOCKER_BUILDKIT=1 $(DOCKER) build $(if $(PIP_CONF),$(PIP_SECRET)) \
	--build-arg COMMIT=$$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown) \
	--build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' src/baton/__init__.py)

.PHONY: setup demo check test test-fast test-slurm test-containers test-stores test-kernels test-vllm lock image image-cpu image-check kill-storm submit status collect doctor format clean

# torch by its version alone: the index decides which of its builds fits, and that what else is needed.
$(STAMP): pyproject.toml $(wildcard images/*.lock)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $$(grep -o '^[a-z]*==[^ ]*' images/torch.lock)
	$(PIP) --require-hashes --no-build-isolation --use-pep517 -r images/requirements.lock -r images/dev.lock
	$(BIN)/python -m pip check >/dev/null || $(PIP) --require-hashes -r images/cuda.lock
	$(PIP) --no-build-isolation -e . && touch $@

setup: $(STAMP)  ## create the environment, with locked versions

lock: setup  ## write the locks anew from what is installed
	$(BIN)/python images/lock.py

demo: setup  ## six smoke tasks, one preempted and one killed, then table, plots and report
	$(BIN)/baton submit smoke/medical_qa --store runs/demo --drill lora_100k=TERM@8 --drill qlora_50k=KILL@7
	$(BIN)/baton status smoke/medical_qa --store runs/demo
	$(BIN)/baton collect smoke/medical_qa --store runs/demo --out results/demo

check: setup  ## style, types, layers, shell scripts and Dockerfiles
	$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache
	git ls-files '*.sh' '*.sbatch' '.ci/run' | xargs -r $(BIN)/shellcheck
	$(BIN)/hadolint Dockerfile.cuda images/cpu.Dockerfile

test: setup check  ## everything that needs no GPU
	$(BIN)/python -m pytest -q -n 2 $(ELSEWHERE) $(ARGS)

test-fast: setup  ## the tests that take seconds
	$(BIN)/python -m pytest -q -n 2 -m "not slow" $(ELSEWHERE) $(ARGS)

test-slurm: setup  ## install a real Slurm and Docker from apt, boot them, run the Slurm tests, stop them
	bash tests/services/slurm_install.sh && bash tests/services/docker_install.sh
	$(BIN)/python -m pytest -q -n 3 --dist worksteal tests/slurm $(ARGS)

test-stores: setup  ## the stores: moto and a small Hub, then a real S3 server from apt (Ceph)
	bash tests/services/ceph_install.sh
	$(BIN)/python -m pytest -q -n 2 tests/stores $(ARGS)
	bash tests/services/with_ceph.sh $(BIN)/python -m pytest -q -n 2 tests/stores/test_s3.py tests/contracts/test_store_contract.py -k s3 $(ARGS)

test-containers: setup  ## install a real Docker engine from apt, build the images in it, run them
	bash tests/services/docker_install.sh
	$(BIN)/python -m pytest -q tests/containers $(ARGS)

test-kernels: setup  ## install Triton beside the environment, try our GPU kernels in its interpreter
	sed -n '/^triton==/,/[^\\]$$/p' images/cuda.lock >$(VENV)/triton.lock
	$(PIP) --require-hashes --upgrade --target $(VENV)/triton -r $(VENV)/triton.lock
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest -q -n 2 -m kernels tests/unit $(ARGS)

test-vllm: setup  ## install vLLM for the CPU beside the environment, have it answer
	PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) bash tests/services/vllm_install.sh $(VENV)-vllm
	BATON_VLLM_PYTHON=$(abspath $(VENV)-vllm)/bin/python $(BIN)/python -m pytest -q tests/vllm $(ARGS)

image:  ## build the GPU image; make image ARGS='--target eval-vllm' IMAGE=baton:vllm adds vLLM
	$(BUILD) --build-arg TORCH=$$(sed -n 's/^torch==\([^ ]*\).*/\1/p' images/torch.lock) -f Dockerfile.cuda -t $(IMAGE) $(ARGS) .

image-cpu:  ## build the CPU image, baton:cpu
	$(BUILD) --build-arg TORCH=$$(sed -n 's/^torch==\([^ ]*\).*/\1/p' images/torch-cpu.lock) -f images/cpu.Dockerfile -t $(IMAGE):cpu $(ARGS) .

image-check: setup  ## style of both Dockerfiles; size, layers, secrets and weights of an image
	$(BIN)/hadolint Dockerfile.cuda images/cpu.Dockerfile
	DOCKER=$(DOCKER) bash images/check.sh $(IMAGE)

kill-storm: setup  ## kill smoke tasks N times at random moments, STORE=local, s3, hub or bucket; compare every byte
	$(BIN)/python tests/handover/kill_storm.py --kills $(N) --store $(STORE) $(ARGS)

submit: setup  ## make submit EXP=qlora_100k SITE=local
	$(BIN)/baton submit $(EXP) --site $(SITE) $(ARGS)

status: setup
	$(BIN)/baton status $(EXP) --site $(SITE) $(ARGS)

collect: setup
	$(BIN)/baton collect $(EXP) --site $(SITE) $(ARGS)

doctor: setup  ## what a site lacks, and what to mend: make doctor SITE=slurm-a100
	$(BIN)/baton doctor --site $(SITE) $(ARGS)

format: setup
	$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .

clean:  ## remove what the demo and the checks left; runs/ and results/ of your own stay
	rm -rf runs/demo results/demo .pytest_cache .mypy_cache .ruff_cache
