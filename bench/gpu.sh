#!/usr/bin/env bash
# On a GPU, in five minutes and without network: run the tests of the kernels, then time the training
# steps (bench.step) and the tiles (bench.tune). All that is printed is also written to $OUT (default:
# bench/results) as it comes, so that a run that is cut off loses nothing. Exits as the tests do.
#
#     PYTHON=python3.12 OUT=/tmp/out bash bench/gpu.sh
#
# What the package needs and the machine lacks is installed from wheels in .wheels, if there are any
# (docs/speed.md says which).
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results}
mkdir -p "$out"
export PYTHONPATH="$PWD/kernels:$PWD" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/sparse-topk-triton}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh needs a CUDA device, and the torch of $python sees none" >&2
    exit 2
fi
if compgen -G '.wheels/*.whl' >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps .wheels/*.whl
fi

# Every tile into Triton's cache, beside the tests, which are not timed.
nice "$python" -m bench.tune --compile >"$out/gpu-compile.log" 2>&1 &
compiling=$!

# All tests of the kernel package but those of what runs on a CPU alone. A failure is printed when it
# happens (tests/conftest.py).
timeout 130 "$python" -m pytest tests/sparse_topk -k 'not inductor' \
    --ignore=tests/sparse_topk/test_compiled.py --ignore=tests/sparse_topk/test_dtensor.py \
    --ignore=tests/sparse_topk/test_allocator.py \
    -n 10 --dist worksteal -q -rf --tb=short -p no:benchmark --continue-on-collection-errors \
    2>&1 | tee "$out/gpu-tests.log"
tests=${PIPESTATUS[0]}
[ "$tests" = 124 ] && echo "the tests were cut off after 130 s" | tee -a "$out/gpu-tests.log"

timeout 20 tail --pid=$compiling -f /dev/null || kill $compiling
timeout 70 "$python" -m bench.step --seconds 55 --out "$out" 2>&1 | tee "$out/gpu-step.log"
timeout 70 "$python" -m bench.tune --timed-only --seconds 55 --out "$out" 2>&1 | tee "$out/gpu-tune.log"
exit "$tests"
