"""What the programs share: settings from a command line, and how a program ends."""

from dataclasses import dataclass

import pytest

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


def test_a_bug_keeps_its_traceback():
    with pytest.raises(FloatingPointError):
        cli.run_program(lambda: (_ for _ in ()).throw(FloatingPointError()))


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
