"""The same training step by this package and by others, side by side on one machine.

    python -m bench.peers --save-results

Each library gets an environment of its own, made on the first run, that borrows this one's torch
(and whatever else of this one's it accepts): all are timed with the same torch, and none is
downloaded. Every environment is timed by the same lines (`bench.peer_steps`), one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .peer_steps import SIDES
from .report import peers_table
from .results import Row, Run, describe_machine, save
from .shapes import SHAPES, Shape, scaled

_ROOT = Path(__file__).parent.parent
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparse_topk" / "peers"

Job = tuple[Shape, str, str | None]
"""Shape, dtype, and of a scaling row what is varied."""


def jobs(kind: str) -> list[Job]:
    """What is timed on a kind of device: the shapes in both dtypes, on a CPU the first one only;
    and the growth with M."""
    shapes = SHAPES[kind] if kind == "cuda" else SHAPES[kind][:1]
    dtype = "bfloat16" if kind == "cuda" else "float32"
    named: list[Job] = [(s, t, None) for s in shapes for t in ("float32", "bfloat16")]
    return named + [(shape, dtype, axis) for axis, shape in scaled(kind) if axis == "m"]


def environment(package: str, folder: Path) -> Path:
    """The Python of the environment of `package` in `folder`, made where it is not there yet."""
    python = folder / package / "bin" / "python"
    if (folder / package / "ready").exists():
        return python
    print(f"installing {package} into {folder / package}", file=sys.stderr)
    venv.create(folder / package, with_pip=True, clear=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder / package)})
    Path(purelib, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    constraints = folder / package / "constraints.txt"
    constraints.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    pip = [str(python), "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "-c", str(constraints), package], check=True)
    # What the index gives is built for another torch where this one is not from there, and then
    # fails to import; transformers does without it, but not with a broken one.
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision"], check=True)
    if Path(purelib, "torch").exists():
        raise RuntimeError(f"{package} brought a torch of its own into {purelib}")
    (folder / package / "ready").touch()
    return python


def time_side(name: str, python: Path, work: list[Job]) -> dict[str, Any]:
    """The rows of one library, and its version."""
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")])
    done = subprocess.run(
        [python, "-m", "bench.peer_steps", name],
        input=json.dumps(work),
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--envs", type=Path, default=_CACHE, help="where the environments are")
    parser.add_argument(
        "--only", nargs="+", choices=SIDES, default=list(SIDES), help="time these (default: all)"
    )
    parser.add_argument(
        "--save-results", action="store_true", help="keep the rows in bench/results/<device>.json"
    )
    arguments = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    packages = {name: SIDES[name].package for name in arguments.only}
    pythons = {
        name: environment(package, arguments.envs) if package else Path(sys.executable)
        for name, package in packages.items()
    }
    rows, notes = [], {}
    for name in tqdm(pythons, desc="timing"):
        found = time_side(name, pythons[name], jobs(kind))
        rows += [Row(**row) for row in found["rows"]]
        notes[name] = f"{found['version'] or 'this commit'}; {SIDES[name].differs}".rstrip("; ")
    run = Run(describe_machine(), {}, rows, notes)
    print(peers_table(run))
    if arguments.save_results:
        print(f"results: {save('peers', run)}")


if __name__ == "__main__":
    main()
