"""Kill a training run with SIGKILL at random moments, resume it each time, and compare the finished
run with one that was never stopped.

    python -m scripts.kill_and_resume --kills 50

Every second kill waits until a checkpoint is being written. A run that finishes before its kill is
compared, and another one started. The script prints how many kills hit a write, and exits with 1 if
any run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SETTINGS = (
    "--tokens 10000 --batch_tokens 512 --micro_tokens 256 --seq_len 64 --sae.expansion 2 --sae.k 8 "
    "--sae.dead_tokens 2000 --max_grad_norm 1 --eval_tokens 512 --eval_every 3000 "
    "--log_tokens 1000 --checkpoint_tokens 512 --heldout_share 0.2"
).split()


def start(out: Path) -> subprocess.Popen[str]:
    """Start the training program, which resumes the run in `out`, if any. It reads a short text
    several times over."""
    dataset = out.with_name("text.jsonl")
    if not dataset.exists():
        text = Path(json.__file__).parent.joinpath("decoder.py").read_text()
        records = [{"text": text[i : i + 500]} for i in range(0, len(text), 500)]
        dataset.write_text("\n".join(map(json.dumps, records)))
    command = [sys.executable, "-m", "mlsae.train", "builtin", str(dataset), *SETTINGS]
    return subprocess.Popen(
        [*command, "--out", str(out), "--resume"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(out: Path) -> None:
    """Run the training program to its end."""
    process = start(out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def kill_once(out: Path, delay: float, while_writing: bool) -> str:
    """Start the program and kill it `delay` seconds after its first checkpoint; with
    `while_writing`, wait for the next checkpoint to be written. Return what the kill hit."""
    before = newest(out)
    process = start(out)
    while process.poll() is None and newest(out) == before:
        time.sleep(0.005)  # it loads the model and resumes
    deadline = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    while while_writing and process.poll() is None and not is_writing(out):
        pass
    writing = is_writing(out)
    process.kill()
    process.communicate()
    if process.returncode != -9:
        assert process.returncode == 0
        return "finished before the kill"
    return "killed while writing a checkpoint" if writing else "killed elsewhere"


def newest(out: Path) -> str:
    """The name of the newest checkpoint's checksum file, which is written last; "" if none."""
    return max((path.name for path in (out / "checkpoints").glob("*.sha256")), default="")


def is_writing(out: Path) -> bool:
    """Whether a checkpoint is being written, or a kill left it unfinished."""
    return any((out / "checkpoints").glob("*.partial"))


def differences(run: Path, other_run: Path) -> list[str]:
    """What differs between two finished runs, other than times."""
    differing = []
    for name in ("model.safetensors", "latents.safetensors"):
        if (run / name).read_bytes() != (other_run / name).read_bytes():
            differing.append(name)
    checkpoint = Path("checkpoints", newest(run).replace("sha256", "safetensors"))
    if tensors(run / checkpoint) != tensors(other_run / checkpoint):
        differing.append("optimizer, counters or position in the text")
    if metrics(run) != metrics(other_run):
        differing.append("metrics.jsonl")
    return differing


def tensors(path: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint, as bytes; its other values include times."""
    import safetensors.torch

    by_name = safetensors.torch.load_file(path)
    return {name: safetensors.torch.save({"": tensor}) for name, tensor in by_name.items()}


def metrics(run: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def campaign(kills: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Kill `kills` times: how often each outcome of `kill_once` occurred, and what differed in the
    finished runs."""
    generator = random.Random(seed)
    outcomes: Counter[str] = Counter()
    differing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        finish(straight)
        n_killed = 0
        while n_killed < kills:
            outcome = kill_once(killed, generator.uniform(0, 0.4), while_writing=n_killed % 2 == 0)
            outcomes[outcome] += 1
            n_killed += outcome.startswith("killed")
            if not outcome.startswith("killed") or n_killed == kills:
                finish(killed)
                outcomes["runs compared"] += 1
                differing += differences(straight, killed)
                shutil.rmtree(killed)
    return outcomes, differing


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m scripts.kill_and_resume", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=50, help="(default: 50)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments to kill at (default: 0)"
    )
    arguments = parser.parse_args()
    outcomes, differing = campaign(arguments.kills, arguments.seed)
    for outcome, count in outcomes.items():
        print(f"{count:4} {outcome}")
    print("different: " + (", ".join(differing) or "nothing"))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
