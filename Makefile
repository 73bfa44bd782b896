# make train: a small Gecko learns on this machine.   make test: the tests.
# Both make .venv first, from constraints.txt, and again when it or pyproject.toml changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test lint types clean

train: $(VENV)/.ready
	$(RUN) -m gecko_lab.train $(ARGS)

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -q $(ARGS)

lint: $(VENV)/.ready
	$(RUN) -m ruff check .

types: $(VENV)/.ready
	$(RUN) -m mypy -p gecko_lab

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,studies,harness,notebooks,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
