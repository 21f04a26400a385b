"""The cases of `scripts.fuzz`: command lines of the programs, and what is wrong with each.

A case depends on the seed and its number only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any

from mlsae import analyze, compare, convert, evaluate, formats, steer, trace, train
from mlsae.analysis.run import AnalyzeConfig
from mlsae.attribution.command_line import TraceConfig
from mlsae.config import SAESweep, TrainArguments
from mlsae.convert import ConvertConfig
from mlsae.data.config import DataConfig
from mlsae.evaluation.run import EvaluateConfig
from mlsae.intervention.command_line import SteerConfig
from mlsae.report import __main__ as report
from scripts.damage import damage

PROGRAMS = {
    "train": (train, TrainArguments),
    "evaluate": (evaluate, EvaluateConfig),
    "analyze": (analyze, AnalyzeConfig),
    "convert": (convert, ConvertConfig),
    "report": (report, report.ReportConfig),
    "compare": (compare, TrainArguments),
    "steer": (steer, SteerConfig),
    "trace": (trace, TraceConfig),
}
WEIGHTS = (5, 5, 5, 5, 5, 1, 5, 5)  # how often each program is run
SMALL = (
    "--tokens 128 --batch_tokens 64 --seq_len 16 --sae.expansion 1 --sae.k 4 --eval_tokens 32 "
    "--heldout_share 0.5 --layers 0 1"
).split()
MEASURE = ["--tokens", "64", "--resamples", "5"]
NUMBERS = (
    "0", "-1", "1", "2", "3.5", "1e3", "nan", "inf", "-inf", "1e-320", "99999999999999999999",
    "1000000000000000000000000000000",
    "9223372036854775807", "2147483648", "1_000", "0x10", "１",
)  # fmt: skip
WORDS = (
    "", " ", "abc", "None", "none", "true", "☃ naïve", "\udcff", "a/b/c/d", "no-one/nothing", "-",
    "--", "*", "[x]", "{}", "cuda:99", "cpu", "auto", "meta", "mps", "~", "~no-one/x", "'", "<s>",
)  # fmt: skip
PATHS = (
    "empty", "missing", "missing/inside", "text.txt", "text.txt/inside", "loop", "dangling",
    "a b [c]*?", "unreadable", "readonly/new", "binary.bin", "blank.txt", "latin1.txt", "tiny.txt",
    "nulls.jsonl", "numbers.jsonl", "broken.jsonl", "two-kinds", "x" * 300, ".", "/dev/full",
    "/dev/null/x", "/proc",  # and not "/": as root the programs would write there
    "run", "other", "damaged", "model",
)  # fmt: skip
SAES = (*formats.WRITTEN, "saelens5", "converted")  # folders in "sae"
# A huge one is right, and takes for ever.
ENDLESS = {"tokens", "eval_tokens", "keep_checkpoints", "check", "edges"}


@dataclass
class Case:
    """A command line, and what is done to the files in the folder it runs in."""

    program: str
    arguments: list[str]
    faults: list[str]
    max_bytes: int | None = None
    """Size at which writing a file fails, as on a full disk."""


def make_places(folder: Path) -> None:
    """Fill `folder` with texts, and with paths of every kind."""
    folder.mkdir(exist_ok=True)
    words = "the cat sat on a mat and saw def f(x): return x + 1 in the house of naïve ☃".split()
    text = " ".join(Random(0).choices(words, k=60_000))
    (folder / "text.txt").write_text(text)
    (folder / "tiny.txt").write_text("cat")
    (folder / "blank.txt").touch()
    (folder / "latin1.txt").write_bytes("naïve ".encode("latin1") * 500)
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "nulls.jsonl").write_text('{"text": null}\n{"text": "a"}\n' * 50)
    (folder / "numbers.jsonl").write_text('{"text": 3}\n[1]\n' * 50)
    (folder / "broken.jsonl").write_text('{"text": "a b c"}\n{"text": ')
    for name in ("empty", "a b [c]*?", "readonly", "unreadable", "two-kinds", "sae", "model"):
        (folder / name).mkdir()
    (folder / "two-kinds" / "a.txt").write_text(text)
    (folder / "two-kinds" / "b.jsonl").write_text('{"text": "a"}')
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "model" / "config.json").write_text('{"model_type": "bert"}')


def make_case(number: int, seed: int, folder: Path) -> Case:
    """The case of this number; damages files in `folder`, a copy of the material."""
    random = Random(f"{seed}/{number}")
    program = random.choices(list(PROGRAMS), WEIGHTS)[0]
    case = Case(program, _right_arguments(random, program), [])
    for _ in range(random.choice((1, 1, 1, 2, 2, 3))):
        kinds = [_odd_option, _odd_word, _damaged_file, _damaged_file, _full_disk]
        random.choices(kinds, (6, 3, 5, 5, 1))[0](random, case, folder)
    (folder / "unreadable").chmod(0)
    (folder / "readonly").chmod(0o555)
    return case


def _right_arguments(random: Random, program: str) -> list[str]:
    """A command line that works."""
    match program:
        case "train" | "compare":
            into = random.choice((["new"], ["new"], ["run", "--resume"], ["run", "--overwrite"]))
            return ["builtin", "text.txt", *SMALL, "--out", *into]
        case "evaluate":
            return [random.choice(("run", "damaged")), *MEASURE]
        case "analyze":
            prompt = random.choice(([], ["--prompt", "def f(x):"]))
            return [random.choice(("run", "damaged")), *MEASURE, *prompt]
        case "steer":
            change = random.choice((["--latent", "3", "--add", "2"], ["--edit", "3@0:ablate"]))
            text = ["--prompt", "def f(x):", "--max_new_tokens", "3", "--save", "new.json"]
            return [random.choice(("run", "damaged")), *text, *change]
        case "trace":
            files = ["--save", "new.json", "--page", "new.html"]
            what = random.choice((["--edges", "3"], ["--latent", "3", "--at_layer", "1"]))
            return [random.choice(("run", "damaged")), "--prompt", "def f(x):", *what, *files]
        case "convert":
            to = random.choice(list(formats.WRITTEN))
            several = ["sae", "new", "--hookpoint", random.choice(SAES), "--to", to]
            one = [f"sae/{random.choice(SAES)}", "new", "--to", to]
            return random.choice((one, one, several))
        case _:
            return random.choice((["run"], ["damaged"], ["run", "damaged"]))


def _options(config_type: Any, prefix: str = "") -> Iterator[str]:
    """The names of a program's options."""
    for field in fields(config_type):
        if "Positional" in str(field.type):
            continue
        nested = {"sae": SAESweep, "data": DataConfig}.get(field.name)
        if nested is not None and is_dataclass(nested):
            yield from _options(nested, "sae." if field.name == "sae" else "")
        else:
            yield prefix + field.name


