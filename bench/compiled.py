"""What the compiler makes of every Triton kernel, for three chips, on a machine without a GPU.

    python -m bench.compiled        prints the table; ends with 1 where a kernel is not as it must be

It shows no time: a kernel that compiles well may still be slow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from .compiled_build import Build, Compiled, compile_for, violations

BUILDS: list[Build] = []


def builds() -> list[Build]:
    """Every kernel of the package, at the shapes and dtypes that matter."""
    if not (Path(__file__).parent / "compiled_encode.py").exists():
        return BUILDS
    from .compiled_encode import BUILDS as ENCODE

    return ENCODE + BUILDS


def compile_all() -> Iterator[tuple[Build, int, Compiled]]:
    """Compile every build for every chip of its own."""
    for build in builds():
        for chip in build.chips:
            yield build, chip, compile_for(build, chip)


def check() -> list[str]:
    """What is wrong with the kernels, one sentence a fault; empty where nothing is."""
    return [fault for made in compile_all() for fault in violations(*made)]


def main() -> int:
    columns = (
        "kernel",
        "chip",
        "regs",
        "spills",
        "shared",
        "instr",
        "tensor",
        "16B ld",
        "ld",
        "16B st",
    )
    line = "{:<44} {:>6} {:>5} {:>6} {:>7} {:>6} {:>6} {:>6} {:>5} {:>6}"
    print(line.format(*columns))
    faults = []
    for build, chip, made in compile_all():
        print(
            line.format(
                build.name,
                f"sm_{chip}",
                made.registers,
                made.spills,
                made.shared,
                made.instructions,
                made.tensor_core,
                made.wide_loads,
                made.loads,
                made.wide_stores,
            )  # fmt: skip
        )
        faults += violations(build, chip, made)
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
