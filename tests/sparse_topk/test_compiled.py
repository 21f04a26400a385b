"""The gate: what the compiler makes of every kernel for several chips, without a GPU.

The compiler needs a process whose kernels are not interpreted, hence the subprocesses.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

from bench import compiled

ROOT = Path(__file__).parents[2]


def run(*arguments):
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_kernel_compiles_as_it_must():
    """No spills, tensor cores and 16-byte loads where they are due, no more shared memory than a
    chip has."""
    made = run("-m", "bench.compiled")
    assert made.returncode == 0, made.stdout + made.stderr
    for chip in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert f" {chip} " in made.stdout


def test_no_kernel_is_left_out():
    """A kernel is a `triton.jit` function that a launcher starts: its name ends in _kernel."""
    kernels = {
        node.name
        for path in (ROOT / "kernels/sparse_topk/triton_ops").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert len(kernels) >= 6
    assert {build.kernel.fn.__name__ for build in compiled.builds()} == kernels


def test_the_gate_shuts():
    """It refuses spills (rows of 16384), loads of less than 16 bytes (rows that may have any
    length), missing tensor cores, and too much shared memory."""
    code = """
from dataclasses import replace
from bench.compiled import adam_build
from bench.compiled_build import compile_for, violations

wide = adam_build(16384, clip=False)
print(violations(wide, 90, compile_for(wide, 90)))
odd = replace(adam_build(2048, clip=False), divisible=())
made = compile_for(odd, 80)
print(violations(odd, 80, made))
good = adam_build(2048, clip=False)
made = compile_for(good, 100)
print(violations(good, 100, made))
print(violations(replace(good, needs={"tensor_core": 1}), 100, made))
print(violations(good, 80, replace(made, shared=163 * 1024 + 1)))
print(violations(good, 90, replace(made, shared=227 * 1024)))
"""
    made = run("-c", code)
    assert made.returncode == 0, made.stderr
    spill, narrow, nothing, no_tensor_core, shared, fits = made.stdout.splitlines()
    assert "adam unit_norm D=16384 on sm_90 spills" in spill
    assert "has 0 wide_loads, needs at least 8" in narrow
    assert "narrow_loads, may have at most 0" in narrow
    assert nothing == fits == "[]"
    assert "has 0 tensor_core, needs at least 1" in no_tensor_core
    assert "166913 bytes of shared memory, more than 166912" in shared


def test_the_gate_knows_each_chips_tensor_cores_and_memory():
    """Float32 without TF32 has none on sm_80; a tile of 16 tokens has the slow ones of sm_80 on
    sm_90 and sm_100; seven stages do not fit sm_80, nor five sm_120. A product of sizes in 32
    bits must be allowed by name."""
    code = """
from dataclasses import replace
import torch
from bench.compiled_build import compile_for, violations
from bench.compiled_encode import product_build

def show(build):
    (chip,) = build.chips
    print(violations(build, chip, compile_for(build, chip)))

def product(chip, **changes):
    good = product_build(chip, 2**17, 32, torch.bfloat16, "tf32")
    signature = good.signature | changes.pop("signature", {})
    return replace(good, signature=signature, constexprs=good.constexprs | changes)

small = {"BLOCK_N": 16, "BLOCK_M": 64, "BLOCK_D": 32}
show(product(80, **small, PRECISION="ieee", signature={"x_ptr": "*fp32", "W_ptr": "*fp32"}))
described = {"x_desc": "tensordesc<bf16[16, 32]>", "W_desc": "tensordesc<bf16[64, 32]>"}
for chip in (90, 100):
    show(replace(product(chip, **small, signature=described), num_warps=4))
show(replace(product(80), num_stages=7))
show(replace(product(120), num_stages=5))
show(replace(product(90), allows={}))
"""
    made = run("-c", code)
    assert made.returncode == 0, made.stderr
    *no_tensor_cores, seven, five, products = made.stdout.splitlines()
    assert len(no_tensor_cores) == 3
    for chip, line in zip((80, 90, 100), no_tensor_cores, strict=True):
        assert f"on sm_{chip} has 0 tensor_core, needs at least 1" in line
    assert "on sm_80 takes 196608 bytes of shared memory, more than 166912" in seven
    assert "on sm_120 takes 131072 bytes of shared memory, more than 101376" in five
    assert "has 3 int32_products, may have at most 0" in products


def test_interpreted_kernels_are_refused():
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from bench import compiled\n"
        "compiled.check()"
    )
    refused = run("-c", code)
    assert refused.returncode
    assert "is not a compiled kernel: unset TRITON_INTERPRET before the import" in refused.stderr
