#!/usr/bin/env bash
# A release as a user gets it: built, installed from the file into an empty environment, and used
# there: the README's example, a small training, what it left. The files stay in dist/.
#     bash scripts/check_release.sh [PYTHON]
set -euo pipefail
python="${1:-python3}"
here="$(cd "$(dirname "$0")/.." && pwd)"
env="$(mktemp -d)"
trap 'rm -rf "$env"' EXIT
pip() { "$1/bin/python" -m pip --quiet --disable-pip-version-check "${@:2}"; }

echo "build the sdist, and the wheel from it"
"$python" -m venv "$env/build"
pip "$env/build" install build twine
rm -rf "$here/dist"
"$env/build/bin/python" -m build --outdir "$here/dist" "$here" >"$env/build.log" ||
    { tail -n 30 "$env/build.log"; exit 1; }
"$env/build/bin/python" -m twine check --strict "$here"/dist/*

echo "install the wheel"
"$python" -m venv "$env/user"
pip "$env/user" install --constraint "$here/constraints.txt" "$here"/dist/mlsae-*.whl
pip "$env/user" check
cd "$env" # so that nothing of the source tree is imported
unset PYTHONPATH

echo "the README's example, on the CPU"
cat >example.py <<'EOF'
import re
import sys

import torch

with open(sys.argv[1], encoding="utf-8") as readme:
    example = re.search(r"```python\n(.*?)```", readme.read(), re.DOTALL)[1]
batches = [torch.randn(64, 512) for _ in range(2)]
assert example.count('device="cuda"') == 1
exec(example.replace('device="cuda"', 'device="cpu"'))
EOF
user/bin/python example.py "$here/README.md"

echo "train the built-in model's SAE, analyze it, load it"
user/bin/python -m mlsae.train --tokens 8192 --batch_tokens 1024 --eval_tokens 1024 --seq_len 128 \
    --sae.expansion 2 --sae.k 8 --out run
user/bin/python -m mlsae.analyze run --tokens 1024
test -s run/report.html
user/bin/python -c 'import mlsae; print(mlsae.MLSAE.from_pretrained("run"))'
echo "ok: $(ls "$here"/dist)"
