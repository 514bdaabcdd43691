# make reproduce          every notebook into build/, then the differences from the committed figures
# make reproduce NB=21_d_adaptation      one notebook (its name or number)
# make reproduce PROFILE=gpu             at full scale, with the values of notebooks/gpu.yml
# make book               the course as web pages, build/book/index.html
# make test | lab | figures | clean      tests; JupyterLab; refresh notebooks/ and figures/; tidy
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

export TQDM_DISABLE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: reproduce figures book test lab clean

reproduce: $(READY)
	@$(BIN)/python -m prodigy.lab.reproduce $(NB) $(if $(PROFILE),--profile $(PROFILE))

figures: $(READY)
	@$(BIN)/python -m prodigy.lab.reproduce $(NB) --refresh
	@$(BIN)/python -m prodigy.lab.scoreboard

book: $(READY)
	@$(BIN)/python -m prodigy.lab.book

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

lab: $(READY)
	$(BIN)/python -m jupyter lab notebooks

clean:
	rm -rf build .pytest_cache *.egg-info
	find prodigy tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) is not installed; name a Python of 3.11 or newer: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' || \
		{ echo "$$($(PYTHON) --version 2>&1) is too old; this needs 3.11 or newer: make PYTHON=..."; \
		exit 1; }
	@echo "Building $(VENV) from requirements.txt, once; this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
