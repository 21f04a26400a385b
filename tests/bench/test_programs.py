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
