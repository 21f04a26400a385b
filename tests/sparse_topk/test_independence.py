"""The kernel package stands alone: it knows no package above it, and the hub in one file only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "kernels" / "sparse_topk"


def test_it_does_not_know_the_name_of_its_users():
    for path in PACKAGE.rglob("*.py"):
        assert "mlsae" not in path.read_text().lower(), path


def test_one_file_alone_imports_the_hub():
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            if {name.split(".")[0] for name in names} & {"huggingface_hub", "safetensors"}:
                importers.add(path.name)
    assert importers == {"hub.py"}
