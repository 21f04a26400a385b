"""Run the programs on wrong, odd and damaged input, and check that each ends as it should.

    python -m scripts.fuzz --cases 300 --seed 0
    python -m scripts.fuzz --only 137            # one case again, with all that it prints

A case is a command line of one of the programs that would work,
with one to three faults: odd arguments, or damaged files. It depends on the seed and its number
only. Whatever the fault, a program must end in time with an exit code that `mlsae.cli` documents,
say what is wrong on its last line ("error: …") if that is 2, show no traceback, and leave no
unfinished file. With code 2 it must leave all files as they were, unless it says that it could not
write. It runs the programs in this process, offline, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries are imported

import torch

from mlsae import formats
from mlsae.formats import SavedSAE
from scripts.fuzz_cases import MEASURE, PROGRAMS, SMALL, make_case, make_places

SECONDS = 120
MAX_BYTES = 2**35  # of address space, so that a huge setting fails instead of filling the machine
CODES = {"train": (0, 1, 2, 130), "compare": (0, 1, 2, 130)}  # of the others: 0, 2, 130


class Result(NamedTuple):
    """How a case ended."""

    number: int
    program: str
    command: str
    code: int | None
    complaint: str
    """What the case shows to be wrong with the program; empty if nothing."""
    stderr: str


def make_material(folder: Path) -> None:
    """Fill `folder` with what the cases begin from: odd paths, a run, another's, SAEs."""
    make_places(folder)
    with chdir(folder), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        for program, *arguments in (
            ("train", "builtin", "text.txt", *SMALL, "--out", "run"),
            ("evaluate", "run", *MEASURE),
            ("analyze", "run", *MEASURE),
        ):
            run_main(program, arguments)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    weights = {"W_enc": draw(24, 6), "W_dec": draw(24, 6), "b_dec": draw(6)}
    for name in formats.WRITTEN:
        standardize = name in ("mlsae", "released", "openai")
        sae = SavedSAE(weights, 3, standardize, (1,), "builtin", {"training": {"seed": 1}})
        formats.write(sae, folder / "sae" / name, name)
    make_older_saelens(folder / "sae")
    # One that was saelens' before, whose fields are in config.json.
    formats.write(formats.read(folder / "sae" / "saelens"), folder / "sae" / "converted", "mlsae")
    shutil.copytree(folder / "sae" / "mlsae", folder / "other")  # of another width than "builtin"
    shutil.copytree(folder / "run", folder / "damaged")


def make_older_saelens(folder: Path) -> None:
    """The SAE in `folder`/saelens as versions 3 to 5 of SAELens wrote it."""
    shutil.copytree(folder / "saelens", folder / "saelens5")
    path = folder / "saelens5" / "cfg.json"
    cfg = json.loads(path.read_text())
    k, metadata = cfg.pop("k"), cfg.pop("metadata")
    older = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}, **metadata}
    path.write_text(json.dumps({**cfg, **older, "architecture": "standard"}))


def run_main(program: str, arguments: Sequence[str]) -> int:
    """Run a program's main function: its exit code."""
    argv, sys.argv = sys.argv, [program, *arguments]
    try:
        PROGRAMS[program][0].main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    return 0


class HangError(BaseException):
    """A case takes too long."""


@contextmanager
def limits(max_bytes: int | None) -> Iterator[None]:
    """Raise HangError after SECONDS; let memory end at MAX_BYTES, and a file at `max_bytes`."""

    def stop(*_: object) -> None:
        raise HangError

    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, memory[1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    if max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(number: int, seed: int, material: Path, folder: Path) -> Result:
    """Run the case of this number in `folder`, which it makes."""
    shutil.copytree(material, folder, symlinks=True)
    case = make_case(number, seed, folder)
    before = snapshot(folder)
    out, err, code, complaint = StringIO(), StringIO(), None, ""
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limits(case.max_bytes):
                code = run_main(case.program, case.arguments)
        except HangError:
            complaint = f"still running after {SECONDS} s"
        except BaseException:
            complaint = traceback.format_exc()
    after = snapshot(folder)
    command = f"mlsae.{case.program} {shlex.join(case.arguments)}   # {'; '.join(case.faults)}"
    stderr = err.getvalue()
    complaint = complaint or judge(case.program, code, stderr, before, after)
    return Result(number, case.program, command, code, complaint, out.getvalue() + stderr)


def judge(
    program: str, code: int | None, stderr: str, before: dict[str, Any], after: dict[str, Any]
) -> str:
    """What is wrong with how a program ended; empty if nothing."""
    last = (stderr.rstrip().splitlines() or [""])[-1].strip()
    unfinished = [name for name in after if name.endswith(".partial")]
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    usage = last.startswith(("╰", "For full helptext"))  # tyro's own form
    could_not_write = "cannot write" in last or "cannot be redrawn" in last
    complaints = {
        f"exit code {code}": code not in CODES.get(program, (0, 2, 130)),
        f"the last line is {last!r}": code in (1, 2) and not (last.startswith("error: ") or usage),
        "a traceback": "Traceback" in stderr,
        f"unfinished: {unfinished}": bool(unfinished),
        f"changed: {changed[:5]}": code == 2 and bool(changed) and not could_not_write,
    }
    return "; ".join(text for text, holds in complaints.items() if holds)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells whether a file has been written to, of each in `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        inside = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        found[str(path.relative_to(folder))] = (stat.st_ino, 0, 0) if path.is_dir() else inside
    return found


def run_cases(numbers: Sequence[int], seed: int, keep: bool = False) -> Iterator[Result]:
    """Run cases one after another; with `keep`, leave their folders."""
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        (base / "material").mkdir()
        make_material(base / "material")
        for number in numbers:
            folder = base / str(number)
            yield run_case(number, seed, base / "material", folder)
            if not keep:
                for name in ("unreadable", "readonly"):
                    (folder / name).chmod(0o700)
                shutil.rmtree(folder)
    finally:
        if not keep:
            shutil.rmtree(base, ignore_errors=True)
        else:
            print(f"kept: {base}")


def main() -> None:
    """Run the cases, print those that fail and counts of all; exit with 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run the case of this number, and keep its folder")
    arguments = parser.parse_args()
    numbers = range(arguments.cases) if arguments.only is None else [arguments.only]
    counts: Counter[tuple[str, str]] = Counter()
    for result in run_cases(numbers, arguments.seed, keep=arguments.only is not None):
        outcome = f"exit {result.code}" if not result.complaint else "FAILED"
        counts[result.program, outcome] += 1
        if result.complaint or arguments.only is not None:
            shown = result.stderr if arguments.only is not None else ""
            print(f"case {result.number}: {result.command}\n{shown}{result.complaint}", flush=True)
    for (program, outcome), n in sorted(counts.items()):
        print(f"{program:9} {outcome:7} {n:4}")
    sys.exit(any(outcome == "FAILED" for _, outcome in counts))


if __name__ == "__main__":
    main()
