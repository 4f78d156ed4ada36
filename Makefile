# `make demo` and `make test` set up what they need in .venv, then do their work. Both use the CPU.
# `make gpu` runs with the Python at hand, which has torch and Triton; nothing is installed.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo findings test sanitize soak gpu pretrained lint clean

.venv/ready: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(INSTALL) --constraint constraints.txt --editable '.[video]'
	touch $@

# xformers' mask classes are a peer in the tests; its own dependencies would replace torch. Tests skip where it is missing.
.venv/ready-to-test: .venv/ready
	$(INSTALL) --constraint constraints.txt --editable '.[video,bench,direct,pretrained,train,dev]'
	-$(INSTALL) --no-deps xformers==0.0.35
	touch $@

demo: .venv/ready
	$(BIN)/lct demo --out demo

# What of the paper's findings holds at small scale: trains what it needs, hours on two cores; goes on where it stopped.
findings: .venv/ready-to-test
	$(BIN)/lct bench findings --check

test: .venv/ready-to-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# csrc/ on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: .venv/ready-to-test
	tests/sanitize.sh $(BIN)/python

# Kills training 240 times, then takes 3,000 steps: about five minutes. The suite does 15 and 400.
soak: .venv/ready-to-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --out bench/results/soak-cpu.json

gpu:
	$(PYTHON) bench/gpu.py

lint: .venv/ready-to-test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/pyright --pythonpath $(BIN)/python --level error lct

# The single-shot model that the stages of `make demo` start from: about 25 minutes on two cores.
pretrained: .venv/ready
	$(BIN)/lct train tiny_pretrain --out runs/tiny_pretrain --share lct/assets/tiny_pretrained.safetensors

clean:
	rm -rf .venv build demo runs *.egg-info lct/_native.so lct/_native.json
