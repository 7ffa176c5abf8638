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

.PHONY: setup demo check test test-fast test-slurm test-stores kill-storm submit status collect doctor format clean

$(STAMP): pyproject.toml images/requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep ^torch== images/requirements.lock)"
	$(BIN)/python -m pip install -q -r images/requirements.lock && $(BIN)/python -m pip install -q --no-deps -e . && touch $@

setup: $(STAMP)  ## create the environment, with locked versions

demo: setup  ## six smoke tasks, one preempted and one killed, then table, plots and report
	$(BIN)/baton submit smoke/medical_qa --store runs/demo --drill lora_100k=TERM@8 --drill qlora_50k=KILL@7
	$(BIN)/baton status smoke/medical_qa --store runs/demo
	$(BIN)/baton collect smoke/medical_qa --store runs/demo --out results/demo

check: setup  ## style, types, layers and shell scripts
	$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache
	git ls-files '*.sh' '*.sbatch' '.ci/run' | xargs -r $(BIN)/shellcheck

test: setup check  ## everything that needs no GPU
	$(BIN)/python -m pytest -q -n 2 --ignore tests/slurm --ignore tests/stores $(ARGS)

test-fast: setup  ## the tests that take seconds
	$(BIN)/python -m pytest -q -n 2 -m "not slow" --ignore tests/slurm --ignore tests/stores $(ARGS)

test-slurm: setup  ## install a real Slurm and Docker from apt, boot them, run the Slurm tests, stop them
	bash tests/services/slurm_install.sh && bash tests/services/docker_install.sh
	$(BIN)/python -m pytest -q -n 3 --dist worksteal tests/slurm $(ARGS)

test-stores: setup  ## the stores: moto and a small Hub, then a real S3 server from apt (Ceph)
	bash tests/services/ceph_install.sh
	$(BIN)/python -m pytest -q -n 2 tests/stores $(ARGS)
	bash tests/services/with_ceph.sh $(BIN)/python -m pytest -q -n 2 tests/stores/test_s3.py tests/contracts/test_store_contract.py -k s3 $(ARGS)

kill-storm: setup  ## kill smoke tasks N times at random moments, STORE=local, s3 or hub; compare every byte
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