def _odd_option(random: Random, case: Case, _folder: Path) -> None:
    """Give an option a value that is odd, or right where something else contradicts it."""
    name = random.choice(list(_options(PROGRAMS[case.program][1])))
    value = random.choice((random.choice(NUMBERS), random.choice(NUMBERS), _odd(random)))
    if name in ENDLESS and case.program in ("train", "compare") and len(value) > 6:
        value = "0"
    values = [value] if random.random() < 0.8 else [value, random.choice(NUMBERS)]
    case.arguments += random.choice(([f"--{name}", *values], [f"--{name}={value}"], [f"--{name}"]))
    case.faults.append(f"--{name} {values}")


def _odd_word(random: Random, case: Case, _folder: Path) -> None:
    """Replace, add or leave out a word of the command line."""
    i = random.randrange(len(case.arguments) + 1)
    number = case.arguments[i - 1] in {"--tokens", "--eval_tokens"}
    case.arguments[i : i + random.randrange(2)] = ["0"] if number else [_odd(random)]
    case.faults.append(f"word {i}")


def _odd(random: Random) -> str:
    return random.choice((random.choice(PATHS), random.choice(PATHS), random.choice(WORDS)))


def _damaged_file(random: Random, case: Case, folder: Path) -> None:
    """Damage one of the files that the program reads."""
    places = [
        folder / "run",
        folder / "damaged",
        *(folder / "sae" / name for name in SAES),
    ]
    given = {str(folder / at / name) for name in case.arguments[:4] for at in ("", "sae")}
    named = [place for place in places if str(place) in given and place.is_dir()]
    if case.program in ("train", "compare"):
        named = [folder / "run", folder / "run" / "checkpoints"]
    files = sorted(f for place in named for f in place.iterdir() if f.suffix != ".html")
    files = [file for file in files if file.is_file()]
    if files:
        case.faults.append(damage(random, random.choice(files)))


def _full_disk(random: Random, case: Case, _folder: Path) -> None:
    case.max_bytes = random.choice((100, 10_000, 100_000, 1_000_000))
    case.faults.append(f"a disk that is full after {case.max_bytes} bytes")
