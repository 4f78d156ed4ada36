# `make demo` and `make test` set up what they need in .venv, then do their work. Both use the CPU.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test pretrained lint clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[video,dev]'
	# A peer whose masks the tests compare with ours; its own dependencies would replace torch.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps xformers==0.0.35
	touch $@

demo: .venv/ready
	$(BIN)/lct demo --out demo

test: .venv/ready lint
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check --quiet .
	$(BIN)/pyright --level error lct

# The single-shot model that the stages of `make demo` start from, about half an hour on one core.
pretrained: .venv/ready
	$(BIN)/lct train tiny_pretrain --out runs/tiny_pretrain --share lct/assets/tiny_pretrained.safetensors

clean:
	rm -rf .venv build demo runs *.egg-info
