"""What `conftest.py` promises of every test run: a failure is printed when it happens."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "xdist"])
def test_a_failure_is_printed_before_the_next_test_runs(tmp_path, workers):
    """The last test ends the process, as a time limit does: there is no summary."""
    shutil.copy(TESTS / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / "test_broken.py").write_text("import nothing_by_this_name\n")
    (tmp_path / "test_some.py").write_text(
        "import os, time, pytest\n"
        "def test_fails(): assert 1 + 1 == 3, 'arithmetic'\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('no fixture')\n"
        "def test_has_no_fixture(broken): pass\n"
        "def test_hangs():\n"
        "    time.sleep(3)\n"
        "    os.kill(int(os.environ['TO_END']), 9)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    code = (
        "import os, sys; os.environ['TO_END'] = str(os.getpid()); "
        f"os.execv({sys.executable!r}, {[*command, '--continue-on-collection-errors', '.']!r})"
    )
    made = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == -9
    assert "NOT COLLECTED: test_broken.py" in made.stdout
    assert "No module named 'nothing_by_this_name'" in made.stdout
    assert "FAILED at call: test_some.py::test_fails" in made.stdout
    assert "AssertionError: arithmetic" in made.stdout
    assert "FAILED at setup: test_some.py::test_has_no_fixture" in made.stdout
    assert "ValueError: no fixture" in made.stdout
    assert "short test summary" not in made.stdout


def test_kernels_may_take_as_long_as_they_take_to_compile():
    from hypothesis import settings

    assert settings().deadline is None
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
