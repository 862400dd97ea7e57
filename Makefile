# Everything a fresh clone needs is Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.demo
ALL := .[train,dev]
BIN := $(VENV)/bin

.PHONY: demo test histories thorough exhaustive soak check format picture clean

demo: $(DEMO)
	@$(BIN)/trainctl demo

test: $(STAMP)
	@$(BIN)/python -m pytest

# Two thousand simulated histories and some dozens of real ones, up to eight ranks, every fault of a save: CI runs these
# after the tests. They wait more than they compute, hence three at a time.
RARE := tests/histories tests/e2e/test_every_rank.py
RARE += tests/trainer/test_checkpoint_faults.py tests/trainer/test_checkpoint_power_cut.py
histories: $(STAMP)
	@$(BIN)/python -m pytest -m thorough --numprocesses 3 --dist load -rfEp $(RARE)

# Those, and all else that takes minutes and finds what is rare; a quarter of an hour.
thorough: $(STAMP)
	@$(BIN)/python -m pytest -m thorough --numprocesses 3 --dist load -rfEp

# What takes longest, each with a smaller brother above.
exhaustive: $(STAMP)
	@$(BIN)/python -m pytest -m exhaustive

# Random histories of commands and faults, judged, for as long as told: make soak MINUTES=60
MINUTES ?= 10
soak: $(STAMP)
	@$(BIN)/python tests/histories/soak.py --minutes $(MINUTES)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# The README's picture, from a real run: make picture RUN=name-or-directory
picture: $(STAMP)
	@$(BIN)/python -m trainctl.tui.picture $(RUN) docs/cockpit.svg --size 120x36

clean:
	rm -rf $(VENV)

# The constraints file pins torch to the CPU build that development and CI use; users keep the torch they have.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trainctl needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11")'
@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
@echo "Setting up .venv (once) …"
@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e $(1)
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,'$(ALL)')
	@touch $(DEMO) $@

# The demo needs none of what the tests compare with, so a newcomer does not wait for it.
$(DEMO): pyproject.toml constraints.txt
	$(call install,'.[train]')
	@touch $@
