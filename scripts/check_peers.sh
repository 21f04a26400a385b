#!/usr/bin/env bash
# Test converted SAEs and exports against the real classes of sparsify, SAELens, dictionary_learning,
# SAEBench, sae-probes and delphi.
#     bash scripts/check_peers.sh [PYTHON]
# PYTHON belongs to an environment that can run the tests (default: .venv). Each library gets its own
# environment in the folder $PEERS (default: .venv/peers), which is kept for the next run.
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

environment saelens sae-lens==6.54.12 sae-probes==0.4.2 tabulate
# SAEBench requires older versions of numpy and datasets than SAELens does; the parts tested here need
# neither.
"$PEERS/saelens/bin/python" -m pip install --quiet --no-deps sae-bench==0.6.0
touch "$PEERS/saelens/ready"

environment dictionary_learning dictionary-learning==0.1.0
# Its transformers would import torchvision, which needs another version of torch.
"$PEERS/dictionary_learning/bin/python" -m pip uninstall --quiet --yes torchvision
touch "$PEERS/dictionary_learning/ready"

environment delphi eai-delphi==0.1.3
# Its explainers need packages that are built for another torch, which transformers would import.
"$PEERS/delphi/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
touch "$PEERS/delphi/ready"

cd "$here"
"$python" -m pytest -p no:benchmark tests/formats/test_peers.py tests/exports -q -s
