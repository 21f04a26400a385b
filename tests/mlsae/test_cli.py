"""What the programs share: settings from a command line, and how a program ends."""

import errno
import os
from dataclasses import dataclass

import pytest
import torch

from mlsae import cli
from mlsae.distributed import LostContactError
from mlsae.errors import InputError, first_line


@dataclass(frozen=True)
class Settings:
    """Some settings."""

    max_tokens: int = 3


def test_settings_come_from_the_command_line_or_the_default():
    parse = lambda *arguments, **options: cli.parse(  # noqa: E731
        Settings, "Do it.\n\nLegend: N tokens.", arguments, "python -m do", **options
    )
    assert parse("--max_tokens", "5") == Settings(5)
    assert parse() == Settings(3)
    assert parse(default=Settings(7)) == Settings(7)


def test_the_help_leaves_out_the_legend(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Settings, "Do it.\n\nLegend: N tokens.", ["--help"], "python -m do")
    shown = capsys.readouterr().out
    assert "Do it." in shown
    assert "Legend" not in shown


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("--k must be at least 1, got 0"), 2, "error: --k must be at least 1, got 0"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan"),
        (LostContactError("lost contact"), 1, "error: lost contact; continue with the same"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_a_program_ends_with_a_message_and_an_exit_code(error, code, message, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_LAUNCHER_SECONDS", 0)

    def run():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run_program(run, FloatingPointError, interrupted="stopped")
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: there is too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: there is too little memory"),
        (OSError(errno.ENAMETOOLONG, "too long", "x"), "error: cannot read or write x: too long"),
        (OSError(errno.ENOSPC, "no space", "x"), "error: cannot write x: no space; free some"),
        (OSError(errno.ENOSPC, "no space"), "error: cannot write the output: no space"),
        (InputError("404\n\n  Not found\n"), "error: 404 Not found"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, message, capsys):
    def run():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run_program(run)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize("shape", [(2**62, 4), (2**40, 2**10)])
def test_a_tensor_that_cannot_be_made_is_too_little_memory(shape, capsys):
    """Torch's own errors on the CPU, which have no type of their own."""
    with pytest.raises(SystemExit, match="2"):
        cli.run_program(lambda: torch.empty(shape))
    assert "error: there is too little memory" in capsys.readouterr().err


def test_nobody_reads_the_output(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        with pytest.raises(SystemExit, match="1"):
            cli.run_program(lambda: print("result"))


def test_a_path_that_is_not_utf8_is_printed(tmp_path, monkeypatch):
    with (tmp_path / "out").open("w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        cli.run_program(lambda: print("folder/\udcff ± "))
    assert (tmp_path / "out").read_text() == "folder/\\udcff ± \n"


def test_a_preset_without_its_value_is_left_to_the_parser():
    assert cli.preset(["--preset"], {"default": Settings(1), "paper": Settings(2)}) == Settings(1)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(FloatingPointError):
        cli.run_program(lambda: (_ for _ in ()).throw(FloatingPointError()))


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
