"""Compile one kernel for one chip, without a GPU, and read the result: registers, spills, shared
memory and instructions, but no time.

A `Build` is a kernel with the types, constants and warps that its launcher would give it. Triton's
wheel has the assembler and the disassembler, so no driver is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CHIPS = (80, 90, 100)
SHARED_LIMIT = {
    chip: kib * 1024 for chip, kib in {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}.items()
}
"""Bytes of shared memory that one program may use (CUDA Programming Guide, compute
capabilities)."""

_TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@dataclass(frozen=True)
class Build:
    """One kernel as one of its launches would compile it."""

    name: str
    """Its name in the table and in the faults."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Type of each run-time argument, by its name: "*bf16", "i32", "fp32",
    "tensordesc<bf16[128, 64]>"."""
    constexprs: Mapping[str, Any]
    """The other arguments, by name. An argument that is None or 1 at the launch belongs here."""
    num_warps: int
    num_stages: int = 3
    chips: tuple[int, ...] = CHIPS
    """Compute capabilities to build for, as 80 for sm_80."""
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 at the launch, as the compiler is told. Pointers
    always are."""
    needs: Mapping[str, int] = field(default_factory=dict)
    """Minimum values of `Compiled`'s fields: {"tensor_core": 1, "wide_loads": 8}."""
    allows: Mapping[str, int] = field(default_factory=dict)
    """Maximum values of `Compiled`'s fields: {"narrow_loads": 2}. Spills are never allowed, and
    `int32_products` only if they are named here."""


@dataclass(frozen=True)
class Compiled:
    """One `Build`, compiled for one chip."""

    registers: int
    """Per thread."""
    spills: int
    """Bytes of stack and local memory per thread, or, if the compiler reports none, the number of
    instructions that access such memory."""
    shared: int
    """Bytes per program."""
    instructions: int
    """In the code of one warp, not counting repetitions."""
    tensor_core: int
    """Matrix instructions of the chip's fastest kind: HMMA, wgmma, tcgen05."""
    wide_loads: int
    """Global loads of at least 16 bytes per thread: LDG, LDGSTS, or the bulk copies of TMA."""
    wide_stores: int
    """Global stores of at least 16 bytes per thread, or TMA's."""
    narrow_loads: int
    """Global loads of fewer bytes."""
    int32_products: int
    """32-bit products of two run-time values, which are wrong past 2³¹ in an address."""


def compile_for(build: Build, chip: int) -> Compiled:
    """Compile `build` for compute capability `chip`.

    Raises RuntimeError if Triton's interpreter is on, because it leaves nothing to compile. The
    compiler's own errors get a note with the build's name.
    """
    if not isinstance(build.kernel, triton.JITFunction):
        raise RuntimeError(
            f"{build.name} is not a compiled kernel: unset TRITON_INTERPRET before the import"
        )
    names = build.kernel.arg_names
    types = {name: build.signature.get(name, "constexpr") for name in names}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        build.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in build.constexprs.items()},
        attrs={
            (i,): aligned
            for i, name in enumerate(names)
            if types[name].startswith("*") or name in build.divisible
        },
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    except Exception as error:
        error.add_note(f"while compiling {build.name} for sm_{chip}")
        raise
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    return _read(usage, sass, kernel.asm["ttir"], kernel.metadata.shared, chip)


def violations(build: Build, chip: int, compiled: Compiled) -> list[str]:
    """The faults of `compiled`, one sentence each."""
    faults = []
    if compiled.spills:
        faults.append(f"spills {compiled.spills} bytes per thread")
    if compiled.shared > SHARED_LIMIT[chip]:
        faults.append(
            f"takes {compiled.shared} bytes of shared memory, more than {SHARED_LIMIT[chip]}"
        )
    for name, least in build.needs.items():
        if getattr(compiled, name) < least:
            faults.append(f"has {getattr(compiled, name)} {name}, needs at least {least}")
    for name, most in ({"int32_products": 0} | dict(build.allows)).items():
        if getattr(compiled, name) > most:
            faults.append(f"has {getattr(compiled, name)} {name}, may have at most {most}")
    return [f"{build.name} on sm_{chip} {fault}" for fault in faults]


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def _read(usage: str, sass: str, ttir: str, shared: int, chip: int) -> Compiled:
    """Parse cuobjdump's resource usage and SASS, and Triton's IR."""
    registers = [int(n) for n in re.findall(r"\bREG:(\d+)", usage)]
    spilled = [int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)]
    # "/*0010*/  @!P0 LDG.E.128.CONSTANT R4, …": the opcode with its dotted parts
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    products = re.findall(r"= arith\.muli (%\S+), (%\S+)[^:\n]* : (?:tensor<[\dx]+x)?i32", ttir)
    if not registers or not spilled or not opcodes or not constants:
        raise RuntimeError(f"cannot read cuobjdump's answer:\n{usage}\n{sass[:500]}")

    def count(*bases: str, wide: bool = False) -> int:
        parts = (opcode.split(".") for opcode in opcodes)
        return sum(
            p[0] in bases and (not wide or "128" in p or "256" in p or p[0].startswith("UTMA"))
            for p in parts
        )

    loads, stores = ("LDG", "LDGSTS", "UTMALDG"), ("STG", "UTMASTG")
    return Compiled(
        registers=max(registers),
        spills=sum(spilled) or count("LDL", "STL"),
        shared=shared,
        instructions=len(opcodes),
        tensor_core=count(_TENSOR_CORE[chip]),
        wide_loads=count(*loads, wide=True),
        wide_stores=count(*stores, wide=True),
        narrow_loads=count(*loads) - count(*loads, wide=True),
        int32_products=sum(constants.isdisjoint(factors) for factors in products),
    )
