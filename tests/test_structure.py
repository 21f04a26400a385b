"""The house: a file imports only from floors below it, and importing costs what it must."""

import ast
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {"train", "plan", "evaluate", "analyze", "steer", "compare", "convert", "export"}
FLOORS = [
    "builtin", "formats", "data", "report", "training", "evaluation", "analysis", "intervention",
    "planning", "exports", "app",
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
    """But for the module, which loads and saves itself as any module on the hub does."""
    for path in (ROOT / "kernels").rglob("*.py"):
        allowed = {"torch", "triton"} | sys.stdlib_module_names
        if path.name == "module.py":
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


def test_the_wheel_holds_our_two_packages_only(tmp_path):
    """A wheel with a top-level `kernels` would overwrite the package of Hugging Face."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("kernels", "mlsae"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"sparse_topk", "mlsae"}
    for needed in (
        "mlsae/builtin/model/model.safetensors",
        "mlsae/py.typed",
        "mlsae/report/page.html",
        "mlsae/report/page.css",
        "mlsae/report/browser.js",
        "mlsae/report/paper.json",
        "mlsae/app/app.html",
        "mlsae/app/read.js",
        "sparse_topk/triton_ops/topk/encode.py",
    ):
        assert needed in names
