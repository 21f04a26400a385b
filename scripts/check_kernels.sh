#!/usr/bin/env bash
# The build for Hugging Face's hub of kernels, loaded by the package `kernels`, in an environment of
# its own: two versions in one process, against dense float64.
#     bash scripts/check_kernels.sh [PYTHON]
set -euo pipefail
python="${1:-python3}"
here="$(cd "$(dirname "$0")/.." && pwd)"
env="$(mktemp -d)"
trap 'rm -rf "$env"' EXIT
"$python" -m venv "$env"
"$env/bin/python" -m pip --quiet --disable-pip-version-check install \
    --constraint "$here/constraints.txt" kernels pytest "$here"
# Without an "s" in the summary, the test that needs the package was run.
(cd "$here" && "$env/bin/python" -m pytest -q -p no:benchmark tests/sparse_topk/test_hub_kernel.py) |
    tee "$env/log"
if grep -q skipped "$env/log"; then echo "a test was skipped"; exit 1; fi
