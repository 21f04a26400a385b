"""The programs on wrong, odd and damaged input; and the judgement of how they end."""

import pytest
from huggingface_hub import constants

from scripts import fuzz, fuzz_cases

CASES = 25


def test_every_program_ends_as_it_should_on_wrong_input(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    results = list(fuzz.run_cases(range(CASES), seed=0))
    assert len(results) == CASES
    failed = [f"{r.command}\n{r.complaint}" for r in results if r.complaint]
    assert not failed, "\n".join(failed)
    assert {r.code for r in results} == {0, 2}


def test_a_case_depends_on_its_number_only(tmp_path):
    for name in ("a", "b"):
        fuzz_cases.make_places(tmp_path / name)
    a, b = (fuzz_cases.make_case(7, 3, tmp_path / name) for name in ("a", "b"))
    assert (a.program, a.arguments, a.faults) == (b.program, b.arguments, b.faults)
    assert fuzz_cases.make_case(8, 3, tmp_path / "a") != a


@pytest.mark.parametrize(
    ("code", "stderr", "after", "complaint"),
    [
        (0, "done\n", {"a": (1, 1, 1), "b": (1, 1, 1)}, ""),
        (2, "warning\nerror: --k must be at least 1\n", {"a": (1, 1, 1)}, ""),
        (2, "╭ Parsing error ╮\n│ oh │\n╰────╯\n", {"a": (1, 1, 1)}, ""),
        (2, "error: cannot write b: No space left\n", {"a": (2, 2, 2)}, ""),
        (3, "", {"a": (1, 1, 1)}, "exit code 3"),
        (1, "error: no\n", {"a": (1, 1, 1)}, "exit code 1"),
        (2, "oh no\n", {"a": (1, 1, 1)}, "the last line is 'oh no'"),
        (0, "Traceback (most recent call last):\n", {"a": (1, 1, 1)}, "a traceback"),
        (0, "", {"a": (1, 1, 1), "b.partial": (1, 1, 1)}, "unfinished: ['b.partial']"),
        (2, "error: no\n", {"a": (1, 1, 2)}, "changed: ['a']"),
        (2, "error: no\n", {}, "changed: ['a']"),
    ],
)
def test_what_is_wrong_with_an_end_is_said(code, stderr, after, complaint):
    assert fuzz.judge("evaluate", code, stderr, {"a": (1, 1, 1)}, after) == complaint


def test_a_case_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)

    def endless():
        while True:
            pass

    with pytest.raises(fuzz.HangError), fuzz.limits(None):
        endless()
