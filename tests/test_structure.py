"""The house: a file imports only from floors below it, and importing costs what it must."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {"train", "plan", "evaluate", "analyze", "steer", "trace", "compare", "convert",
            "export"}  # fmt: skip
FLOORS = [
    "builtin", "formats", "data", "report", "training", "evaluation", "analysis", "intervention",
    "planning", "lens", "attribution", "exports", "app",
]  # fmt: skip
"""The packages of mlsae from the ground up: each may import those before it."""


def rooms(package):
    """What each file or folder of a package imports of the same package, by name."""
    graph = {}
    for file in (ROOT / package).rglob("*.py"):
        parts = file.relative_to(ROOT / package).with_suffix("").parts
        imported = graph.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):
                names = [node.module] if node.module else [alias.name for alias in node.names]
                imported |= {name.split(".")[0] for name in names}
    return graph


@pytest.mark.parametrize("package", ["kernels/sparse_topk", "mlsae"])
def test_imports_go_round_in_no_circle(package):
    TopologicalSorter(rooms(package)).prepare()  # raises CycleError


def test_packages_import_from_the_floors_below_and_nobody_imports_a_program():
    graph = rooms("mlsae")
    assert {room for room in graph if (ROOT / "mlsae" / room).is_dir()} == set(FLOORS)
    for i, package in enumerate(FLOORS):
        assert not graph[package] & set(FLOORS[i + 1 :]), package
    assert not set().union(*graph.values()) & PROGRAMS


def test_the_kernel_package_knows_torch_and_triton_only():
    """But for the module that loads and saves itself as any module on the hub does."""
    for path in (ROOT / "kernels").rglob("*.py"):
        allowed = {"torch", "triton"} | sys.stdlib_module_names
        if path.name == "hub.py":
            allowed |= {"huggingface_hub", "safetensors"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_the_folder_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_cpu_needs_no_triton():
    """Torch imports it by itself where it is installed, so it is hidden here."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from sparse_topk import SparseTopKSAE, UnitNormAdam\n"
        "sae = SparseTopKSAE(4, 8, 2)\n"
        "sae(torch.randn(3, 4)).sum().backward()\n"
        "UnitNormAdam(sae.parameter_groups()).step()\n"
        "assert 'sparse_topk.triton_ops' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_waits_for_no_library_that_takes_seconds():
    code = (
        "import sys, mlsae, mlsae.plan, mlsae.train\n"
        "for program in (mlsae.train, mlsae.plan):\n"
        "    sys.argv[1:] = ['--help']\n"
        "    try:\n"
        "        program.main()\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
