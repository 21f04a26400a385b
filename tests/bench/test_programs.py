"""The programs that measure a GPU, on a machine without one: that they run, on tiny sizes, and
write what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments, **more):
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"} | more
    env.pop("TRITON_INTERPRET", None)
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def written(folder, kind):
    (path,) = folder.glob(f"*-{kind}.json")
    return json.loads(path.read_text())


def test_the_steps_and_the_encodes(tmp_path):
    made = run("bench.step", "--device", "cpu", "--out", str(tmp_path))
    assert made.returncode == 0, made.stderr
    content = written(tmp_path, "step")
    assert content.pop("machine")["torch"]
    steps = {row["step"]: row for row in content["training step"]}
    assert list(steps) == ["tiny", "tiny, 20 dead"]
    for row in steps.values():
        assert row["× mm"] > 0
        assert row["launches"] > 10
        assert row["peak, MB"] > 0
        assert abs(row["tokens/s"] * row["ms"] / 1e3 - row["N"]) < 1
    assert steps["tiny, 20 dead"]["launches"] > steps["tiny"]["launches"]  # AuxK's
    by = [row["by"] for row in content["encode"] if row["shape"] == "tiny"]
    assert by[:3] == ["torch.mm", "sparse_topk", "torch.mm + torch.topk"]
    assert {row["N"] for row in content["few tokens"]} == {1, 16}
    for row in content["CUDA graph of a part"]:
        assert row["not captured"] == "CUDA graphs need a CUDA device"
    for section in content:
        assert made.stdout.index(f"{section}: ") < made.stdout.index(f"## {section}")


def test_what_there_is_no_time_for_is_named(tmp_path):
    made = run("bench.step", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0")
    assert made.returncode == 0, made.stderr
    assert "left out, out of time: tiny, 20 dead" in made.stdout
    assert "left out, out of time: graph of tiny" in made.stdout


def test_without_a_gpu_they_say_so_in_a_sentence():
    for program in ("bench.step", "bench.tune"):
        refused = run(program)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].endswith(
            "there is no CUDA device; --device cpu runs the program on tiny sizes"
        )


def test_tiles_are_timed_beside_the_one_that_is_shipped(tmp_path):
    """In the interpreter, so the times mean nothing."""
    made = run("bench.tune", "--device", "cpu", "--kernel", "gather_sum", "--out", str(tmp_path))
    assert made.returncode == 0, made.stderr
    content = written(tmp_path, "tune")
    shipped, *candidates = content["tiles"]
    assert shipped["× shipped"] == 1
    assert len({row["tile"] for row in content["tiles"]}) == len(content["tiles"]) >= 4
    (best,) = content["best"]
    assert best["shipped"] == shipped["tile"]
    fastest = min([shipped, *candidates], key=lambda row: row["µs"])
    assert (best["best"], best["best, µs"]) == (fastest["tile"], fastest["µs"])
    assert "| gather_sum | tiny |" in made.stdout


def test_tiles_are_compiled_without_a_gpu():
    made = run("bench.tune", "--dry", "--kernel", "adam_rows", "--chip", "80")
    assert made.returncode == 0, made.stderr
    lines = [line for line in made.stdout.splitlines() if " sm_80 " in line]
    assert sum("shipped" in line for line in lines) == 2  # one for D = 512, one for 2048
    assert len(lines) >= 5
    registers = [int(line.split("sm_80")[1].split()[0]) for line in lines]
    assert len(set(registers)) > 2
    assert all(16 <= count <= 255 for count in registers)
    assert "0 of the tiles do not compile or fit" in made.stdout


def test_a_tile_that_does_not_compile_is_a_result(monkeypatch):
    code = """
import multiprocessing
from bench import tuning, tune_table
multiprocessing.set_start_method("fork")  # so that they see the broken tile, also on 3.14
tile = next(t for t in tune_table.TUNABLES if t.kernel == "adam_rows")
broken = tile._replace(candidates=lambda shape: [(shape.d + 1, 4)])
tuning.TUNABLES = (broken,)
print(tuning.compile_jobs((), (90,)))
"""
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    env.pop("TRITON_INTERPRET", None)
    made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert made.stdout.splitlines()[-1] == "2", made.stdout + made.stderr
    assert made.stdout.count("does not compile: ") == 2


def test_an_unknown_kernel_is_named():
    refused = run("bench.tune", "--dry", "--kernel", "gather")
    assert refused.returncode == 2
    assert "--kernel must be of group_size, top_keys" in refused.stderr


STUB = """#!/bin/bash
# A Python that has a GPU: it writes down what it is asked to run, and fails in the tests.
echo "$*" >>"$CALLS"
echo "ran $2 $3"
[ "$2" != pytest ]
"""


def test_make_gpu_runs_the_tests_then_both_programs(tmp_path):
    """All that they print is kept, and it ends as the tests do."""
    stub, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)
    env = os.environ | {"PYTHON": str(stub), "CALLS": str(calls), "OUT": str(out)}
    made = subprocess.run(
        ["bash", "bench/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert made.returncode == 1
    lines = [line for line in calls.read_text().splitlines() if line.startswith("-m bench")]
    assert lines[0] == "-m bench.tune --compile"
    assert lines[1] == f"-m bench.step --seconds 55 --out {out}"
    assert lines[2] == f"-m bench.tune --timed-only --seconds 55 --out {out}"
    assert "ran pytest tests/sparse_topk" in (out / "gpu-tests.log").read_text()
    assert "ran bench.step" in (out / "gpu-step.log").read_text()
    assert "ran bench.tune" in (out / "gpu-tune.log").read_text()
    order = [made.stdout.index(f"ran {name}") for name in ("pytest", "bench.step", "bench.tune")]
    assert order == sorted(order)


def test_make_gpu_needs_a_gpu():
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(["make", "gpu"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "bench/gpu.sh needs a CUDA device" in refused.stderr
