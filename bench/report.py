"""Draw the results of the benchmarks: tables in Markdown, and a plot of time and memory against M.

python -m bench.report bench/results/<device>.json
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from .results import FOLDER, BenchRun, Timing, load, table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLORS = {
    "ours": "#0072b2",
    "dense": "#d55e00",
    "eai-sparsify": "#009e73",
    "sae-lens": "#cc79a7",
    "dictionary-learning": "#e69f00",
    "roofline": "#555555",
}


def suite_table(run: BenchRun) -> str:
    """A row per case: ours, the dense reference, the roofline."""
    ours = [r for r in run.rows if r.impl == "ours" and r.axis is None]
    dense_rows = {_case(r): r for r in run.rows if r.impl == "dense" and r.axis is None}
    lines = []
    for row in ours:
        dense = dense_rows.get(_case(row))
        lines.append(
            [
                row.work,
                row.shape,
                row.dtype,
                _ms(row.seconds),
                _ms(dense.seconds) if dense else "does not fit",
                f"{dense.seconds / row.seconds:.1f}" if dense else "",
                _ms(row.roofline),
                f"{row.seconds / row.roofline:.2f}",
                f"{row.flop / 1e9:.3g}",
                f"{row.bytes / 1e6:.3g}",
                f"{row.flop / row.seconds / 1e12:.3g}",
                f"{row.bytes / row.seconds / 1e9:.3g}",
                _mb(row.peak_bytes),
                _mb(dense.peak_bytes) if dense else "",
            ]
        )
    header = ["work", "shape", "dtype", "ours, ms", "dense, ms", "× faster", "roofline, ms"]
    header += ["× roofline", "GFLOP", "MB", "TFLOP/s", "GB/s", "ours' peak, MB", "dense's peak, MB"]
    return table(header, lines)


def peers_table(run: BenchRun) -> str:
    """A row per library, named shape and dtype: the training step, the fastest library first."""
    lines = [
        [
            row.impl,
            row.shape,
            row.dtype,
            _ms(row.seconds),
            f"{row.seconds / row.matmul:.2f}" if row.matmul else "",
            f"{row.seconds / row.roofline:.2f}",
            _mb(row.peak_bytes),
            run.notes.get(row.impl, ""),
        ]
        for row in sorted(
            (r for r in run.rows if r.axis is None), key=lambda r: (r.shape, r.dtype, r.seconds)
        )
    ]
    header = ["step by", "shape", "dtype", "ms", "× bare float32 matmul", "× roofline", "peak, MB"]
    return table([*header, "version; what differs"], lines)


def exponents_table(run: BenchRun) -> str:
    """How time and memory of the step grow with each size: p of c · size^p, by least squares of
    the logarithms."""
    lines = []
    for axis in ("n", "d", "m", "k"):
        for impl in ("ours", "dense"):
            rows = sorted(
                (r for r in run.rows if r.axis == axis and r.impl == impl),
                key=lambda r: int(getattr(r, axis)),
            )
            if len(rows) < 2:
                continue
            sizes = [getattr(r, axis) for r in rows]
            powers = [
                exponent(sizes, [r.seconds for r in rows]),
                exponent(sizes, [r.roofline for r in rows]),
                exponent(sizes, [r.peak_bytes for r in rows]),
            ]
            span = f"{sizes[0]:,} to {sizes[-1]:,}"
            lines.append([axis.upper(), span, impl, *(f"{power:.2f}" for power in powers)])
    return table(["size", "from, to", "impl", "time", "roofline", "peak memory"], lines)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost against log size, by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


def plot(runs: dict[str, BenchRun], path: Path) -> None:
    """Write an SVG of the step's time and peak memory against M: ours, dense, the other libraries,
    and the roofline."""
    rows_by_impl: dict[str, list[Timing]] = {}
    for run in runs.values():  # peers come last and replace the suite's ours and dense: one run
        of_run: dict[str, list[Timing]] = {}
        for row in sorted((r for r in run.rows if r.axis == "m"), key=lambda r: r.m):
            of_run.setdefault(row.impl, []).append(row)
        rows_by_impl |= of_run
    if not rows_by_impl:
        raise ValueError("no row of these results varies M: run the whole suite, or the peers")
    fig, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for impl, rows in rows_by_impl.items():
        style = {"color": _COLORS[impl], "marker": "o", "markersize": 4, "label": impl}
        sizes = [r.m for r in rows]
        time_axes.plot(sizes, [1e3 * r.seconds for r in rows], **style)
        memory_axes.plot(sizes, [r.peak_bytes / 1e6 for r in rows], **style)
    first = next(iter(rows_by_impl.values()))
    style = {"color": _COLORS["roofline"], "linestyle": "--", "label": "roofline"}
    time_axes.plot([r.m for r in first], [1e3 * r.roofline for r in first], **style)
    _label(time_axes, "one training step, ms", first)
    _label(memory_axes, "peak memory beyond weights and state, MB", first)
    handles, labels = time_axes.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    row = first[0]
    fig.suptitle(f"N = {row.n:,}, D = {row.d:,}, K = {row.k}, {row.dtype}", fontsize=10)
    with plt.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "path"}):
        fig.savefig(path, format="svg", metadata={"Date": None})
    plt.close(fig)


def _label(axes: Axes, title: str, rows: Sequence[Timing]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([r.m for r in rows], [f"{r.m:,}" for r in rows])
    axes.set_xlabel("latents M")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _case(row: Timing) -> tuple[str, str, str]:
    return row.work, row.shape, row.dtype


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def machine_line(run: BenchRun) -> str:
    """The machine of a run and the versions on it, in one line."""
    m = run.machine
    driver = f", driver {m['driver']}" if m["driver"] else f", {m['threads']} threads"
    versions = f"torch {m['torch']}, triton {m['triton'] or 'none'}, Python {m['python']}"
    return f"{m['device']}{driver}, {versions}, commit {m['commit']}, {m['date']}."


def markdown(runs: dict[str, BenchRun], image: str) -> str:
    """The whole report."""
    parts = [f"![Time and memory of a training step against M]({image})"]
    if peers := runs.get("peers"):
        parts += ["## The training step, library by library", machine_line(peers)]
        parts.append(peers_table(peers))
    if suite := runs.get("suite"):
        parts += ["## Each op and the step, against dense autograd", machine_line(suite)]
        parts += [suite_table(suite), "## How the step grows", exponents_table(suite)]
        rates = [[name, f"{value:.3g}"] for name, value in sorted(suite.rates.items())]
        parts += ["## The machine's rates", table(["rate", "measured"], rates)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "file", type=Path, nargs="?", help="default: the only file in bench/results"
    )
    file = parser.parse_args().file
    if file is None:
        files = sorted(f for f in FOLDER.glob("*.json") if not f.stem.endswith(("-step", "-tune")))
        if len(files) != 1:
            names = ", ".join(str(f) for f in files) or "none"
            parser.error(f"name one of the files in bench/results: {names}")
        (file,) = files
    if not file.is_file():
        parser.error(f"file must be one that --save-results wrote, and {file} does not exist")
    runs = load(file)
    plot(runs, file.with_suffix(".svg"))
    text = markdown(runs, file.with_suffix(".svg").name)
    file.with_suffix(".md").write_text(text)
    print(text)
    print(f"written: {file.with_suffix('.md')} and {file.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
