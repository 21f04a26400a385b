# make train            train an MLSAE of the built-in model, offline: runs/demo/report.html
# make test             run the tests
# make check            run ruff, ruff format, mypy, and make docs
# make docs             build the documentation as a site: build/site
# make notebooks        run the notebooks, offline: build/notebooks
# make bench            run the benchmarks
# make gpu              on a GPU, in five minutes: the kernels' tests, a step's time, the tiles' times
# make check-release    build a release, install it into an empty environment, use it there
# make check-kernels    load the build for the hub of kernels with the Hugging Face package `kernels`
# make check-install    install beside the Hugging Face package `kernels`, and uninstall again
#
# All but gpu and check-… set up .venv first, with the versions of constraints.txt. To use another Python:
# PYTHON=python3.12 make …

PYTHON ?= python3

.PHONY: train test check docs notebooks bench gpu check-release check-kernels check-install

train: .venv/installed
	.venv/bin/python -m mlsae.train --out runs/demo --overwrite

test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadfile -p no:benchmark

check: .venv/installed docs
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/installed
	.venv/bin/python -m scripts.build_docs

notebooks: .venv/installed
	.venv/bin/python -m scripts.run_notebooks

bench: .venv/installed
	.venv/bin/python -m pytest bench/ --benchmark-only

gpu:
	PYTHON=$(PYTHON) bash bench/gpu.sh

check-release:
	bash scripts/check_release.sh $(PYTHON)

check-kernels:
	bash scripts/check_kernels.sh $(PYTHON)

check-install:
	bash scripts/check_install.sh $(PYTHON)

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: PYTHON=python3.11 make ..."; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
