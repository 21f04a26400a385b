"""The house: a file imports only from floors below it, and importing costs what it must."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "kernels/sparse_topk": [
        {"allocator", "reference", "torch_ops"},
        {"triton_ops"},
        {"backend"},
        {"operators"},
        {"functional", "optim"},
        {"module"},
        {"__init__"},
    ],
    "mlsae": [
        {"errors"},
        {"builtin", "distributed"},
        {
            "analysis_summary",
            "card",
            "config",
            "documents",
            "files",
            "geometry",
            "hub",
            "metrics",
            "sharding",
            "signals",
            "stopwatch",
        },
        {"activations", "checkpoint", "data", "formats", "logs", "statistics"},
        {"model"},
        {
            "dense",
            "figures",
            "measure",
            "memory",
            "substitution",
            "survey",
            "trainer",
            "transformer",
        },
        {"__init__", "accumulate", "examples", "faithfulness", "folders", "report", "source"},
        {"heldout", "prompt", "tables"},
        {"run"},
        {"fit"},
        {"analyze", "convert", "evaluate", "summary"},
        {"train"},
        {"compare"},  # the one program made of others
    ],
}


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package):
    floors = FLOORS[package]
    floor_of = {name: i for i, floor in enumerate(floors) for name in floor}
    files = {path.stem for path in (ROOT / package).glob("*.py")}
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert files | folders == set(floor_of), "a file is on no floor, or a floor names no file"
    for name in files | folders:
        # A folder's own files may import one another, and what lies below the folder.
        path = ROOT / package / name
        inside, level = (path.glob("*.py"), 2) if path.is_dir() else ([path.with_suffix(".py")], 1)
        for node in (node for file in inside for node in ast.walk(ast.parse(file.read_text()))):
            if isinstance(node, ast.ImportFrom) and node.level == level:
                below = [node.module] if node.module else [alias.name for alias in node.names]
                for other in below:
                    assert floor_of[other] < floor_of[name], f"{name} imports {other}"


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
        "sparse_topk/triton_ops/sparse.py",
    ):
        assert needed in names
