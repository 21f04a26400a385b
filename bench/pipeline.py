"""How fast text becomes rows of tokens, from the text and from the cache on disk:

    python -m bench.pipeline [MODEL] [DATASET] [--tokens N] [--seq_len T] [--column NAME]

The first line is the tokenizer's bare encode, of texts in memory: what no pipeline around it can
exceed. Each line is one pass over the first N tokens. "per CPU s" are tokens per second of all
threads' CPU time, which other work on the machine changes less; memory is the peak of the process
beyond what it had before, each way in a process of its own.

A second table has the CPU time per token: "serial" is that of the thread which reads, splits,
hashes, packs and writes, and waits while the Rust library's threads encode, whose time is the
other. With P cores, a token takes serial + encode / P (Amdahl's law), by which the last column is
computed, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import torch

from mlsae import builtin
from mlsae.data.config import DataConfig
from mlsae.data.documents import Documents
from mlsae.data.encoding import encoder
from mlsae.data.tokens import Rows
from mlsae.data.transformer import load_tokenizer
from mlsae.memory import peak

WAYS = {
    "encode": "bare encode",
    "text": "from text",
    "write": "from text, cache written",
    "cache": "from the cache",
}
MODELLED_CORES = 16


def measure(way: str, config: DataConfig, seq_len: int, tokens: int) -> dict[str, float]:
    """One pass, in this process: tokens, seconds, CPU seconds, characters, peak bytes."""
    tokenizer = load_tokenizer(config)
    encoder(tokenizer)(["warm up"])
    before, started, cpu = _peak(), time.perf_counter(), _cpu()
    n_chars = 0
    if way == "encode":
        pieces = (piece.text for piece in Documents(config, "train"))
        batches = list(_batches((text for text in pieces if isinstance(text, str)), 4 * tokens))
        encode = encoder(tokenizer)
        started, cpu = time.perf_counter(), _cpu()
        n_tokens = sum(sum(map(len, encode(batch))) for batch in batches)
        n_chars = sum(map(len, (text for batch in batches for text in batch)))
    else:
        with closing(Rows(config, tokenizer, seq_len, "train")) as rows:
            started, cpu = time.perf_counter(), _cpu()
            n_tokens = sum(map(len, islice(rows, tokens // seq_len)))
    seconds, (of_all, own) = time.perf_counter() - started, _cpu()
    return {
        "tokens": n_tokens,
        "seconds": seconds,
        "cpu": of_all - cpu[0],
        "serial": own - cpu[1],
        "chars": n_chars,
        "memory": _peak() - before,
    }


def _cpu() -> tuple[float, float]:
    """CPU seconds of all threads, and of this one."""
    return time.process_time(), time.thread_time()


def _peak() -> int:
    return peak(torch.device("cpu"))


def _batches(texts: Iterator[str], n_chars: int) -> Iterator[list[str]]:
    """Texts of up to `n_chars` characters, some 2²⁰ at a time, as the pipeline has them."""
    batch, size, total = [], 0, 0
    for text in texts:
        batch.append(text)
        size += len(text)
        total += len(text)
        if size >= 2**20 or total >= n_chars:
            yield batch
            batch, size = [], 0
        if total >= n_chars:
            return
    if batch:
        yield batch


def main() -> None:
    """Measure each way in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__)
    parser.add_argument("model", nargs="?", default=builtin.NAME)
    parser.add_argument("dataset", nargs="?", default=builtin.NAME)
    parser.add_argument("--tokens", type=int, default=2_500_000)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--column", default="text")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        off = args.way in ("encode", "text")
        config = DataConfig(
            args.model, args.dataset, column=args.column, token_cache=args.cache, no_token_cache=off
        )
        print(json.dumps(measure(args.way, config, args.seq_len, args.tokens)))
        return
    with tempfile.TemporaryDirectory() as cache:
        found = {way: _in_process(way, cache) for way in WAYS}
    cores, load = os.cpu_count(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    print(f"{args.model}, {args.dataset}, rows of {args.seq_len}; {cores} cores, load {load:.1f}\n")
    print(
        "| | tokens/s | of bare encode | tokens per CPU s | of bare encode | MB/s of ids | memory |"
    )
    print("|---|---|---|---|---|---|---|")
    bare = found["encode"]
    for way, now in found.items():
        rate, of_cpu = now["tokens"] / now["seconds"], now["tokens"] / now["cpu"]
        ratios = rate * bare["seconds"] / bare["tokens"], of_cpu * bare["cpu"] / bare["tokens"]
        print(
            f"| {WAYS[way]} | {rate:,.0f} | {ratios[0]:.2f} | {of_cpu:,.0f} | {ratios[1]:.2f} | "
            f"{4 * rate / 1e6:.1f} | {now['memory'] / 1e6:.0f} MB |"
        )

    print(
        f"\n| | serial, µs a token | encode, µs a token | tokens/s on {MODELLED_CORES} cores, "
        "modelled |\n|---|---|---|---|"
    )
    for way in ("encode", "text", "write"):
        now = found[way]
        serial, encode = now["serial"] / now["tokens"], (now["cpu"] - now["serial"]) / now["tokens"]
        modelled = 1 / (serial + encode / MODELLED_CORES)
        print(f"| {WAYS[way]} | {1e6 * serial:.3f} | {1e6 * encode:.3f} | {modelled:,.0f} |")


def _in_process(way: str, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.pipeline", *sys.argv[1:], "--way", way]
    output = subprocess.check_output([*command, "--cache", cache], text=True)
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
