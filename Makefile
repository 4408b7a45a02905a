# `make demo` and `make test` do all the set-up on a fresh machine. Every install goes through constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers/bin
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt
DEMO_MODELS := metanet_n(mixer=depthwise),metanet_n(mixer=self_attention),metanet_n(mixer=pooling)
DEMO_OUT ?= runs/demo

.PHONY: demo test slow parity docs pictures lint types clean

demo: .venv/.ready  ## compare three networks on the built-in digits, write the report
	$(BIN)/opsin compare digits --models "$(DEMO_MODELS)" --budget 12s --seeds 3 --out $(DEMO_OUT)

test: .venv/.ready-dev  ## the default test suite, with coverage
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered

slow: .venv/.ready-dev  ## the minutes-long tests
	$(BIN)/python -m pytest -m slow

parity: .venv-peers/.ready  ## the same weights in timm and here
	$(PEERS)/python -m pytest tests/parity -m parity

docs: .venv/.ready-dev
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pictures: demo  ## the pictures of the README
	$(BIN)/python docs/pictures.py $(DEMO_OUT)

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/.ready-dev
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.ready: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install $(PIP_FLAGS) -e '.[export]'
	touch $@

.venv/.ready-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install $(PIP_FLAGS) -e '.[export,dev]'
	touch $@ .venv/.ready

.venv-peers/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/pip install $(PIP_FLAGS) -e '.[peers]' pytest pytest-timeout
	touch $@

clean:
	rm -rf .venv .venv-peers runs site dist
