"""Time the same training step in this package and in other libraries, on one machine.

    python -m bench.peers --save-results

Each library gets its own environment, made on the first run. It uses the torch of this environment,
and any other package here that the library accepts, so all are timed with the same torch and torch
is not downloaded again. `bench.peer_steps` times every library, one after another.
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

from .peer_steps import LIBRARIES
from .report import peers_table
from .results import BenchRun, Timing, describe_machine, save
from .shapes import SHAPES, ProblemShape, scaled

_ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparse_topk" / "peers"

Job = tuple[ProblemShape, str, str | None]
"""Shape, dtype, and, for a scaling row, the size that is varied."""


def jobs(kind: str) -> list[Job]:
    """The jobs for a kind of device: the named shapes (on a CPU only the first) in both dtypes, and
    the scaling with M."""
    shapes = SHAPES[kind] if kind == "cuda" else SHAPES[kind][:1]
    dtype = "bfloat16" if kind == "cuda" else "float32"
    named: list[Job] = [(s, t, None) for s in shapes for t in ("float32", "bfloat16")]
    return named + [(shape, dtype, axis) for axis, shape in scaled(kind) if axis == "m"]


def environment(package: str, folder: Path) -> Path:
    """The Python of the environment of `package` in `folder`, which is made if it is not there."""
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
    # The index's torchvision may be built for another torch than this one, and then it fails to
    # import. transformers works without torchvision, but not with a broken one.
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision"], check=True)
    if Path(purelib, "torch").exists():
        raise RuntimeError(f"{package} installed its own torch into {purelib}")
    (folder / package / "ready").touch()
    return python


def time_library(name: str, python: Path, work: list[Job]) -> dict[str, Any]:
    """The timings of one library as "rows", and its "version"."""
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")])
    process = subprocess.run(
        [python, "-m", "bench.peer_steps", name],
        input=json.dumps(work),
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(process.stdout)
    return answer


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--envs", type=Path, default=CACHE, help="folder of the environments")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=LIBRARIES,
        default=list(LIBRARIES),
        help="libraries to time (default: all)",
    )
    parser.add_argument(
        "--save-results",
        action="store_true",
        help="save to bench/results/<device>.json",
    )
    arguments = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    packages = {name: LIBRARIES[name].package for name in arguments.only}
    pythons = {
        name: environment(package, arguments.envs) if package else Path(sys.executable)
        for name, package in packages.items()
    }
    rows, notes = [], {}
    for name in tqdm(pythons, desc="timing"):
        answer = time_library(name, pythons[name], jobs(kind))
        rows += [Timing(**row) for row in answer["rows"]]
        version = answer["version"] or "this commit"
        notes[name] = f"{version}; {LIBRARIES[name].differs}".rstrip("; ")
    run = BenchRun(describe_machine(), {}, rows, notes)
    print(peers_table(run))
    if arguments.save_results:
        print(f"results: {save('peers', run)}")


if __name__ == "__main__":
    main()
