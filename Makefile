PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test coverage quick lint docs site clean

# Everything below runs in a virtual environment that is made on first use.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

# The main job on real data: a ViT trained on handwritten digits becomes a family of four widths.
# The first run stands in for the pretrained weights that a user brings.
DIGITS := --data digits --hflip 0 --scale 0.9 1 --batch-size 64 --lr 2e-3 --workers 0
demo: $(VENV)/.installed
	rm -rf $(DEMO) && mkdir $(DEMO)
	cd $(DEMO) && S=../$(BIN)/scala && set -x && \
	$$S convert test_vit --scratch --num-classes 10 --img-size 8 --patch-size 2 -o random -q && \
	$$S finetune random $(DIGITS) --ratios 1 --method separate --epochs 30 -o pretrained -q && \
	$$S finetune pretrained $(DIGITS) --ratios 0.25,0.5,0.75,1 --epochs 20 -o runs/digits -q && \
	$$S slice --ratio 0.5 && \
	$$S bench

# In two processes, each with one thread for torch.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
test: $(VENV)/.installed
	$(PYTEST)

# All tests, and the lines that none of them runs; takes half as long again.
coverage: $(VENV)/.installed
	$(PYTEST) --cov=scala_cli --cov-report=term-missing:skip-covered --cov-fail-under=90

# The core alone: slicing, points, tokens, order of channels, methods.
QUICK := point slicing layers tokens slimmable order methods step cost budget cascade console remedies
quick: $(VENV)/.installed
	$(PYTEST) $(QUICK:%=tests/test_%.py)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell *.md docs scala_cli tests
	$(BIN)/mypy

# Writes docs/cli.md from the commands themselves.
docs: $(VENV)/.installed
	$(BIN)/python docs/make_cli.py > docs/cli.md

# Builds the documentation site into site/; fails for a broken link.
site: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(DEMO) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
