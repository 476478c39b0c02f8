# Two commands do everything on a new machine: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test proofs check clean

venv: .venv/installed

.venv/installed: requirements.txt requirements-test.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; call make PYTHON=python3.12, say" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
	touch .venv/installed

demo: venv
	$(BIN)/python recipes/demo/demo.py

test: venv check
	$(BIN)/python -m pytest

proofs: venv
	$(BIN)/python -m pytest -m slow -n 0

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf .venv outputs
