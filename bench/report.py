"""Draw what the benchmarks found: tables in Markdown, and a plot of time and memory against M.

python -m bench.report bench/results/<device>.json
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

from .results import FOLDER, Row, Run, load

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLORS = {
    "ours": "#0072b2",
    "dense": "#d55e00",
    "eai-sparsify": "#009e73",
    "sae-lens": "#cc79a7",
    "dictionary-learning": "#e69f00",
    "floor": "#555555",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def suite_table(run: Run) -> str:
    """Each piece of work: ours, the dense reference, the floor."""
    ours = [r for r in run.rows if r.side == "ours" and r.axis is None]
    dense = {_what(r): r for r in run.rows if r.side == "dense" and r.axis is None}
    lines = []
    for row in ours:
        other = dense.get(_what(row))
        lines.append(
            [
                row.work,
                row.shape,
                row.dtype,
                _ms(row.seconds),
                _ms(other.seconds) if other else "does not fit",
                f"{other.seconds / row.seconds:.1f}" if other else "",
                _ms(row.floor),
                f"{row.seconds / row.floor:.2f}",
                f"{row.flop / 1e9:.3g}",
                f"{row.bytes / 1e6:.3g}",
                f"{row.flop / row.seconds / 1e12:.3g}",
                f"{row.bytes / row.seconds / 1e9:.3g}",
                _mb(row.peak_bytes),
                _mb(other.peak_bytes) if other else "",
            ]
        )
    header = ["work", "shape", "dtype", "ours, ms", "dense, ms", "× faster", "floor, ms", "× floor"]
    header += ["GFLOP", "MB", "TFLOP/s", "GB/s", "ours' peak, MB", "dense's peak, MB"]
    return table(header, lines)


def peers_table(run: Run) -> str:
    """The training step by each library at the named shapes."""
    lines = [
        [
            row.side,
            row.shape,
            row.dtype,
            _ms(row.seconds),
            f"{row.seconds / row.matmul:.2f}" if row.matmul else "",
            f"{row.seconds / row.floor:.2f}",
            _mb(row.peak_bytes),
            run.notes.get(row.side, ""),
        ]
        for row in sorted(
            (r for r in run.rows if r.axis is None), key=lambda r: (r.shape, r.dtype, r.seconds)
        )
    ]
    header = ["step by", "shape", "dtype", "ms", "× bare float32 matmul", "× floor", "peak, MB"]
    return table([*header, "version; what differs"], lines)


def exponents_table(run: Run) -> str:
    """How time and memory of the step grow with each size: p of c · size^p, by least squares of
    the logarithms."""
    lines = []
    for axis in ("n", "d", "m", "k"):
        for side in ("ours", "dense"):
            rows = sorted(
                (r for r in run.rows if r.axis == axis and r.side == side),
                key=lambda r: int(getattr(r, axis)),
            )
            if len(rows) < 2:
                continue
            sizes = [getattr(r, axis) for r in rows]
            time = exponent(sizes, [r.seconds for r in rows])
            floor = exponent(sizes, [r.floor for r in rows])
            memory = exponent(sizes, [r.peak_bytes for r in rows])
            span = f"{sizes[0]:,} to {sizes[-1]:,}"
            lines.append([axis.upper(), span, side, f"{time:.2f}", f"{floor:.2f}", f"{memory:.2f}"])
    return table(["size", "from, to", "side", "time", "time of the floor", "peak memory"], lines)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost against log size, by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


def plot(runs: dict[str, Run], path: Path) -> None:
    """Time and peak memory of the step against M, ours, the reference, peers and the floor, as an
    SVG."""
    lines: dict[str, list[Row]] = {}
    for run in runs.values():  # peers last: ours and dense are then from the same run as they
        found: dict[str, list[Row]] = {}
        for row in sorted((r for r in run.rows if r.axis == "m"), key=lambda r: r.m):
            found.setdefault(row.side, []).append(row)
        lines |= found
    if not lines:
        raise ValueError("no row of these results varies M: run the whole suite, or the peers")
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for side, rows in lines.items():
        style = {"color": _COLORS[side], "marker": "o", "markersize": 4, "label": side}
        sizes = [r.m for r in rows]
        time.plot(sizes, [1e3 * r.seconds for r in rows], **style)
        memory.plot(sizes, [r.peak_bytes / 1e6 for r in rows], **style)
    first = next(iter(lines.values()))
    floors = [1e3 * r.floor for r in first]
    time.plot([r.m for r in first], floors, "--", color=_COLORS["floor"], label="floor")
    _label(time, "one training step, ms", first)
    _label(memory, "peak memory beyond weights and state, MB", first)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    row = first[0]
    figure.suptitle(f"N = {row.n:,}, D = {row.d:,}, K = {row.k}, {row.dtype}", fontsize=10)
    with plt.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "path"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _label(axes: Axes, what: str, rows: Sequence[Row]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([r.m for r in rows], [f"{r.m:,}" for r in rows])
    axes.set_xlabel("latents M")
    axes.set_title(what, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _what(row: Row) -> tuple[str, str, str]:
    return row.work, row.shape, row.dtype


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def machine_line(run: Run) -> str:
    """The machine of a run and the versions on it, in one line."""
    m = run.machine
    driver = f", driver {m['driver']}" if m["driver"] else f", {m['threads']} threads"
    versions = f"torch {m['torch']}, triton {m['triton'] or 'none'}, Python {m['python']}"
    return f"{m['device']}{driver}, {versions}, commit {m['commit']}, {m['date']}."


def markdown(runs: dict[str, Run], image: str) -> str:
    """The whole report."""
    parts = [f"![Time and memory of a training step against M]({image})"]
    if peers := runs.get("peers"):
        parts += ["## The training step, library by library", machine_line(peers)]
        parts.append(peers_table(peers))
    if suite := runs.get("suite"):
        parts += ["## Each verb and the step, against dense autograd", machine_line(suite)]
        parts += [suite_table(suite), "## How the step grows", exponents_table(suite)]
        limits = [[name, f"{value:.3g}"] for name, value in sorted(suite.limits.items())]
        parts += ["## What the machine can do", table(["limit", "measured"], limits)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, nargs="?", help="default: the only one there is")
    file = parser.parse_args().file
    if file is None:
        files = sorted(FOLDER.glob("*.json"))
        if len(files) != 1:
            names = ", ".join(str(f) for f in files) or "none"
            parser.error(f"file must be given where bench/results has not exactly one: {names}")
        (file,) = files
    if not file.is_file():
        parser.error(f"file must be one that --save-results wrote, and there is no {file}")
    runs = load(file)
    plot(runs, file.with_suffix(".svg"))
    text = markdown(runs, file.with_suffix(".svg").name)
    file.with_suffix(".md").write_text(text)
    print(text)
    print(f"written: {file.with_suffix('.md')} and {file.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
