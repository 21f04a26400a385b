#!/usr/bin/env bash
# Converted SAEs against the real classes of sparsify, SAELens, dictionary_learning and SAEBench,
# each in an environment of its own in the folder PEERS, which is kept.
#     bash scripts/check_peers.sh [PYTHON of an environment that can run the tests]
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
python="${1:-$here/.venv/bin/python}"
export PEERS="${PEERS:-$here/.venv/peers}"

environment() { # NAME PACKAGE…
    local env="$PEERS/$1"
    [ -e "$env/ready" ] && return
    "$python" -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "${@:2}"
}

environment sparsify eai-sparsify==1.3.3 && touch "$PEERS/sparsify/ready"

environment saelens sae-lens==6.54.12 tabulate
# SAEBench asks for an older numpy and datasets than SAELens; what is used of it needs neither.
"$PEERS/saelens/bin/python" -m pip install --quiet --no-deps sae-bench==0.6.0
touch "$PEERS/saelens/ready"

environment dictionary_learning dictionary-learning==0.1.0
# Its transformers imports torchvision where it is there, and that one needs another torch.
"$PEERS/dictionary_learning/bin/python" -m pip uninstall --quiet --yes torchvision
touch "$PEERS/dictionary_learning/ready"

cd "$here"
"$python" -m pytest -p no:benchmark tests/formats/test_peers.py -q -s
