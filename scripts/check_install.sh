#!/usr/bin/env bash
# Ours beside the Hugging Face package `kernels`, which transformers imports: installed after it,
# before it, and uninstalled again, both must keep working.
#     bash scripts/check_install.sh [PYTHON]
set -euo pipefail
python="${1:-python3}"
here="$(cd "$(dirname "$0")/.." && pwd)"
env="$(mktemp -d)"
trap 'rm -rf "$env"' EXIT
"$python" -m venv "$env"
pip=("$env/bin/python" -m pip --quiet --disable-pip-version-check)

ours() { (cd "$env" && bin/python -c 'import sparse_topk, mlsae; sparse_topk.SparseTopKSAE(8, 16, 2)'); }
theirs() { (cd "$env" && bin/python -c 'import kernels; kernels.get_kernel; import transformers'); }
install() { "${pip[@]}" install --constraint "$here/constraints.txt" "$@"; }

echo "kernels first, then ours"
install kernels transformers
theirs
install "$here"
ours && theirs
echo "ours uninstalled"
"${pip[@]}" uninstall --yes mlsae
theirs
if ours 2>/dev/null; then echo "ours still works after it was uninstalled"; exit 1; fi
echo "ours first, then kernels"
"${pip[@]}" uninstall --yes kernels
install "$here"
ours
install kernels
ours && theirs
echo "ok: both work, in either order and after uninstalling"
