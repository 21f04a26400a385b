"""Kill a training run with SIGKILL at random moments, resume it each time, and compare its end
with that of a run that was never stopped.

    python -m scripts.kill_and_resume --kills 50

Every second kill waits for a checkpoint to be in writing. A run that ends before its kill is
compared and another one begun. It prints what was killed where, and exits 1 where anything differs.
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
    "--log_tokens 1000 --checkpoint_tokens 512"
).split()


def start(out: Path) -> subprocess.Popen[str]:
    """The training program, resuming whatever is in `out`: several passes over a short text."""
    text = out.with_name("text.jsonl")
    if not text.exists():
        source = Path(json.__file__).parent.joinpath("decoder.py").read_text()
        records = [{"text": source[i : i + 500]} for i in range(0, len(source), 500)]
        text.write_text("\n".join(map(json.dumps, records)))
    command = [sys.executable, "-m", "mlsae.train", "builtin", str(text), *SETTINGS]
    return subprocess.Popen(
        [*command, "--out", str(out), "--resume"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(out: Path) -> None:
    """Run to the end."""
    process = start(out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def kill_once(out: Path, delay: float, while_writing: bool) -> str:
    """Start, kill `delay` seconds after training has begun (or, then, in the next write of a
    checkpoint), and say what was hit."""
    before = newest(out)
    process = start(out)
    while process.poll() is None and newest(out) == before:
        time.sleep(0.005)  # loading: until the first checkpoint of this process
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
        return "ended before it was killed"
    return "killed in a checkpoint's write" if writing else "killed elsewhere"


def newest(out: Path) -> str:
    """The newest whole checkpoint's name."""
    return max((path.name for path in (out / "checkpoints").glob("*.sha256")), default="")


def is_writing(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((out / "checkpoints").glob("*.partial"))


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs; times do, and do not count."""
    names = [
        "model.safetensors",
        "latents.safetensors",
        newest(one).replace("sha256", "safetensors"),
    ]
    found = []
    for name in names[:2]:
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    if tensors(one / "checkpoints" / names[2]) != tensors(other / "checkpoints" / names[2]):
        found.append("optimizer, counters or position in the text")
    if metrics(one) != metrics(other):
        found.append("metrics.jsonl")
    return found


def tensors(path: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint, as bytes: the rest of it has times in it."""
    import safetensors.torch

    loaded = safetensors.torch.load_file(path)
    return {name: safetensors.torch.save({"": tensor}) for name, tensor in loaded.items()}


def metrics(run: Path) -> list[dict[str, object]]:
    """The lines of metrics without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def campaign(kills: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """What was hit in `kills` kills, and what differed at the ends."""
    generator = random.Random(seed)
    hits: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        finish(straight)
        done = 0
        while done < kills:
            hit = kill_once(killed, generator.uniform(0, 0.4), while_writing=done % 2 == 0)
            hits[hit] += 1
            done += hit.startswith("killed")
            if not hit.startswith("killed") or done == kills:
                finish(killed)
                hits["run compared"] += 1
                wrong += differences(straight, killed)
                shutil.rmtree(killed)
    return hits, wrong


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    hits, wrong = campaign(arguments.kills, arguments.seed)
    for hit, number in hits.items():
        print(f"{number:4} {hit}")
    print("different: " + (", ".join(wrong) or "nothing"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
